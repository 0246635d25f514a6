"""The compiled kernels keep the traffic budget: compiled ahead of time for four architectures, exactly as they are launched.

`make budget` compiles each kernel for all of them; here each is compiled for one, and for one of the others in turns.
"""

import importlib.metadata
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("a kernel is either interpreted or compiled", allow_module_level=True)
pytest.importorskip("triton", reason="triton is installed on Linux only")

from bad_kernels import streaming
from bench import budget, compiled
from bench.assembly import Machine, accesses, machine, spilled_bytes
from bench.budget import FLOAT64, Kernel, code_of, machine_of
from bench.cases import LIKELIHOODS
from bench.compiled import TARGETS, compile_for, specialization
from fastelbo import kernels
from fastelbo.kernels.launch import FINISH, THREADS

F32, BF16, F64, U8 = torch.float32, torch.bfloat16, torch.float64, torch.uint8

EVERY = os.environ.get("EVERY_KERNEL") == "1"  # `make budget` sets it


def is_checked(name: str) -> bool:
    """The usual likelihoods differ by their device functions alone: the first is checked in every dtype, the others in one."""
    primitive, kind = name.split(": ")
    likelihood, *dtypes = kind.split()
    alike = primitive.startswith("loss") and likelihood in LIKELIHOODS[1:]
    return EVERY or not alike or dtypes == ["float32", "float32"]


KERNELS = {name: kernel for name, kernel in budget.by_name().items() if is_checked(name)}
OTHERS = [target for target in TARGETS if target != "sm_90"]


def in_turns(names) -> list[tuple[str, str]]:
    return [(name, target) for i, name in enumerate(names) for target in TARGETS if EVERY or target in ("sm_90", OTHERS[i % 3])]


