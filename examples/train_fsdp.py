"""Trains a VAE on digits in many processes, with FSDP2 (`fully_shard`): each holds a shard of the model and of each batch.

    torchrun --nproc-per-node 2 examples/train_fsdp.py

NCCL where there are GPUs, one a process, gloo otherwise. With `--checkpoint` every epoch is saved, each process its own shards,
and a run that finds a checkpoint goes on from there with the losses that it would have had.
"""

import argparse
import shutil
from pathlib import Path

import processes
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from digits import VAE, digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fastelbo


class Objective(nn.Module):
    """The loss as a module: FSDP gathers and frees parameters around the forward of a module, and of the modules in it."""

    def __init__(self, vae: VAE, beta: float, noise: torch.Generator) -> None:
        super().__init__()
        self.vae, self.beta, self.noise = vae, beta, noise

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.vae.encode(x)
        # FSDP averages gradients, and so "batchmean" and "mean" give those of the joint batch; "sum" gives 1/world of them.
        # `fastelbo.elbo(self.vae.decode, ...)`, as in train_ddp.py, comes down to the same calls where the decoder is sharded.
        z, kl = fastelbo.sample_kl(mu, logvar, reduction="batchmean", generator=self.noise)
        recon_x = self.vae.decode(z)
        return fastelbo.loss(
            recon_x, x, kl=kl, beta=self.beta, likelihood="bernoulli_logits", reduction="batchmean"
        ).loss  # fmt: skip


def train(options: argparse.Namespace, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    images = digits(device)
    torch.manual_seed(options.seed)  # each process keeps its shard of the weights that it draws, which must be the same ones
    # The library never reads the rank, since replicas of a tensor-parallel model need equal noise. Processes with data of
    # their own need noise of their own.
    noise = torch.Generator(device).manual_seed(options.seed + rank)
    objective = Objective(VAE(options.latent), options.beta, noise).to(device)
    for module in (objective.vae.encoder, objective.vae.decoder, objective):
        fully_shard(module)
    optimizer = torch.optim.Adam(objective.parameters(), lr=options.learning_rate)
    done = load(options.checkpoint, objective, optimizer) if options.checkpoint else 0
    for epoch in range(done, options.epochs):
        batches = processes.shares(len(images), options.batch_size, options.seed + epoch)
        total = torch.zeros((), device=device)
        for batch in batches:
            optimizer.zero_grad()
            loss = objective(images[batch.to(device)])
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch + 1:3}: loss per digit {total.item() / (len(batches) * world):.6f}", flush=True)
        if options.checkpoint:
            save(options.checkpoint, objective, optimizer, epoch + 1)


def save(folder: Path, objective: Objective, optimizer: torch.optim.Optimizer, done: int) -> None:
    partial = folder / "partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    dcp.save(snapshot(objective, optimizer), checkpoint_id=partial)
    if dist.get_rank() == 0:
        older = saved(folder)
        partial.rename(folder / str(done))  # in one go, so that a run which is killed leaves no half of a checkpoint
        for epoch in older:
            shutil.rmtree(folder / str(epoch))
    dist.barrier()


def load(folder: Path, objective: Objective, optimizer: torch.optim.Optimizer) -> int:
    """The number of epochs that are done."""
    done = max(saved(folder), default=0)
    if done:
        state = snapshot(objective, optimizer)
        dcp.load(state, checkpoint_id=folder / str(done))
        set_state_dict(objective, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        objective.noise.set_state(state[f"noise of {dist.get_rank()}"])
    return done


def snapshot(objective: Objective, optimizer: torch.optim.Optimizer) -> dict:
    """All that a run needs to go on. What has one name is taken to be the same, or shards of the same, on every process."""
    model_state, optimizer_state = get_state_dict(objective, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, f"noise of {dist.get_rank()}": objective.noise.get_state()}


def saved(folder: Path) -> list[int]:
    """The epochs after which there is a checkpoint."""
    return [int(path.name) for path in folder.glob("[0-9]*")]


if __name__ == "__main__":
    processes.run(train, processes.parse(__doc__, "folder"))
