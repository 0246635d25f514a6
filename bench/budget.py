"""`python -m bench.budget`: what the compiled kernels cost, and whether memory or instructions bound them. Needs no GPU."""

import argparse
import collections
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from fastelbo.kernels.launch import PROGRAMS, THREADS
from fastelbo.likelihoods import BY_NAME

from . import compiled
from .assembly import Loop, Machine, machine
from .cases import LIKELIHOODS
from .compiled import Launch, compile_for
from .traffic import BUDGET, GAUSSIAN, LATENTS, LIKE, PARAMETERS, PRIOR, RECONSTRUCTION, Stream

KEPT = Path(__file__).parent / "results" / "budget.md"

F32, F16, BF16, F64, U8 = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8
PAIRS = ((F32, F32), (F16, F16), (BF16, F32), (BF16, U8), (F64, F64))  # prediction, target

# Of several parameters as large as the target: the likelihood, the links of the first two, dtypes of the parameters, the
# target's and the weights'.
SEVERAL = (
    ("gaussian", (None, "logvar"), (F32, F32), F32, None),
    ("gaussian", (None, "log_scale"), (BF16, BF16), F32, None),
    ("laplace", (None, "scale"), (F32, F32), F32, None),
    ("student_t", (None, "log_scale"), (F32, F32), F32, None),
    ("discretized_logistic", (None, "log_scale"), (F32, F32), F32, None),
    ("negative_binomial", (None, None), (F32, F32), F32, None),
    ("negative_binomial", (None, None), (BF16, BF16), F32, None),
    ("negative_binomial", ("log", "log"), (F32, F32), F32, None),
    ("negative_binomial", ("softplus", "log"), (F32, F32), F32, None),
    ("zero_inflated_negative_binomial", (None, None), (F32, F32, F32), F32, None),
    ("zero_inflated_negative_binomial", ("log", "log"), (F32, F32, F32), F32, None),
    ("bernoulli", (None, None), (F32,), F32, U8),
    ("bernoulli_logits_weighted", (None, None), (F32, F32), F32, None),
)


SPARSE = (
    ("poisson", (None, None), (F32,)),
    ("poisson_log", (None, None), (F32,)),
    ("poisson_softplus", (None, None), (F32,)),
    ("bernoulli_logits", (None, None), (F32,)),
    ("negative_binomial", (None, None), (F32, F32)),
    ("negative_binomial", ("softplus", "log"), (F32, F32)),
    ("zero_inflated_negative_binomial", (None, None), (F32, F32, F32)),
)  # of which the target is not read


# Of means by the softmax of a row: the link of the second parameter, and dtypes as above.
ROWS = (
    ("poisson_of_both", None, (F32,), F32),
    ("negative_binomial", "log", (F32, F32), F32),
    ("negative_binomial", "log", (BF16, BF16), F32),
    ("zero_inflated_negative_binomial", "log", (F32, F32, F32), F32),
)


class Device(NamedTuple):
    """A product of an architecture. Rates: operations of a multiprocessor (compute unit) a clock, by kind."""

    name: str
    multiprocessors: int
    gigahertz: float
    gigabytes_per_second: float
    rates: dict[str, int]

    def memory_clocks(self, size: int) -> float:
        """Clocks in which memory can move so many bytes for each multiprocessor, with all of them at work."""
        return size * self.multiprocessors * self.gigahertz / self.gigabytes_per_second

    def instruction_clocks(self, operations: collections.Counter) -> float:
        """Clocks that a multiprocessor needs for so many operations of each kind, which overlap."""
        return max(count / self.rates[kind] for kind, count in operations.items())


# Multiprocessors, highest clocks and bandwidths: the products' white papers and data sheets. Rates: the tables of arithmetic
# throughput in NVIDIA's CUDA programming and best practices guides; AMD's CDNA 3 white paper, and LLVM's model of it for what
# runs at a quarter of the rate. Where they leave doubt (integers on sm_100), the lower rate stands.
NVIDIA = {"issue": 128, "float32": 128, "integer": 64, "special": 16, "float64": 64}
DEVICES = {
    "sm_80": Device("A100 SXM 80 GB", 108, 1.410, 2039, NVIDIA | {"float32": 64, "float64": 32}),
    "sm_90": Device("H100 SXM5", 132, 1.980, 3352, NVIDIA),
    "sm_100": Device("B200", 148, 1.965, 8000, NVIDIA),
    "gfx942": Device("MI300X", 304, 2.100, 5300, {"issue": 64, "special": 16}),
}