COMPILED = in_turns(KERNELS)
VARIANTS = {
    "no gradient": lambda: compiled.loss_forward("bernoulli", F32, F32, gradient=False),
    "given kl": lambda: compiled.loss_forward("bernoulli", F32, F32, kl=True),
    "rows, aligned": lambda: compiled.loss_forward("bernoulli", F32, F32, per_sample=True),
    "rows, ragged": lambda: compiled.loss_forward("bernoulli", F32, F32, per_sample=True, features=785),
    "retained graph": lambda: compiled.loss_backward("bernoulli", F32, F32, retained=True),
    "only the latents' gradients": lambda: compiled.loss_backward("bernoulli", F32, F32, recon=False),
    "only the prediction's gradient": lambda: compiled.loss_backward("bernoulli", F32, F32, latents=False),
    "only a given kl's gradient": lambda: compiled.loss_backward("bernoulli", F32, F32, recon=False, latents=False, kl=True),
    "prediction and given kl": lambda: compiled.loss_backward("bernoulli", F32, F32, latents=False, kl=True),
    "given eps": lambda: compiled.sample_forward(F32, seeded=False),
    "no kl": lambda: compiled.sample_forward(F32, wants_kl=False),
    "sample rows, ragged": lambda: compiled.sample_forward(F32, per_sample=True),
    "loss of a reconstruction": lambda: compiled.total(F32),
    "losses of rows, ragged": lambda: compiled.total(F64, per_sample=True),
    "backward of given eps": lambda: compiled.sample_backward(F32, seeded=False),
    "a log scale for all": lambda: compiled.reconstruction("gaussian", F32, F32, links=(None, "log_scale"), shapes=((),)),
    "a log scale a feature": lambda: compiled.reconstruction("gaussian", F32, F32, links=(None, "log_scale"), shapes=((784,),)),
    "dispersions of genes": lambda: compiled.reconstruction("negative_binomial", F32, F32, shapes=((784,),)),
    "cells with weights": lambda: compiled.reconstruction(
        "zero_inflated_negative_binomial", F32, F32, F32, shapes=((784,),), weight=torch.zeros(128, 1)
    ),
    "rows of several parameters": lambda: compiled.reconstruction(
        "laplace", F32, F32, links=(None, "scale"), per_sample=True, features=785
    ),
    "counts in float64": lambda: compiled.reconstruction("negative_binomial", F64, F64, target=F64),
    "classes of rows": lambda: compiled.categorical(512, 20_000, dense=True, per_sample=True),
    "classes of images": lambda: compiled.categorical(64, 256, 3, 32, 32),
    "classes in bfloat16": lambda: compiled.categorical(128, 32_000, dtype=BF16),
    "classes in float64": lambda: compiled.categorical(128, 10, dtype=F64),
    "mixture of grey images": lambda: compiled.mixture(1, 10, 32, 32),
    "mixture, channels last": lambda: compiled.mixture(3, 10, per_sample=True),
    "mixture of images in [0, 1]": lambda: compiled.mixture(3, 10, 32, 32, interval=True),
    "mixture in float64": lambda: compiled.mixture(3, 10, 32, 32, dtype=F64),
    "kl of rows": lambda: compiled.divergence_forward(F32, prior="std", posterior="std", kind="row"),
    "kl of elements": lambda: compiled.divergence_forward(F32, prior="logvar", kind="element"),
    "kl of weighted rows": lambda: compiled.divergence_forward(F32, prior="std", kind="row", weight=torch.ones(128, 1)),
    "kl of weighted elements": lambda: compiled.divergence_forward(BF16, kind="element", weight=torch.ones(128, 64)),
    "weights of dimensions in float64": lambda: compiled.divergence_forward(F64, prior="logvar", weight=torch.ones(64)),
    "backward of weighted rows": lambda: compiled.divergence_backward(F32, prior="std", weight=torch.ones(128, 1)),
    "backward of weighted elements": lambda: compiled.divergence_backward(BF16, prior="logvar", weight=torch.ones(128, 64)),
    "backward of weights in float64": lambda: compiled.divergence_backward(F64, prior="logvar", weight=torch.ones(64)),
    "weighted columns": lambda: compiled.divergence_columns(F32, weight=torch.ones(128, 1)),
    "categorical latents of rows": lambda: compiled.classes_forward(512, 32, 32, kind="row", floor=0.1),
    "categorical latents of elements": lambda: compiled.classes_forward(512, 32, 33, kind="element"),
    "backward of rows of classes": lambda: compiled.classes_backward(512, 32, 32, kind="row", floor=0.1),
    "backward of columns of classes": lambda: compiled.classes_backward(512, 32, 33, kind="column"),
    "backward of many classes in float64": lambda: compiled.classes_backward(64, 5000, dtype=F64),
    "zeros in float64": lambda: compiled.reconstruction("zero_inflated_negative_binomial", F64, F64, F64, target=F64),
    "dispersions by their logarithm, one a row": lambda: compiled.reconstruction(
        "negative_binomial", F32, F32, links=("log", "log"), shapes=((128, 1),), per_sample=True
    ),
    "links in float64": lambda: compiled.reconstruction("negative_binomial", F64, F64, target=F64, links=("softplus", "log")),
    "softmax of ragged rows": lambda: compiled.of_rows("poisson_of_both", BF16, features=785)[0],
    "ragged rows of a softmax": lambda: compiled.of_rows("poisson_of_both", BF16, features=785)[1],
    "dispersions of genes, of a softmax": lambda: compiled.of_rows(
        "negative_binomial", F32, F32, dispersion="log", shapes=((784,),), weight=torch.zeros(784)
    )[1],
    "backward of a softmax with weights": lambda: compiled.of_rows(
        "zero_inflated_negative_binomial",
        F32,
        F32,
        F32,
        dispersion="log",
        shapes=((784,),),
        weight=torch.zeros(128, 1),
        per_sample=True,
        backward=True,
    )[0],
    "softmax in float64": lambda: compiled.of_rows("negative_binomial", F64, F64, target=F64, dispersion="log")[1],
    "samples in bfloat16": lambda: compiled.log_ratio_forward(BF16, posterior="std", prior="std"),
    "samples in float64": lambda: compiled.log_ratio_forward(F64, prior="std"),
    "samples, ragged": lambda: compiled.log_ratio_forward(F32, features=20),
    "samples alone": lambda: compiled.log_ratio_forward(F32, wants_logs=False),
    "backward of samples in bfloat16": lambda: compiled.log_ratio_backward(BF16, posterior="std", prior="std"),
    "backward of samples in float64": lambda: compiled.log_ratio_backward(F64, prior="std"),
    "backward of samples, ragged": lambda: compiled.log_ratio_backward(F32, prior="logvar", features=20),
    "backward of samples, all gradients": lambda: compiled.log_ratio_backward(F32, held=False),
    "backward of samples alone": lambda: compiled.log_ratio_backward(F32, logs=False, held=False),
    "a target for all samples, ragged": lambda: compiled.loss_forward(
        "bernoulli", F32, F32, per_sample=True, kl=True, samples=8, features=785
    ),
}


