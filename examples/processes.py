"""What the examples in many processes share: their options, their start and end, and each one's share of the data."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


def parse(description: str, checkpoint: str) -> argparse.Namespace:
    """The options; `checkpoint` is what `--checkpoint` names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="in all, with those of the checkpoint")
    parser.add_argument("--batch-size", type=int, default=64, help="of each process")
    parser.add_argument("--latent", type=int, default=16, help="dimensions of z")
    parser.add_argument("--beta", type=float, default=1.0, help="weight of the KL")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help=f"{checkpoint} to save to, and to go on from")
    return parser.parse_args()


def shares(count: int, batch_size: int, seed: int) -> Tensor:
    """Which of `count` images this process trains with in an epoch, a batch a row: `[steps, batch_size]`.

    The order is the same on every process, and comes from the seed alone, so that a run which goes on needs no memory of it.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    joint = batch_size * dist.get_world_size()
    steps = count // joint  # what is left would give unequal shares
    return order[: steps * joint].view(steps, dist.get_world_size(), batch_size)[:, dist.get_rank()]


def run(train: Callable[[argparse.Namespace, torch.device], None], options: argparse.Namespace) -> None:
    """Train with NCCL where there are GPUs, one a process, and with gloo otherwise."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, device_id=own)
    train(options, device)
    # Without it gloo aborts now and then while Python shuts down, after all work is done.
    dist.barrier()
    dist.destroy_process_group()