# Instructions by the beginnings of their names.
SPECIAL = re.compile(r"MUFU|F2F\b|F2I|I2F\b|FRND|v_(exp|log|rcp|rsq|sqrt|sin|cos)_|v_mul_(lo|hi)_[iu]32")
FLOAT64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)|.*[Ff]64")
FLOAT32 = re.compile(r"F(ADD|MUL|FMA)(2?)\b")
ELSEWHERE = re.compile(r"LD|ST|BRA|BAR|LDC|ULDC|U[A-Z]|s_|ds_|buffer_|global_|flat_")  # not in a vector unit


def operations(loop: Loop) -> collections.Counter:
    """How often a thread issues an instruction in a turn of the loop, and how many operations of each kind these are."""
    counts = collections.Counter()
    for opcode, count in loop.opcodes().items():
        if opcode.startswith("v_"):
            special = bool(SPECIAL.match(opcode))
            counts["issue"] += 4 * count if special else count  # it holds the vector unit for as long
            counts["special"] += count * special
        elif not opcode[0].islower():
            counts["issue"] += count
            if SPECIAL.match(opcode):
                counts["special"] += count
            elif FLOAT64.match(opcode):
                counts["float64"] += count
            elif match := FLOAT32.match(opcode):
                counts["float32"] += count * int(match[2] or 1)
            elif not ELSEWHERE.match(opcode):
                counts["integer"] += count
    return counts


REGISTERS, WARP_REGISTERS = 65536, 8  # of a multiprocessor of sm_80 to sm_100, and by how many a thread is given them