def check_bytes(kernel: Kernel, code) -> None:
    """Each tile of each argument of the budget is loaded or stored once in a loop, and its last few elements once outside.

    Of two streams that have an argument in common, one is a loop within the other: there it is loaded.
    """
    found = [access for access in accesses(code) if access.argument != "partials"]
    streams = [kernel.tile_bytes(stream) for stream in kernel.streams]
    expected = {place: size for stream in streams for place, size in stream.items()}
    looped = [((access.kind, access.argument), access.tile_bytes) for access in found if access.looped]
    assert sorted(looped) == sorted(expected.items())
    for access in filter(lambda access: access.looped, found):
        assert access.regions.count("for") == sum((access.kind, access.argument) in stream for stream in streams)
    rest = [((access.kind, access.argument), access.tile_bytes) for access in found if not access.looped]
    assert sorted(place for place, _ in rest) == (sorted(expected) if kernel.tail else [])
    for place, size in rest:
        assert size * kernel.block // expected[place] in (16, THREADS)


def check_machine_code(kernel: Kernel, found: Machine) -> None:
    """Accesses are 128 bits wide, or all that a thread has of a narrower tensor; nothing spills; float64 stays out of loops."""
    assert found.spilled_bytes == 0
    assert len(found.loops) == len(kernel.streams)
    for stream in kernel.streams:
        loop = kernel.loop(stream, found.loops)
        if torch.float64 not in kernel.dtypes.values():
            assert not [name for name in loop.opcodes() if FLOAT64.match(name)]


@pytest.mark.parametrize(("name", "target"), COMPILED)
def test_kernels_keep_the_budget(name, target):
    check_bytes(KERNELS[name], code_of(name, target))
    check_machine_code(KERNELS[name], machine_of(name, target))


@pytest.mark.parametrize("target", TARGETS)
def test_partial_sums_are_read_once(target):
    for name, sums in (("loss forward: mse float32 float32", 2), ("sample forward: float32", 1)):
        found = [access for access in accesses(code_of(name, target)) if access.argument == "partials"]
        assert [access.tile_bytes for access in found] == [8 * FINISH] * sums


@pytest.mark.parametrize("target", TARGETS)
def test_a_right_guess_leaves_prediction_target_and_gradient_alone(target):
    """All their accesses stand behind one more condition than where there was no guess to compare."""

    def depths(launch):
        found = accesses(compile_for(target, launch))
        return [a.regions.count("if") for a in found if a.argument in ("prediction", "target", "gradient")]

    guessed = depths(compiled.loss_backward("mse", F32, F32))
    assert guessed == [depth + 1 for depth in depths(compiled.loss_backward("mse", F32, F32, retained=True))]
    assert len(guessed) == 6


