"""Launches that go past `kernel[grid]`, prepared or not: they pass what it would, and everything unusual goes through it."""

import functools
import inspect
import os
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels have no launcher", allow_module_level=True)
pytest.importorskip("triton", reason="triton is installed on Linux only")

import triton
import triton.language as tl
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.jit import JITFunction

from fastelbo import kernels
from fastelbo.kernels import direct, launch, prepared, reconstruction

CUDA = torch.device("cuda", 0)
CURRENT = {0: 0}  # the GPU that passes for the current one
KERNELS = {
    name: value
    for module in vars(kernels).values()
    if isinstance(module, ModuleType)
    for name, value in vars(module).items()
    if isinstance(value, JITFunction) and name.endswith("_kernel")
}


class Compiled:
    """What Triton returns of a kernel: its own `CudaLauncher`, whose launcher in C is a list."""

    def __init__(self, **attributes):
        self.calls, self.run = [], CudaLauncher.__new__(CudaLauncher)
        self.function, self.packed_metadata = 17, ("packed",)
        known = {
            "launch": lambda *args: self.calls.append(args), "num_ctas": 1, "global_scratch_size": 0, "global_scratch_align": 1,
            "profile_scratch_size": 0, "profile_scratch_align": 1, "launch_cooperative_grid": False, "launch_pdl": False,
            "gsan_enabled": False, "arg_annotations": ["annotations"], "kernel_signature": b"signature",
        }  # fmt: skip
        vars(self.run).update(known | attributes)


def function(a, b, n: tl.int64, m, SIZE: tl.constexpr, DTYPE: tl.constexpr): ...


def summed(a, made, out, beta, partials, arrived, beta_value: tl.float64, n: tl.int64, SIZE: tl.constexpr): ...


class Kernel:
    """Stands for a JITFunction: of tensors a and b, of numbers n and m, of which m is specialized on, and of constants."""

    def __init__(self, fn=function, **attributes):
        self.fn = fn
        self.params = [
            SimpleNamespace(
                name=p.name, annotation_type="" if p.name.isupper() or p.annotation is p.empty else "fp64",
                do_not_specialize=p.annotation is tl.int64, is_constexpr=p.name.isupper(),
            )
            for p in inspect.signature(fn).parameters.values()
        ]  # fmt: skip
        self.pre_run_hooks, self.compiled, self.calls = [], Compiled(**attributes), []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.calls.append((grid, args, options))
            return self.compiled

        return run


@pytest.fixture
def cuda(monkeypatch):
    """Tensors on the CPU pass for such on the current GPU, whose current stream is number 7."""
    monkeypatch.setattr(direct, "INTERPRETED", False)
    monkeypatch.setattr(direct, "_current_device", lambda: CURRENT[0])
    monkeypatch.setattr(direct, "raw_stream", lambda index: 7)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def made(**attributes):
    kernel = Kernel(**attributes)
    return kernel, direct.Launch(kernel, CUDA, {"SIZE": 4, "DTYPE": "f32", "maxnreg": 255}, {"num_warps": 4})


A, B = torch.zeros(8), torch.zeros(4, dtype=torch.float64)


@pytest.mark.parametrize("tensors", ((A, B), (A, None), (None, None)), ids=("both", "one", "none"))
def test_a_direct_launch_passes_what_triton_passes(tensors, cuda, monkeypatch):
    """By Triton's own `CudaLauncher`, with the arguments that a JITFunction binds: constants too, options not."""
    kernel, launches = made()
    for _ in range(2):
        launches(5, tensors, (3, 1))
    assert kernel.calls == [((5,), (*tensors, 3, 1), {"SIZE": 4, "DTYPE": "f32", "num_warps": 4, "maxnreg": 255})]
    by_triton = Compiled()
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=None))  # which no machine needs here
    pointers = [t if t is None else t.data_ptr() for t in tensors]
    by_triton.run(5, 1, 1, 7, 17, ("packed",), None, None, None, *pointers, 3, 1, None, None)
    assert kernel.compiled.calls == by_triton.calls


def test_another_kind_is_compiled(cuda):
    """Another dtype, another absent tensor, another value of a number that Triton specializes on; not of one with a type."""
    kernel, launches = made()
    kinds = [((A, B), (3, 1)), ((B, B), (3, 1)), ((A, None), (3, 1)), ((None, A), (3, 1)), ((A, B), (3, 16))]
    for tensors, numbers in kinds * 2:
        launches(5, tensors, numbers)
    assert [call[1] for call in kernel.calls] == [(*tensors, *numbers) for tensors, numbers in kinds]
    launches(5, (A, B), (4, 1))
    assert len(kernel.calls) == len(kinds) and len(kernel.compiled.calls) == len(kinds) + 1


