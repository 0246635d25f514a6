"""The kernels of sparse targets, compiled ahead of time: the first reads no target, the second gathers."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("a kernel is either interpreted or compiled", allow_module_level=True)
pytest.importorskip("triton", reason="triton is installed on Linux only")

from bench import compiled
from bench.assembly import accesses, spilled_bytes
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