# Three bytes an element are loaded and two stored, for 46 instructions or more: these are the bound, or nearly so.
LESS_IN_FLIGHT = {f"loss forward: {name} bfloat16 uint8": 27 for name in ("bernoulli", "bernoulli_logits")}
LESS_IN_FLIGHT["loss forward, kl given: samples bfloat16 uint8"] = 27
# Triton 3.7 takes 60 registers, where 3.6 and 3.9 take at most 56: a multiprocessor has room for one program less.
LESS_IN_FLIGHT["loss forward: bernoulli bfloat16 uint8"] = 24
# As for counts of genes, by far.
LESS_IN_FLIGHT["reconstruction forward: negative_binomial bfloat16 bfloat16 float32"] = 24
LESS_IN_FLIGHT["reconstruction forward, of rows: negative_binomial bfloat16 bfloat16 float32"] = 24
LESS_IN_FLIGHT["reconstruction forward: negative_binomial float32 float32 float32, by softplus and log"] = 30
# One number an element is loaded for each normal that is made again, in 55 instructions or more.
LESS_IN_FLIGHT |= {"log ratio backward: float32": 18, "log ratio backward, prior: float32": 16}


@pytest.mark.parametrize("name", KERNELS)
def test_enough_loads_are_in_flight(name):
    """32 KB for each multiprocessor of sm_90, so that memory is never idle."""
    kernel, registers = KERNELS[name], machine_of(name, "sm_90").registers
    for stream in kernel.streams:
        assert kernel.bytes_in_flight(stream, registers) >= 1024 * LESS_IN_FLIGHT.get(name, 32)


@pytest.mark.parametrize(
    ("variant", "target"),
    [(variant, target) for i, variant in enumerate(VARIANTS) for j, target in enumerate(TARGETS) if EVERY or (i + j) % 4 == 0],
)
def test_other_variants_compile_without_spills(variant, target):
    """In one of the architectures, in turns: what each is a variant of is compiled for two."""
    assert spilled_bytes(compile_for(target, VARIANTS[variant]())) == 0


SPARSE_ROWS = {
    "forward": lambda: compiled.of_rows(
        "zero_inflated_negative_binomial", F32, F32, F32, dispersion="log", at_zero="zero_inflated_negative_binomial_at_zero"
    )[1:],
    "backward": lambda: compiled.of_rows(
        "negative_binomial", BF16, BF16, shapes=((784,),), at_zero="negative_binomial_at_zero", per_sample=True, backward=True
    ),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SPARSE_ROWS)
def test_nonzeros_of_a_softmax_compile_without_spills(name, target):
    launches = SPARSE_ROWS[name]()
    assert [launch.kernel.__name__ for launch in launches] == ["reconstruction_kernel", "nonzeros_kernel"]
    assert [spilled_bytes(compile_for(target, launch)) for launch in launches] == [0, 0]


def test_rows_of_a_softmax_do_not_compile_anew():
    def launches(rows, features, library):
        tensors = [torch.zeros(rows, features), torch.zeros(features), torch.zeros(rows, 1)]
        family = kernels.Family("negative_binomial", links=("softmax", "log"))
        made = kernels.RowReconstruction(family=family, per_sample=False, dtype=F32, device=torch.device("cpu"))
        if library == "of all":
            tensors[-1] = torch.zeros(())
        x, one, sums = torch.zeros(rows, features), torch.ones(1), [None, torch.zeros(5, rows, dtype=F64)]
        forward = compiled.record_all(lambda: made.forward(tensors, x, None, rows, (True,) * 3))
        return [*forward, *compiled.record_all(lambda: made.backward(tensors, x, None, rows, one, sums, (True,) * 3))]

    shapes = [(rows, features) for rows in (2, 3, 16, 100, 128) for features in (784, 2000, 20_000)]
    found = [tuple(map(specialization, launches(*shape, library))) for shape in shapes for library in ("own", "of all")]
    assert len(set(found)) == 1 and len(found[0]) == 3
    assert found[0] != tuple(map(specialization, launches(3, 785, "own")))


def check_code(kernel: Kernel, code) -> None:
    check_machine_code(kernel, machine(code))


