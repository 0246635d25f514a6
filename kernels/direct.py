"""Repeated launches: what Triton has compiled is handed pointers without binding and specializing all arguments again.

`kernel[grid](...)` takes ten times as long as the launch itself. This is the only module that knows Triton's launcher, which is
private: of versions that it does not know, and wherever something is unusual, launches go through `kernel[grid]`.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from types import CodeType

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))

_current_device = getattr(torch._C, "_cuda_getDevice", lambda: -1)
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # the number of the current stream, without an object for it
_empty_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)

# Whether `gpu` is not the current one, or something wants to know of launches or of compilation: what Triton looks at, too,
# whenever it launches. Written into the code of each launch, where a call would take as long as all of it.
UNUSUAL = (
    "gpu != current_device() or kernel.pre_run_hooks or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls"
    " or runtime.debug or runtime.add_stages_inspection_hook is not None or compilation.instrumentation_mode"
)
_is_unusual = compile(UNUSUAL, __file__, "eval")


def allocator(device: torch.device) -> Callable[..., torch.Tensor]:
    """`empty(shape, strides, dtype)` for new tensors on a device: on the current GPU, what compiled code allocates with."""
    # A CPU has no index; without a driver a CUDA build of Torch raises where it is asked for the current GPU.
    if device.index is not None and device.index == _current_device() and _empty_cuda is not None:
        return _empty_cuda
    return functools.partial(_empty, device)


def lies(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides, to allocate others that lie as this one."""
    return tuple(tensor.shape), tensor.stride()


