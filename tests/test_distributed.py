"""Many processes: gradients by DDP and FSDP are those of one process on the joint batch, DTensors give the results of whole
tensors, and the examples, which go on from a checkpoint half-way, have the losses of one process that does not.

This file is also the program of those processes (see `torchrun`).
"""

import contextlib
import copy
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastelbo
from conftest import INTERPRETED
from fastelbo import reference
from support import LIKELIHOODS, make_inputs, options, relative

ROOT = Path(__file__).parent.parent
WORLD, SHARE, FEATURES, LATENT, BETA = 2, 4, 10, 3, 0.7
WAYS = ("composed", "elbo", "two samples")


class Objective(nn.Module):
    """A VAE whose forward is its loss, as DDP and FSDP want it."""

    def __init__(self, way: str, reduction: str) -> None:
        super().__init__()
        self.way, self.reduction = way, reduction
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 16), nn.SiLU(), nn.Linear(16, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, 16), nn.SiLU(), nn.Linear(16, FEATURES))

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, 1)
        options = {"likelihood": "bernoulli_logits", "reduction": self.reduction}
        if self.way == "elbo":
            return fastelbo.elbo(self.decoder, x, mu, logvar, BETA, eps=eps, **options).loss
        if self.way == "two samples":  # of the same noise; the decoder runs for each by itself, and again in backward
            twice = eps.expand(2, *eps.shape)
            return fastelbo.elbo(self.decoder, x, mu, logvar, BETA, eps=twice, bound=fastelbo.ELBO(2), **options).loss
        z, kl = fastelbo.sample_kl(mu, logvar, eps=eps, reduction=self.reduction)
        return fastelbo.loss(self.decoder(z), x, kl=kl, beta=BETA, **options).loss

    def naive(self, x: Tensor, eps: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, 1)
        recon_x = self.decoder(mu + torch.exp(0.5 * logvar) * eps)
        _, recon, kl = reference.elbo_loss(recon_x, x, mu, logvar, likelihood="bernoulli_logits")
        # What averaging makes of a sum: 1/world of the joint batch's.
        sizes = {"sum": (WORLD, WORLD), "batchmean": (len(x), len(x)), "mean": (x.numel(), mu.numel())}[self.reduction]
        return recon / sizes[0] + BETA * kl / sizes[1]


def ddp(objective: Objective, **options) -> nn.Module:
    return DistributedDataParallel(objective, **options)


def ddp_parts(objective: Objective, **options) -> nn.Module:
    """Encoder and decoder wrapped each by itself: DDP's hooks are then inside the graph that `elbo` holds."""
    objective.encoder = DistributedDataParallel(objective.encoder, **options)
    objective.decoder = DistributedDataParallel(objective.decoder, **options)
    return objective


def fsdp(objective: Objective, parts: tuple[str, ...], **options) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for name in parts:
        fully_shard(objective.get_submodule(name), **options)
    return objective