def test_a_kind_by_name_is_not_looked_at(cuda):
    """Each name is compiled once, whatever the dtypes: these are the caller's promise."""
    kernel, launches = made()
    for kind in ("one", "other") * 3:
        launches(5, (A, B), (3, 1), kind)
    assert (len(kernel.calls), len(kernel.compiled.calls)) == (2, 4)


@pytest.mark.parametrize("kind", (None, "by name"))
def test_a_launch_of_what_is_not_aligned_is_not_kept(kind, cuda):
    kernel, launches = made()
    for _ in range(2):
        launches(5, (A[1:], B), (3, 1), kind)
    assert (len(kernel.calls), len(kernel.compiled.calls)) == (2, 0)
    for _ in range(2):
        launches(5, (A, B), (3, 1), kind)
    assert (len(kernel.calls), len(kernel.compiled.calls)) == (3, 1)


def hooked(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])


def ended(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime.launch_exit_hook, "calls", [print])


def debugged(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)


def instrumented(monkeypatch):
    monkeypatch.setattr(triton.knobs.compilation, "instrumentation_mode", "fpsan")


def inspected(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda *args: ("", ""))


def elsewhere(monkeypatch):
    monkeypatch.setitem(CURRENT, 0, 1)


@pytest.mark.parametrize("unusual", (hooked, ended, debugged, instrumented, inspected, elsewhere, "unaligned", "pre-run hook"))
def test_what_is_unusual_goes_through_triton(unusual, cuda, monkeypatch):
    kernel, launches = made()
    for _ in range(2):
        launches(5, (A, B), (3, 1))
    tensors = A, B
    if unusual == "unaligned":
        tensors = A[1:], B
    elif unusual == "pre-run hook":
        kernel.pre_run_hooks.append(print)
    else:
        unusual(monkeypatch)
    for _ in range(2):
        launches(5, tensors, (3, 1))
    assert (len(kernel.calls), len(kernel.compiled.calls)) == (3, 1)


@pytest.mark.parametrize("attributes", ({"global_scratch_size": 8}, {"profile_scratch_size": 8}, {"gsan_enabled": True}))
def test_a_kernel_with_more_to_it_is_never_launched_directly(attributes, cuda):
    kernel, launches = made(**attributes)
    for _ in range(3):
        launches(5, (A, B), (3, 1))
    assert (len(kernel.calls), len(kernel.compiled.calls)) == (3, 0)


@pytest.mark.parametrize("version", ((3, 5), (3, 10), (4, 0)))
def test_an_unknown_triton_launches_by_itself(version, cuda, monkeypatch):
    monkeypatch.setattr(direct, "VERSION", version)
    kernel, launches = made()
    for _ in range(3):
        launches(5, (A, B), (3, 1))
    assert (len(kernel.calls), len(kernel.compiled.calls)) == (3, 0)


def test_no_programs_no_launch(cuda):
    kernel, launches = made()
    launches(0, (A, B), (3, 1))
    assert not kernel.calls


def test_booleans_are_compiled_as_bytes(cuda):
    kernel, launches = made()
    mask = torch.zeros(16, dtype=torch.bool)
    for _ in range(2):
        launches(5, (mask, B), (3, 1))
    assert kernel.calls[0][1][0].dtype == torch.uint8
    (call,) = kernel.compiled.calls
    assert mask.data_ptr() in (*call, *(call[-1] if isinstance(call[-1], tuple) else ()))


@pytest.fixture
def memory(cuda, monkeypatch):
    """What is made for a GPU is made here; whether a graph is captured."""
    captured = {"now": False}
    monkeypatch.setattr(prepared, "allocator", lambda device: functools.partial(direct._empty, torch.device("cpu")))
    monkeypatch.setattr(launch, "kept_scratch", {})
    monkeypatch.setattr(prepared, "kept_scratch", launch.kept_scratch)
    monkeypatch.setattr(launch, "raw_stream", lambda index: 7)
    new = launch._new_scratch
    monkeypatch.setattr(launch, "_new_scratch", lambda device, *sizes: new(torch.device("cpu"), *sizes))
    for module in (launch, prepared):
        monkeypatch.setattr(module, "is_capturing", lambda: captured["now"])
    return captured