def _empty(device: torch.device, shape, strides, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def dtype_of(tensor: torch.Tensor | None) -> torch.dtype | None:
    """For a launch's kind: that of a tensor which may be absent. Where a call would show in a step's time it is written out."""
    return None if tensor is None else tensor.dtype


class Launch:
    """A kernel with its constants on a device, for many launches.

    A kernel's arguments are tensors, each of which may be None, then numbers, then constants. What is compiled depends on which
    tensors there are, on their dtypes and alignment, and on the numbers that Triton specializes on or has no type for. The
    first launch of a kind goes through `kernel[grid]`, which compiles; so does each with tensors that are not aligned, with
    hooks on launches or on compilation, in debug or instrumentation mode, or on a device that is not the current one.
    """

    __slots__ = "constants", "device", "handles", "kernel", "options", "special", "tensors"

    def __init__(self, kernel, device: torch.device, constants: dict, options: dict) -> None:
        self.kernel, self.device, self.constants, self.options = kernel, device, constants, options
        self.handles: dict[Hashable, Callable] | None = None  # by kind; None where nothing is launched directly
        self.tensors, self.special = 0, ()  # how many of the arguments are tensors; places of numbers that are part of a kind
        if device.type == "cuda" and not INTERPRETED:
            self.handles, self.tensors, self.special = {}, *_arguments(kernel)

    def __call__(
        self, programs: int, tensors: Sequence[torch.Tensor | None], numbers: Sequence[float], kind: Hashable = None
    ) -> None:
        """Launch so many programs; no programs, no launch.

        `kind`: a name for which tensors there are and for their dtypes, of a caller that knows them: one name, one such kind.
        None: they are looked at, which takes as long as the launch itself.
        """
        if programs == 0:
            return
        handles = self.handles
        if handles is None:
            self.by_triton(programs, tensors, numbers)
            return
        if kind is None:
            kind = *[t if t is None else t.dtype for t in tensors], *[numbers[i] for i in self.special]
        handle = handles.get(kind)
        if handle is not None and handle(programs, tensors, numbers):
            return
        compiled = self.by_triton(programs, tensors, numbers)
        if handle is None and not any(t is not None and t.data_ptr() % 16 for t in tensors):
            handle = self._handle(compiled, tensors, numbers)
            if handle is not None:
                if len(handles) >= LIMIT:
                    handles.clear()
                handles[kind] = handle

    def by_triton(self, programs: int, tensors, numbers):
        """On its device, whichever is current."""
        tensors = [t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in tensors]
        if self.device.type != "cuda" or self.device.index == torch.cuda.current_device():
            return self.kernel[(programs,)](*tensors, *numbers, **self.constants, **self.options)
        with torch.cuda.device(self.device):
            return self.kernel[(programs,)](*tensors, *numbers, **self.constants, **self.options)

    def _handle(self, compiled, tensors, numbers) -> Callable[..., bool] | None:
        """`handle(programs, tensors, numbers)` launches what Triton has compiled for tensors that are there like these; it does
        nothing and returns False if one is not aligned, or if the launch is unusual. None where it is not known how to."""
        if torch.version.hip or not (3, 6) <= VERSION <= (3, 9):
            return None
        run = compiled.run
        if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
            return None
        known = {
            "launch": run.launch, "function": compiled.function, "cooperative": run.launch_cooperative_grid,
            "pdl": run.launch_pdl, "metadata": compiled.packed_metadata, "gpu": self.device.index, "kernel": self.kernel,
            "rest": (None,) * (len(self.kernel.params) - len(tensors) - len(numbers)), "runtime": triton.knobs.runtime,
            "compilation": triton.knobs.compilation, "current_device": _current_device, "raw_stream": raw_stream,
        }  # fmt: skip
        if VERSION > (3, 6):
            known |= {"annotations": run.arg_annotations, "signature": run.kernel_signature}
        if eval(_is_unusual, known):
            return None
        exec(_written(tuple(t is not None for t in tensors)), known)
        return known["handle"]

    def written(self, kind: Hashable, code: CodeType, names: dict) -> Callable:
        """The function `run` that is defined by `code`, with `names`, a `launching` of this kind, which has a handle, and what
        that needs."""
        known = self.handles[kind].__globals__ | names
        exec(code, known)
        return known["run"]


LIMIT = 1024  # kinds of a launch: numbers that are specialized on may be many


def _arguments(kernel) -> tuple[int, tuple[int, ...]]:
    """How many arguments are tensors; the places, among the numbers behind them, of those that are part of what is compiled."""
    given = [p for p in kernel.params if not p.is_constexpr]
    tensors = next((i for i, p in enumerate(given) if p.annotation_type or p.do_not_specialize), len(given))
    fixed = [p.annotation_type == "fp64" or (p.annotation_type and p.do_not_specialize) for p in given[tensors:]]
    return tensors, tuple(i for i, is_fixed in enumerate(fixed) if not is_fixed)


def launching(programs: str, arguments: Sequence[str]) -> str:
    """The line of code that launches so many programs on `stream` with these arguments, which are pointers and numbers."""
    given = ", ".join((*arguments, "*rest"))
    behind = f"None, None, metadata, None, None, None, {given}"
    if VERSION > (3, 6):
        behind = f"metadata, None, None, None, None, None, annotations, signature, ({given})"
    return f"    launch({programs}, 1, 1, stream, function, cooperative, pdl, {behind})"


@functools.cache
def _written(present: tuple[bool, ...]) -> CodeType:
    """The code of a launch, which has a line for each tensor: to go through them in a loop takes twice the time."""
    pointers = [f"p{i}" if is_there else "None" for i, is_there in enumerate(present)]
    there = [p for p in pointers if p != "None"]
    lines = [
        "def handle(programs, tensors, numbers):",
        f"    if {UNUSUAL}:",
        "        return False",
        f"    {', '.join(f't{i}' for i in range(len(present)))}, = tensors",
        *(f"    {p} = t{p[1:]}.data_ptr()" for p in there),
        f"    if ({' | '.join(there) or 0}) & 15:",
        "        return False",
        "    stream = raw_stream(gpu)",
        launching("programs", [*pointers, "*numbers"]),
        "    return True",
    ]
    return compile("\n".join(lines), __file__, "exec")