def fsdp1_parts(objective: Objective) -> nn.Module:
    """The first FSDP, each part a root of its own."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    options = {"sharding_strategy": ShardingStrategy.NO_SHARD, "use_orig_params": True, "device_id": torch.device("cpu")}
    objective.encoder, objective.decoder = (
        FullyShardedDataParallel(part, **options) for part in (objective.encoder, objective.decoder)
    )
    return objective


class Case(NamedTuple):
    wrap: Callable[[Objective], nn.Module]
    reductions: tuple[str, ...] = ("batchmean",)
    micro_batches: int = 1


CASES = {
    "ddp": Case(ddp, ("batchmean", "mean", "sum")),
    "ddp, unused parameters": Case(partial(ddp, find_unused_parameters=True)),
    "ddp, bucket views": Case(partial(ddp, gradient_as_bucket_view=True)),
    "ddp, static graph": Case(partial(ddp, static_graph=True)),
    "ddp, no_sync": Case(ddp, micro_batches=2),
    "ddp of the parts": Case(ddp_parts),
    "ddp of the parts, static graph": Case(partial(ddp_parts, static_graph=True)),
    "fsdp": Case(partial(fsdp, parts=("encoder", "decoder", "")), ("batchmean", "mean", "sum")),
    "fsdp, kept after forward": Case(partial(fsdp, parts=("encoder", "decoder", ""), reshard_after_forward=False)),
    "fsdp, resharded after forward": Case(partial(fsdp, parts=("encoder", "decoder", ""), reshard_after_forward=True)),
    "fsdp of the root": Case(partial(fsdp, parts=("",))),
    "fsdp of the decoder's layers": Case(partial(fsdp, parts=("decoder.0", "decoder.2", ""))),
    "fsdp of the parts": Case(partial(fsdp, parts=("encoder", "decoder"))),
    "fsdp1 of the parts": Case(fsdp1_parts),
    "fsdp, accumulated": Case(partial(fsdp, parts=("encoder", "decoder", "")), micro_batches=2),
}
if INTERPRETED:  # the kernels see no more of the others than of these
    CASES = {name: CASES[name]._replace(reductions=("batchmean",)) for name in ("ddp", "fsdp of the parts")}
RUNS = [(name, way, reduction) for name, case in CASES.items() for reduction in case.reductions for way in WAYS]


def synchronized(model: nn.Module, last: bool):
    """Gradients of micro-batches are reduced with the last one."""
    if isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext() if last else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def worst_error(case: Case, way: str, reduction: str) -> float:
    """The largest of all errors of a gradient, over two steps: one that arrives a step late is wrong in both."""
    torch.manual_seed(0)
    objective = Objective(way, reduction)
    truth = copy.deepcopy(objective).double()
    model = case.wrap(objective)
    errors = []
    for _ in range(2):
        model.zero_grad()
        truth.zero_grad()
        for i in range(case.micro_batches):
            x, eps = torch.rand(WORLD * SHARE, FEATURES), torch.randn(WORLD * SHARE, LATENT)
            truth.naive(x.double(), eps.double()).backward()
            mine = slice(dist.get_rank() * SHARE, (dist.get_rank() + 1) * SHARE)
            with synchronized(model, i == case.micro_batches - 1):
                model(x[mine], eps[mine]).backward()
        for parameter, right in zip(model.parameters(), truth.parameters(), strict=True):
            gradient = parameter.grad
            if gradient is not None and hasattr(gradient, "full_tensor"):
                gradient = gradient.full_tensor()
            errors.append(float("inf") if gradient is None else relative(gradient, right.grad))
    return max(errors)


SHARDED = [
    (dimension, likelihood, reduction)
    for dimension in (0, 1)
    for likelihood in LIKELIHOODS
    for reduction in (("none",) if INTERPRETED else ("sum", "none", ("mean", "batchmean")))
]


def worst_error_of_dtensors(dimension: int, likelihood: str, reduction) -> float:
    """The largest of all errors of results and gradients, of sampling, loss and `elbo`, whose arguments are sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    kl_reduction = reduction if isinstance(reduction, str) else reduction[1]

    def results(recon_x, x, mu, logvar, eps):
        z, kl = fastelbo.sample_kl(mu, logvar, eps=eps, reduction=kl_reduction)
        terms = fastelbo.loss(recon_x, x, mu, logvar, BETA, reduction=reduction, **options(likelihood))
        joined = fastelbo.elbo(
            lambda z: recon_x * torch.ones_like(z[:, :1]),
            x,
            mu,
            logvar,
            BETA,
            eps=eps,
            reduction=reduction,
            **options(likelihood),
        )
        total = 2 * terms.loss.sum() + terms.recon.sum() + kl.sum() + (z * z).sum() + joined.loss.sum()
        return [z, kl, *terms, *joined, *torch.autograd.grad(total, (recon_x, mu, logvar))]

    torch.manual_seed(0)
    inputs = [*make_inputs(likelihood, (SHARE, FEATURES), (SHARE, 4)), torch.randn(SHARE, 4)]
    sharded = [
        distribute_tensor(t.detach(), mesh, [Shard(dimension)]).requires_grad_(t.requires_grad) for t in inputs
    ]  # fmt: skip
    try:
        found = results(*sharded)
    except NotImplementedError:  # torch cannot shard an operator
        return float("nan")
    if any(gradient.placements != (Shard(dimension),) for gradient in found[-3:]):
        return float("inf")
    pairs = zip(found, results(*inputs), strict=True)
    return max(relative(value.full_tensor(), whole) for value, whole in pairs)


