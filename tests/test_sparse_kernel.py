"""The kernels of sparse targets, compiled ahead of time: the first reads no target, the second gathers."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("a kernel is either interpreted or compiled", allow_module_level=True)
pytest.importorskip("triton", reason="triton is installed on Linux only")

from bench import compiled
from bench.assembly import accesses, machine, spilled_bytes
from bench.compiled import TARGETS, compile_for, specialization

F32, BF16, F64, I32, U8 = torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.uint8
VARIANTS = {
    "poisson": lambda: compiled.sparse("poisson", F32),
    "rows": lambda: compiled.sparse("poisson_log", BF16, index=I32, values=U8, per_sample=True),
    "weights of positives": lambda: compiled.sparse("bernoulli_logits_weighted", F32, F32, shapes=((),)),
    "genes": lambda: compiled.sparse("negative_binomial", F32, F32, shapes=((784,),)),
    "cells with weights": lambda: compiled.sparse(
        "zero_inflated_negative_binomial", F32, F32, F32, shapes=((784,), (128, 1)), weight=torch.zeros(128, 1)
    ),
    "backward": lambda: compiled.sparse("zero_inflated_negative_binomial", F32, F32, F32, guess=torch.ones(1)),
    "float64": lambda: compiled.sparse("negative_binomial", F64, F64),
}
PARAMETERS = {"first", "second", "third"}
GATHERED = PARAMETERS | {"starts", "columns", "values", "weight"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_spills_and_nothing_of_the_size_of_the_target(variant, target):
    zeros, nonzeros = (compile_for(target, launch) for launch in VARIANTS[variant]())
    for code, most in ((zeros, PARAMETERS | {"weight"}), (nonzeros, GATHERED)):
        assert spilled_bytes(code) == 0
        loaded = {access.argument for access in accesses(code) if access.kind == "load"}
        assert "first" in loaded and loaded <= most | {"factor", "used", "partials", "arrived", "zeros", "divisor"}
    assert "target" not in {access.argument for access in accesses(zeros)}


def test_batches_and_nonzeros_do_not_compile_anew():
    def kinds(**options):
        return [specialization(launch) for launch in compiled.sparse("negative_binomial", F32, F32, **options)]

    assert kinds() == kinds(rows=7, count=4001) == kinds(rows=999, count=1) == kinds(rows=50, features=785, count=16)
    assert kinds() != kinds(index=I32)


# The launch, and how often a row's logits are streamed, and those at nonzeros gathered.
ITEMS = {
    "one tile": (lambda: compiled.sparse_multinomial(128, 4000), 1, 2),
    "tiles": (lambda: compiled.sparse_multinomial(512, 20_000, index=I32), 2, 2),
    "ragged rows with weights": (lambda: compiled.sparse_multinomial(512, 20_001, weight=F32, per_sample=True), 2, 2),
    "backward in bfloat16": (
        lambda: compiled.sparse_multinomial(512, 20_000, dtype=BF16, values=U8, guess=torch.ones(1)),
        2,
        1,
    ),
    "float64": (lambda: compiled.sparse_multinomial(64, 9000, dtype=F64, values=F64), 2, 2),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ITEMS)
def test_a_multinomial_streams_logits_and_gathers_the_rest(name, target):
    """A gradient is stored once, and once more at nonzeros; without a spill; 128 bits at a time where rows are aligned."""
    call, streamed, gathered = ITEMS[name]
    launch = call()
    code, options = compile_for(target, launch), launch.options
    found = [a for a in accesses(code) if a.argument not in ("partials", "weight")]
    whole = options["CLASSES"] // options["GATHERED"]
    size = {argument: min(a.tile_bytes for a in found if a.argument == argument) for argument in {a.argument for a in found}}
    expected = [("load", "prediction", whole)] * streamed + [("load", "prediction", 1), ("load", "columns", 1)] * gathered
    expected += [("load", "values", 1)] * 2 + [("store", "gradient", whole), ("store", "gradient", 1)]
    assert sorted((a.kind, a.argument, a.tile_bytes // size[a.argument]) for a in found) == sorted(expected)
    made = machine(code)
    assert made.spilled_bytes == 0
    assert any(128 in loop.widths()["load"] for loop in made.loops) == (name != "ragged rows with weights")


def test_rows_and_nonzeros_of_a_multinomial_do_not_compile_anew():
    def kind(*shape, **options):
        return specialization(compiled.sparse_multinomial(*shape, **options))

    assert kind(128, 20_000) == kind(7, 20_000, count=4001) == kind(1, 16_000, count=1) == kind(999, 50_000, count=16)
    assert kind(128, 20_000) != kind(128, 20_001)