def prepare(beta, **attributes):
    """A launch of 5 programs that takes `a` and `beta`, makes `made` and `out`, and adds up."""
    kernel = Kernel(summed, **attributes)
    launches = direct.Launch(kernel, CUDA, {"SIZE": 4}, {"num_warps": 4})
    ready = prepared.Prepared(
        launches, None, 5, takes={"a": A, "beta": beta, "unused": B}, rows=2, sums=5, values={"n": 3},
        makes={"made": ((2, 3), (1, 2), torch.float64), "out": ((), (), torch.float32)}, gives=("out", None, "a", "made"),
    )  # fmt: skip
    return kernel, ready


@pytest.mark.parametrize("beta", (0.5, torch.ones(4)), ids=("number", "tensor"))
def test_a_prepared_launch_passes_what_triton_passes(beta, memory, monkeypatch):
    kernel, ready = prepare(beta)
    found = [ready.run(A, beta, B) for _ in range(3)]
    for out, nothing, a, made in found:
        assert nothing is None and a is A
        assert (out.shape, out.dtype, made.shape, made.stride(), made.dtype) == (
            (), torch.float32, (2, 3), (1, 2), torch.float64
        )  # fmt: skip
    assert len({t.data_ptr() for out, _, _, made in found for t in (out, made)}) == 6
    ((grid, (a, made, out, pointer, partials, arrived, *numbers), options),) = kernel.calls
    assert (grid, a, out, made, options) == ((5,), A, found[0][0], found[0][3], {"SIZE": 4, "num_warps": 4})
    is_number = isinstance(beta, float)
    assert numbers == [beta if is_number else 1.0, 3] and pointer is (None if is_number else beta)
    assert partials.numel() >= 5 and arrived.numel() >= 2
    by_triton = Compiled()
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=None))  # which no machine needs here
    for out, _, _, made in found[1:]:
        pointers = [t if t is None else t.data_ptr() for t in (A, made, out, pointer, partials, arrived)]
        by_triton.run(5, 1, 1, 7, 17, ("packed",), None, None, None, *pointers, *numbers, None)
    assert kernel.compiled.calls == by_triton.calls
    known = [*attributes(ready), *ready.run.__globals__.items()]
    assert [name for name, value in known if holds_a_tensor(value)] == ["kept_scratch"]


@pytest.mark.parametrize("unusual", (hooked, ended, debugged, instrumented, inspected, elsewhere, "unaligned", "pre-run hook"))
def test_what_is_unusual_of_a_prepared_launch_goes_through_triton(unusual, memory, monkeypatch):
    kernel, ready = prepare(0.5)
    for _ in range(2):
        ready.run(A, 0.5, B)
    a = A
    if unusual == "unaligned":
        a = A[1:]
    elif unusual == "pre-run hook":
        kernel.pre_run_hooks.append(print)
    else:
        unusual(monkeypatch)
    for _ in range(2):
        assert ready.run(a, 0.25, B)[2] is a
    assert (len(kernel.calls), len(kernel.compiled.calls)) == (3, 1)
    assert kernel.calls[-1][1][0] is a and kernel.calls[-1][1][-2:] == (0.25, 3)


def test_a_prepared_launch_that_is_captured_has_memory_of_its_own(memory):
    """And is launched directly all the same; so has one that keeps no state."""
    kernel, ready = prepare(0.5)
    for _ in range(2):
        ready.run(A, 0.5, B)
    usual = kernel.compiled.calls[0]
    memory["now"] = True
    ready.run(A, 0.5, B)
    memory["now"] = False
    ready.by_parts(A, 0.5, B, stateless=True)
    ready.run(A, 0.5, B)
    flat = [[v for part in call for v in (part if isinstance(part, tuple) else (part,))] for call in kernel.compiled.calls]
    ((kept, *_),) = launch.kept_scratch.values()
    is_kept = [kept[0].data_ptr() in call and kept[1].data_ptr() in call for call in flat]
    assert len(kernel.calls) == 1 and usual is kernel.compiled.calls[0] and is_kept == [True, False, False, True]


def test_a_prepared_launch_takes_more_memory_where_there_is_too_little(memory):
    _, ready = prepare(0.5)
    for _ in range(2):
        ready.run(A, 0.5, B)
    (key,) = launch.kept_scratch
    for few in ((1, 4096), (4096, 1)):
        launch.kept_scratch[key] = (*launch.kept_scratch[key][:1], *few)
        ready.run(A, 0.5, B)
        assert min(launch.kept_scratch[key][1:]) >= 1024


