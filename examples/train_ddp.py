"""Trains a VAE on digits in many processes, with DistributedDataParallel: each holds the whole model and a share of each batch.

    torchrun --nproc-per-node 2 examples/train_ddp.py

NCCL where there are GPUs, one a process, gloo otherwise. With `--checkpoint` every epoch is saved, and a run that finds the
file goes on from there with the losses that it would have had.
"""

import argparse
import os
from pathlib import Path

import processes
import torch
import torch.distributed as dist
from digits import VAE, digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastelbo


class Objective(nn.Module):
    """The loss as a module: DDP sees only what happens in the forward of the module it wraps."""

    def __init__(self, vae: VAE, beta: float, noise: torch.Generator) -> None:
        super().__init__()
        self.vae, self.beta, self.noise = vae, beta, noise

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.vae.encode(x)
        # DDP averages gradients, and so "batchmean" and "mean" give those of the joint batch; "sum" gives 1/world of them.
        terms = fastelbo.elbo(
            self.vae.decode, x, mu, logvar, self.beta,
            likelihood="bernoulli_logits", reduction="batchmean", generator=self.noise,
        )  # fmt: skip
        return terms.loss


def train(options: argparse.Namespace, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    images = digits(device)
    torch.manual_seed(options.seed)
    # The library never reads the rank, since replicas of a tensor-parallel model need equal noise. Processes with data of
    # their own need noise of their own.
    noise = torch.Generator(device).manual_seed(options.seed + rank)
    objective = Objective(VAE(options.latent), options.beta, noise).to(device)
    model = DistributedDataParallel(objective)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    done = load(options.checkpoint, objective, optimizer) if options.checkpoint and options.checkpoint.exists() else 0
    for epoch in range(done, options.epochs):
        batches = processes.shares(len(images), options.batch_size, options.seed + epoch)
        total = torch.zeros((), device=device)
        for batch in batches:
            optimizer.zero_grad()
            loss = model(images[batch.to(device)])
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch + 1:3}: loss per digit {total.item() / (len(batches) * world):.6f}", flush=True)
        if options.checkpoint:
            save(options.checkpoint, objective, optimizer, epoch + 1)


def save(path: Path, objective: Objective, optimizer: torch.optim.Optimizer, done: int) -> None:
    noise: list[Tensor | None] = [None] * dist.get_world_size()
    dist.all_gather_object(noise, objective.noise.get_state())
    if dist.get_rank() == 0:
        state = {"model": objective.vae.state_dict(), "optimizer": optimizer.state_dict(), "noise": noise, "epochs": done}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, path)  # in one go, so that a run which is killed here leaves the old file or the new one
    dist.barrier()


def load(path: Path, objective: Objective, optimizer: torch.optim.Optimizer) -> int:
    """The number of epochs that are done."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if len(state["noise"]) != dist.get_world_size():
        raise ValueError(f"{path} was saved by {len(state['noise'])} processes, and these are {dist.get_world_size()}")
    objective.vae.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    objective.noise.set_state(state["noise"][dist.get_rank()])
    return state["epochs"]


if __name__ == "__main__":
    processes.run(train, processes.parse(__doc__, "file"))