def measure(out: str) -> None:
    """All errors, in one launch, since that costs more than they do."""
    dist.init_process_group("gloo")
    errors = [worst_error(CASES[name], way, reduction) for name, way, reduction in RUNS]
    errors = torch.tensor(errors + [worst_error_of_dtensors(*case) for case in SHARDED])
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(errors.tolist()))
    dist.barrier()
    dist.destroy_process_group()


def torchrun(script: str | Path, *arguments) -> str:
    """What two processes print that run a script on the CPU; this file computes `measure`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # or it looks for the host's name, which not every machine resolves
    if environment.get("TRITON_INTERPRET") != "1":
        environment["FASTELBO_BACKEND"] = "torch"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [*launcher, f"--nproc-per-node={WORLD}", __file__, script, *arguments]
    done = subprocess.run(list(map(str, command)), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def run(script: str, *arguments: str) -> None:
    if script == __file__:
        measure(*arguments)
    else:
        sys.path.insert(0, str(Path(script).parent))
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
    # Past Python's own shutdown: now and then, on a busy machine, a thread of gloo that still frees a tensor aborts in it.
    sys.stdout.flush()
    os._exit(0)


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("distributed") / "errors.json"
    torchrun(__file__, out)
    return dict(zip([*RUNS, *SHARDED], json.loads(out.read_text()), strict=True))


@pytest.mark.parametrize("case", RUNS, ids=" ".join)
def test_gradients_of_the_joint_batch(case, errors):
    assert errors[case] < 1e-5


@pytest.mark.parametrize("case", SHARDED, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_dtensors(case, errors):
    """Sharded over the batch or over features: whole results, and gradients sharded alike."""
    if case[1] == "bernoulli_logits" and math.isnan(errors[case]) and torch.__version__ < "2.13":
        pytest.skip("torch raises NotImplementedError, since it cannot shard binary_cross_entropy_with_logits before 2.13")
    assert errors[case] < 1e-5


BATCH, SEED, FIRST, ALL = 128, 3, 2, 4


@pytest.fixture(scope="module")
def losses_of_one_process() -> list[float]:
    """The mean loss of each epoch, by the naive code, on joint batches."""
    pytest.importorskip("sklearn")
    from examples.digits import VAE, digits

    images = digits()
    torch.manual_seed(SEED)
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generators = [torch.Generator().manual_seed(SEED + rank) for rank in range(WORLD)]
    means = []
    for epoch in range(ALL):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED + epoch))
        losses = []
        for batch in order.split(WORLD * BATCH)[: len(order) // (WORLD * BATCH)]:
            x = images[batch]
            eps = torch.cat([torch.randn(BATCH, 16, generator=generator) for generator in generators])
            mu, logvar = model.encode(x)
            recon_x = model.decode(mu + torch.exp(0.5 * logvar) * eps)
            loss = reference.elbo_loss(recon_x, x, mu, logvar, likelihood="bernoulli_logits")[0] / len(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
    return means


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="takes long, and its backend is not what it is about")
@pytest.mark.parametrize("name", ("ddp", "fsdp"))
def test_example_goes_on_from_its_checkpoint(name, losses_of_one_process, tmp_path):
    script, checkpoint = ROOT / "examples" / f"train_{name}.py", tmp_path / "checkpoint"
    losses = []
    for epochs in (FIRST, ALL):
        printed = torchrun(script, "--epochs", epochs, "--batch-size", BATCH, "--seed", SEED, "--checkpoint", checkpoint)
        losses.append([float(loss) for loss in re.findall(r"loss per digit (\S+)", printed)])
        # What a run leaves that is killed while it saves.
        if name == "ddp":
            (tmp_path / "checkpoint.partial").write_bytes(b"half")
        else:
            (checkpoint / "partial").mkdir()
            (checkpoint / "partial" / ".metadata").write_bytes(b"half")
    assert [len(part) for part in losses] == [FIRST, ALL - FIRST]
    torch.testing.assert_close(losses[0] + losses[1], losses_of_one_process, rtol=1e-6, atol=0)
    assert losses_of_one_process[-1] < 0.9 * losses_of_one_process[0]


if __name__ == "__main__":
    run(*sys.argv[1:])