def test_a_kernel_with_more_to_it_is_never_prepared(memory):
    kernel, ready = prepare(0.5, global_scratch_size=8)
    for _ in range(3):
        ready.run(A, 0.5, B)
    assert (len(kernel.calls), len(kernel.compiled.calls)) == (3, 0)


def test_no_parameter_has_a_name_that_written_code_uses(memory):
    _, ready = prepare(0.5)
    for _ in range(2):
        ready.run(A, 0.5, B)
    used = ready.run.__globals__.keys() - {"n", "beta_value"}
    assert {"launch", "grid", "empty", "made_shape"} <= used
    assert not [(name, p.name) for name, kernel in KERNELS.items() for p in kernel.params if p.name in used]


@pytest.mark.parametrize("name", KERNELS)
def test_tensors_come_first_then_numbers_then_constants(name):
    """And numbers have a type, so that none makes a kind of its own; but for the columns of the one kernel."""
    kernel = KERNELS[name]
    constant = [p.is_constexpr for p in kernel.params]
    assert constant == sorted(constant)
    tensors, special = direct._arguments(kernel)
    numbers = [p for p in kernel.params[tensors:] if not p.is_constexpr]
    assert all(p.annotation_type or name == "columns_kernel" for p in numbers)
    assert len(special) == (name == "columns_kernel")
    assert not any(p.annotation_type for p in kernel.params[:tensors])


def test_the_launcher_of_this_triton_is_a_known_one():
    """The two forms that `direct.launching` knows: with the signature passed along, and without."""
    source = inspect.getsource(CudaLauncher.__call__)
    assert ("self.kernel_signature" in source) == (direct.VERSION >= (3, 7))


def test_each_thread_has_memory_for_partial_sums_of_its_own():
    """Each stream, on a GPU."""
    device, found = torch.device("cpu"), []

    def work():
        found.append(launch.scratch(device, 4, 100, False))

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        work()
        thread.join()
    mine = launch.scratch(device, 4, 100, False)
    same = [partials is mine[0] and counters is mine[1] for partials, counters in found]
    assert same.count(True) == 2
    partials, counters = launch.scratch(device, 5000, 100_000, False)
    assert partials.numel() >= 100_000 and counters.numel() >= 5000 and not counters.any()
    assert launch.scratch(device, 4, 100, True)[0] is not launch.scratch(device, 4, 100, True)[0]


def test_what_launches_keeps_no_tensor():
    """A plan may be made while `torch.compile` warms a CUDA graph up, in whose pool of memory nothing may stay."""
    x, mu, one = torch.zeros(3, 8), torch.zeros(3, 2), torch.ones(1)
    options = {"per_sample": False, "dtype": torch.float32}
    made = [
        kernels.Loss((x, x, mu, mu), likelihood="mse", scale=1.0, target_scale=1.0, scales=(1.0, 1.0), **options),
        kernels.Sample(mu, mu, kl_scale=1.0, **options),
        kernels.Divergence(
            mu, mu, mu, mu, None, posterior="std", clamp=None, prior="std", kind="column", floor=None,
            free_bits=None, shares=(1.0, 1.0), kl_scale=1.0, dtype=torch.float32,
        ),
        kernels.Reconstruction(family=kernels.Family("laplace", links=(None, "scale")), device=x.device, **options),
        kernels.Categorical(classes=8, inner=1, ignore_index=-100, target_scale=1.0, device=x.device, **options),
    ]  # fmt: skip
    made.append(
        reconstruction.Pass(
            [x, x[0]], x, one, (True, True), kernels.Family("laplace", links=(None, "scale")), *options.values()
        )
    )
    found = [name for launches in made for name, value in attributes(launches) if holds_a_tensor(value)]
    assert len(made) == 6 and not found


def attributes(launches) -> list[tuple[str, object]]:
    names = (*getattr(launches, "__slots__", ()), *getattr(launches, "__dict__", ()))
    return [(f"{type(launches).__name__}.{name}", getattr(launches, name, None)) for name in names]


def holds_a_tensor(value) -> bool:
    if isinstance(value, direct.Launch):
        return any(holds_a_tensor(kept) for _, kept in attributes(value))
    if isinstance(value, dict):
        value = list(value.values())
    return any(map(holds_a_tensor, value)) if isinstance(value, tuple | list) else isinstance(value, torch.Tensor)