class Kernel(NamedTuple):
    """A launch, and what the budget says of it."""

    name: str
    launch: Launch
    streams: tuple[Stream, ...]
    dtypes: dict[str, torch.dtype]  # of the streamed arguments
    tail: bool = True  # a row's last few elements are accessed outside of the loops

    @property
    def block(self) -> int:
        return self.launch.options["BLOCK" if "BLOCK" in self.launch.options else "CLASSES"]

    def tile_bytes(self, stream: Stream) -> dict[tuple[str, str], int]:
        """("load" or "store", argument) -> bytes of a tile."""
        return {
            (kind, name): self.block * self.dtypes[name].itemsize
            for kind, names in (("load", stream.reads), ("store", stream.writes))
            for name in names
        }

    def widths(self, stream: Stream) -> dict[str, collections.Counter]:
        """What a thread loads and stores of a tile: bits -> accesses, 128 at a time where it has as many."""
        widths = {"load": collections.Counter(), "store": collections.Counter()}
        for (kind, _), size in self.tile_bytes(stream).items():
            width = min(size // THREADS, 16)
            widths[kind][8 * width] += size // THREADS // width
        for name in stream.numbers:
            widths["load"][8 * self.dtypes[name].itemsize] += 1
        return widths

    def loop(self, stream: Stream, loops: list[Loop]) -> Loop:
        """The loop that makes a stream's accesses and no others."""
        found = [loop for loop in loops if loop.widths() == self.widths(stream)]
        assert len(found) == 1, f"{self.name}: not one loop with {self.widths(stream)}: {[loop.widths() for loop in loops]}"
        return found[0]

    def bytes_per_element(self, stream: Stream) -> int:
        return sum(self.tile_bytes(stream).values()) // self.block

    def bytes_in_flight(self, stream: Stream, registers: int) -> int:
        """Bytes that the programs on a multiprocessor load at once, as many as have room for their registers."""
        rounded = -(-registers // WARP_REGISTERS) * WARP_REGISTERS
        programs = min(REGISTERS // (rounded * THREADS), PROGRAMS)
        return programs * sum(size for (kind, _), size in self.tile_bytes(stream).items() if kind == "load")


def kernels() -> Iterator[Kernel]:
    """Every primitive of the budget, for each likelihood and dtype."""
    others = (name for name, record in BY_NAME.items() if record.is_plain(1) and name not in LIKELIHOODS)
    for likelihood in (*LIKELIHOODS, *others, "poisson_softplus"):
        # The others differ by their device functions alone.
        for prediction, target in PAIRS if likelihood in LIKELIHOODS else PAIRS[:1]:
            latent = F64 if prediction == F64 else F32
            given = likelihood, prediction, target, latent
            launches = [("loss forward", compiled.loss_forward(*given))]
            if likelihood in LIKELIHOODS:
                launches += [
                    ("loss forward, kl given, no gradient", compiled.loss_forward(*given, gradient=False, kl=True)),
                    ("loss backward, another factor", compiled.loss_backward(*given)),
                ]
            for primitive, launch in launches:
                dtypes = {"prediction": prediction, "target": target, "mu": latent, "logvar": latent}
                yield _kernel(primitive, f"{likelihood} {_name(prediction)} {_name(target)}", launch, dtypes)
    for likelihood, links, parameters, target, weight in SEVERAL:
        for primitive, guess in (("reconstruction forward", None), ("reconstruction backward, another factor", torch.ones(1))):
            launch = compiled.reconstruction(likelihood, *parameters, target=target, links=links, weight=weight, guess=guess)
            dtypes = dict(zip(PARAMETERS, parameters, strict=False)) | {"target": target}
            dtypes |= {"weight": weight} if weight else {}
            stream = Stream(tuple(dtypes), tuple(f"grad_{name}" for name in PARAMETERS[: len(parameters)]))
            kind = f"{likelihood} {' '.join(map(_name, (*parameters, target)))}" + (" weighted" if weight else "") + _of(links)
            yield _kernel(primitive, kind, launch, dtypes, (stream,))
    for likelihood, links, parameters in SPARSE:
        for primitive, guess in (("sparse forward", None), ("sparse backward, another factor", torch.ones(1))):
            zeros, _ = compiled.sparse(likelihood, *parameters, links=links, guess=guess)
            dtypes = dict(zip(PARAMETERS, parameters, strict=False))
            stream = Stream(tuple(dtypes), tuple(f"grad_{name}" for name in dtypes))
            kind = f"{likelihood} {' '.join(map(_name, parameters))}, zeros{_of(links)}"
            # Its sums are in float64.
            yield _kernel(primitive, kind, zeros, dtypes | ({"recon": F64} if guess is None else {}), (stream,))
    for dtype in (F32, BF16, F64):
        launch, _ = compiled.of_rows("poisson_of_both", dtype)
        yield _kernel("softmax of rows", _name(dtype), launch, {"logits": dtype}, (Stream(("logits",)),))
    for likelihood, link, parameters, target in ROWS:
        dtypes = dict(zip(PARAMETERS, parameters, strict=False)) | {"target": target}
        writes = tuple(f"grad_{name}" for name in PARAMETERS[: len(parameters)])
        kind = f"{likelihood} {' '.join(map(_name, (*parameters, target)))}"
        _, forward = compiled.of_rows(likelihood, *parameters, target=target, dispersion=link)
        (backward,) = compiled.of_rows(likelihood, *parameters, target=target, dispersion=link, backward=True)
        yield _kernel("reconstruction forward, of rows", kind, forward, dtypes, (Stream(tuple(dtypes)),))
        yield _kernel("reconstruction backward, of rows", kind, backward, dtypes, (Stream(tuple(dtypes), writes),))
    for dtype in (F32, BF16, F64):
        dtypes = {"mu": dtype, "logvar": dtype}
        yield _kernel("sample forward", _name(dtype), compiled.sample_forward(dtype), dtypes)
        yield _kernel("sample backward", _name(dtype), compiled.sample_backward(dtype), dtypes)
    dtypes = dict.fromkeys((*LATENTS, *PRIOR), F32)
    for step, launch in (("forward", compiled.divergence_forward), ("backward", compiled.divergence_backward)):
        for parameter in ("log_std", "std", "var"):
            yield _kernel(f"sample {step}", f"float32 {parameter}", launch(F32, posterior=parameter), dtypes)
        for parameter in ("logvar", "log_std", "std", "var"):
            prior = launch(F32, posterior=parameter, prior=parameter)
            yield _kernel(f"sample {step}, prior", f"float32 {parameter}", prior, dtypes)
        normal = launch(F32, posterior="logvar", prior="std")
        yield _kernel(f"sample {step}, prior", "float32 logvar, of a Normal", normal, dtypes)
        for weight in (F32, U8):
            weighted = launch(F32, weight=torch.ones(128, 64, dtype=weight))
            kind = f"float32 logvar, {_name(weight)}"
            yield _kernel(f"sample {step}, weights", kind, weighted, dtypes | {"kl_weight": weight})
    dtypes = dict.fromkeys((*GAUSSIAN, *PRIOR, "grad_log_q", "grad_log_p", "path_scale"), F32)
    for step, launch in (("forward", compiled.log_ratio_forward), ("backward", compiled.log_ratio_backward)):
        for suffix, prior in (("", None), (", prior", "logvar")):
            yield _kernel(f"log ratio {step}{suffix}", "float32", launch(F32, prior=prior), dtypes)._replace(tail=False)
    # A target of fewer rows than the prediction, of which it has several samples.
    for prediction, target in ((F32, F32), (BF16, U8)):
        given = "bernoulli_logits", prediction, target
        dtypes, kind = {"prediction": prediction, "target": target}, f"samples {_name(prediction)} {_name(target)}"
        streams = (Stream(RECONSTRUCTION, ("gradient",)),)
        options = {"per_sample": True, "kl": True, "samples": 8}
        yield _kernel("loss forward, kl given", kind, compiled.loss_forward(*given, **options), dtypes, streams)
        launch = compiled.loss_backward(*given, latents=False, **options)
        yield _kernel("loss backward, another factor, kl given", kind, launch, dtypes, streams)


def of_items() -> Iterator[Kernel]:
    """Those of multinomials whose rows do not fit in one tile, whose loops are within one over rows: beside what a dense target
    has, those of a sparse one gather in loops of their own."""
    for dtype in (F32, BF16):
        for kind, target, launch in (
            ("multinomial", ("x",), compiled.categorical(512, 20_000, dense=True, dtype=dtype)),
            ("multinomial of CSR", (), compiled.sparse_multinomial(512, 20_000, dtype=dtype)),
        ):
            dtypes = {"prediction": dtype, "gradient": dtype, "x": F32}
            for step, writes in (("sums", ()), ("gradient", ("gradient",))):
                stream = Stream(("prediction", *target), writes)
                yield Kernel(f"{kind}, {step}: {_name(dtype)}" + " float32" * bool(target), launch, (stream,), dtypes)


@functools.cache
def by_name() -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in kernels()}


@functools.cache
def in_table() -> dict[str, Kernel]:
    return by_name() | {kernel.name: kernel for kernel in of_items()}


@functools.cache
def code_of(name: str, target: str):
    return compile_for(target, in_table()[name].launch)


@functools.cache
def machine_of(name: str, target: str) -> Machine:
    return machine(code_of(name, target))


def _kernel(primitive: str, kind: str, launch: Launch, dtypes: dict[str, torch.dtype], streams=None) -> Kernel:
    dtypes = dtypes | {name: dtypes[like] for name, like in LIKE.items() if like in dtypes}
    return Kernel(f"{primitive}: {kind}", launch, streams or BUDGET[primitive], dtypes)


def _of(links: tuple[str | None, str | None]) -> str:
    """Where the first parameter has one."""
    return f", by {' and '.join(links)}" if links[0] else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


LEGEND = """\
What a pass of a kernel's loop costs for each element, compiled ahead of time (no GPU was used). Bytes: loaded and stored. Then,
for each architecture: instructions / those of the special function unit / the time they take over the time that memory takes to
move the bytes, by the published rates of the product named. Memory is the bound, except in bold: there instructions are."""


def table() -> str:
    header = ["loop", "bytes", *(f"{target}: {device.name}" for target, device in DEVICES.items())]
    lines = [f"Triton {triton.__version__}.", "", LEGEND, "", _line(header), _line(["---"] * len(header))]
    for title, kernel, stream in loops(in_table().values()):
        costs = [cost(kernel, stream, target) for target in DEVICES]
        lines.append(_line([title, str(kernel.bytes_per_element(stream)), *costs]))
    return "\n".join(lines) + "\n"


def loops(kernels: Iterable[Kernel]) -> Iterator[tuple[str, Kernel, Stream]]:
    """The rows of the table that are about these, by their titles."""
    seen = set()
    for kernel in kernels:
        for stream in kernel.streams:
            title = kernel.name
            if stream.reads == LATENTS and len(kernel.streams) > 1:
                # The same loop for every likelihood.
                title = f"{kernel.name.partition(':')[0]}: KL {_name(kernel.dtypes['mu'])}"
            elif stream.numbers and not stream.writes:
                title += ", each further sample"
            if title not in seen:
                seen.add(title)
                yield title, kernel, stream


def cost(kernel: Kernel, stream: Stream, target: str) -> str:
    device, elements = DEVICES[target], kernel.block // THREADS
    counts = operations(kernel.loop(stream, machine_of(kernel.name, target).loops))
    share = device.instruction_clocks(counts) / device.memory_clocks(elements * kernel.bytes_per_element(stream))
    text = f"{share:.2f}" if share < 1 else f"**{share:.2f}**"
    return f"{counts['issue'] / elements:.0f} / {counts['special'] / elements:.1f} / {text}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.budget", description=__doc__.partition(": ")[2])
    parser.add_argument("--write", action="store_true", help="also write it to bench/results/budget.md")
    options = parser.parse_args()
    text = table()
    print(text)
    if options.write:
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(text)


if __name__ == "__main__":
    main()