FAULTS = {
    "extra load": check_bytes,
    "scalar store": check_code,
    "spill": check_code,
    "float64": check_code,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_kernel_fails(fault, target):
    if (fault, target) == ("spill", "gfx942"):
        pytest.skip("its compiler takes no limit on registers")
    good, bad = streaming(None), streaming(fault)
    for check in (check_bytes, check_code):
        check(good, compile_for(target, good.launch))
    with pytest.raises(AssertionError):
        FAULTS[fault](bad, compile_for(target, bad.launch))


def test_the_table_is_the_one_that_is_kept():
    """`make budget` was run since the kernels changed."""
    kept = budget.KEPT.read_text()
    if not kept.startswith(f"Triton {importlib.metadata.version('triton')}."):
        pytest.skip("it was made with another Triton")
    table = [line.strip("| ").split(" | ") for line in kept.splitlines() if line.startswith("|")]
    rows = {title: [size, *costs] for title, size, *costs in table}
    for title, kernel, stream in budget.loops([*KERNELS.values(), *budget.of_items()]):
        size, *costs = rows[title]
        assert size == str(kernel.bytes_per_element(stream))
        for target, cost in zip(budget.DEVICES, costs, strict=True):
            if EVERY or target == "sm_90" or (kernel.name, target) in COMPILED:
                assert cost == budget.cost(kernel, stream, target), (title, target)
    assert not EVERY or budget.table() == kept


POSITIONS = {
    # The launch, how often its logits or parameters are loaded, and the targets.
    "classes in one tile": (lambda: compiled.categorical(512, 1000, dense=True), 1, 1),
    "more classes": (lambda: compiled.categorical(512, 20_000, dense=True), 2, 2),
    "classes of positions": (lambda: compiled.categorical(64, 256, 3, 32, 32, dense=True), 2, 2),
    "mixture": (lambda: compiled.mixture(3, 10, 32, 32), 1, 1),
    "mixture of grey images": (lambda: compiled.mixture(1, 10, 32, 32), 1, 1),
}


@pytest.mark.parametrize(("name", "target"), in_turns(POSITIONS))
def test_positions_keep_the_budget(name, target):
    """Each logit or parameter is loaded once, or twice where all classes do not fit in a tile; each gradient is stored once."""
    call, predictions, targets = POSITIONS[name]
    code = compile_for(target, call())
    found = [(a.kind, a.argument, a.tile_bytes) for a in accesses(code) if a.argument != "partials"]
    # Every access but a mixture's, each of whose is of one parameter of all components, is of the whole tile.
    parts = {"mixture": (10, 3), "mixture of grey images": (3, 1)}.get(name, (1, 1))
    expected = {
        ("load", "prediction"): predictions * parts[0],
        ("load", "x"): targets * parts[1],
        ("store", "gradient"): parts[0],
    }
    assert {place: sum(a[:2] == place for a in found) for place in {a[:2] for a in found}} == expected
    assert len({size for kind, argument, size in found if argument != "x"}) == 1
    made = machine(code)
    assert made.spilled_bytes == 0
    assert all(set(loop.widths()["store"]) <= {128} for loop in made.loops)


# The logits of categorical latents, options, and how often each side is loaded forward and backward.
CLASSES = {
    "groups of 32": ((1024, 32, 32), {}, (1, 1)),
    "groups of 32, without unimix": ((1024, 32, 32), {"unimix": 0.0}, (1, 1)),
    "groups of 32, in bfloat16": ((1024, 32, 32), {"dtype": BF16}, (1, 1)),
    "groups of 32, from the uniform distribution": ((1024, 32, 32), {"prior": False}, (1, 1)),
    "groups of 32, in float64": ((1024, 32, 32), {"dtype": F64}, (1, 1)),
    "1000 classes": ((512, 8, 1000), {}, (1, 1)),
    "2048 classes": ((512, 2048), {"unimix": 0.0}, (1, 1)),
    "8192 classes, from the uniform distribution": ((512, 8192), {"prior": False, "unimix": 0.0}, (2, 3)),
    "20000 classes": ((512, 20_000), {}, (2, 3)),
}


@pytest.mark.parametrize(("name", "target"), in_turns(CLASSES))
def test_categorical_latents_keep_the_budget(name, target):
    """Each side is loaded once, or a few times where the classes do not fit in a tile; each gradient is stored once."""
    shape, options, times = CLASSES[name]
    sides = ("logits", "prior") if options.get("prior", True) else ("logits",)
    for call, count, gradients in ((compiled.classes_forward, times[0], False), (compiled.classes_backward, times[1], True)):
        code = compile_for(target, call(*shape, **options))
        found = [a for a in accesses(code) if a.argument not in ("partials", "grad_kl")]
        expected = {("load", side): count for side in sides}
        expected |= {("store", f"grad_{side}"): 1 for side in sides} if gradients else {}
        assert {place: sum(a[:2] == place for a in found) for place in {a[:2] for a in found}} == expected
        assert len({a.tile_bytes for a in found}) == 1
        made = machine(code)
        assert made.spilled_bytes == 0
        assert all(set(loop.widths()["store"]) <= {128, 64} for loop in made.loops)
        assert all(128 in loop.widths()["load"] or 64 in loop.widths()["load"] for loop in made.loops)


BATCHES = (*range(1, 33), 48, 50, 63, 64, 65, 96, 100, 127, 128, 129, 200, 255, 256, 257, 512, 1000, 1023, 1024)


@pytest.mark.counts_launches  # no memory is touched here, however large
def test_batch_sizes_do_not_compile_anew():
    assert len(BATCHES) == 50

    def launches(batch, features=785, latents=21, offset=0):
        def tensor(*shape, dtype=F32):
            numel = shape[0] * shape[1]
            return torch.empty(numel + offset, dtype=dtype)[offset:].view(shape)

        recon_x, x = tensor(batch, features, dtype=BF16), tensor(batch, features, dtype=U8)
        mu, logvar = tensor(batch, latents), tensor(batch, latents)
        one, seed = torch.ones(1), torch.zeros((), dtype=torch.int64)
        settings = {
            "likelihood": "bernoulli_logits", "scale": 1.0, "target_scale": 1 / 255, "scales": (1.0, 1.0 / batch),
            "per_sample": False, "dtype": F32,
        }  # fmt: skip
        tensors, upstreams = (recon_x, x, mu, logvar), (torch.ones(()), None, None)
        options = {"kl_scale": 1.0 / batch, "per_sample": False, "dtype": F32}
        gradient = tensor(batch, features, dtype=BF16)
        loss, sample = kernels.Loss(tensors, **settings), kernels.Sample(mu, logvar, **options)
        yield lambda: loss.forward(tensors, 0.1 * batch, 2.0 * batch, one)
        yield lambda: loss.backward(tensors, 0.1 * batch, 2.0 * batch, upstreams, gradient, one, True, True)
        yield lambda: sample.forward(mu, logvar, seed, True)
        yield lambda: sample.backward(tensor(batch, latents), mu, logvar, seed, 1.0, upstreams[:2])
        samples = 2 + batch % 3
        z, each = tensor(samples * batch, latents), torch.ones(samples * batch)
        normal = {"samples": samples, "posterior": "logvar", "clamp": None, "prior": None, "dtype": F32}
        priors, held = (None, None), {"held": True, "path_scale": each}
        yield lambda: kernels.log_ratio_forward(mu, logvar, seed, *priors, wants_logs=True, **normal)
        yield lambda: kernels.log_ratio_backward(z, each, each, mu, logvar, seed, *priors, priors, **held, **normal)
        decoded, rows = tensor(samples * batch, features, dtype=BF16), settings | {"per_sample": True}
        of_samples = kernels.Loss((decoded, x, each), **rows)
        yield lambda: of_samples.forward((decoded, x, each), 0.1, 1.0, each)

    def compilations(*calls):
        return [{specialization(compiled.record(call)) for call in same} for same in zip(*calls, strict=True)]

    usual = [launches(batch) for batch in BATCHES]
    assert [len(found) for found in compilations(*usual)] == [1] * 7
    long = launches(2**21 + 1, features=1024, latents=1024)
    assert [len(found) for found in compilations(launches(128), launches(999), long)] == [2] * 7
    assert [len(found) for found in compilations(launches(128), launches(16, offset=1), launches(50, offset=3))] == [2] * 7
