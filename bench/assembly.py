"""What a compiled kernel does: bytes by argument from its TTGIR, accesses and instructions by loop from its assembly.

TTGIR is Triton's last form of a kernel in which accesses are whole tiles and go back to arguments. NVIDIA's assembly is SASS,
which `cuobjdump` takes from the binary: PTX says little of what `ptxas` makes of it.
"""

import collections
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from typing import NamedTuple

import triton

ITEM_BYTES = {"i1": 1, "i8": 1, "bf16": 2, "f16": 2, "i32": 4, "f32": 4, "i64": 8, "f64": 8}


class Access(NamedTuple):
    """One load or store of the TTGIR."""

    kind: str  # "load" or "store"
    argument: str
    tile_bytes: int
    regions: tuple[str, ...]  # what it stands in, from the outside: "for" or "if"

    @property
    def looped(self) -> bool:
        return "for" in self.regions


def accesses(compiled) -> list[Access]:
    """All loads and stores of tiles, in their order; those of single numbers are left out."""
    origin, regions, found = {}, [], []
    for line in compiled.asm["ttgir"].splitlines():
        if "tt.func" in line:
            origin = {f"%{name}": name for name in re.findall(r"%(\w+): !tt\.ptr<", line)}
        line = line.split(" loc(")[0].strip()
        if match := re.match(r"(%[\w#]+) = (?:tt\.splat|tt\.addptr|tt\.bitcast|ttg\.convert_layout) (%[\w#]+)", line):
            origin[match[1]] = origin.get(match[2])
        # On AMD, accesses through buffers name the argument itself.
        if match := re.search(r"(?:tt\.|amdg\.buffer_|amdgpu\.buffer_)(load|store) (.*)", line):
            shape = re.search(r"tensor<((?:\d+x)+)(?:!tt\.ptr<)?(\w+)", match[2])
            pointer = next(name for name in re.findall(r"%[\w#]+", match[2]) if origin.get(name))
            if shape:
                size = math.prod(map(int, shape[1].split("x")[:-1])) * ITEM_BYTES[shape[2]]
                found.append(Access(match[1], origin[pointer], size, tuple(filter(None, regions))))
        for brace in re.findall(r"[{}]", line):
            if brace == "}":
                regions[-1:] = []
            elif "else" in line:
                regions.append("if")
            else:
                opened = re.search(r"scf\.(for|if)\b.*{$", line)
                regions.append(opened[1] if opened else "")
    return found


class Loop(NamedTuple):
    """The instructions of a loop, one string each."""

    instructions: list[str]

    def widths(self) -> dict[str, collections.Counter]:
        """Of accesses to global memory, "load" and "store": bits -> instructions."""
        widths = {"load": collections.Counter(), "store": collections.Counter()}
        for text in self.instructions:
            if found := _NVIDIA_ACCESS.search(text):
                widths["load" if found[1] == "LD" else "store"][_NVIDIA_BITS.get(found[2], 32)] += 1
            elif found := _AMD_ACCESS.match(text):
                widths[found[1]][_AMD_BITS[found[2]]] += 1
        return widths

    def opcodes(self) -> collections.Counter:
        """Instructions by their names: "FFMA", "MUFU.EX2", "v_fma_f32", ..."""
        return collections.Counter(re.sub(r"^@!?U?P\w+ +", "", text).split()[0].rstrip(";") for text in self.instructions)


_NVIDIA_ACCESS = re.compile(r"\b(LD|ST)G\.E(?:\.\w+?)??(?:\.(U8|S8|U16|S16|64|128))?\b")
_NVIDIA_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(\w+?)(?:_d16\w*)?(?:\s|$)")
_AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8, "byte": 8}


class Machine(NamedTuple):
    """A kernel's assembly."""

    loops: list[Loop]  # over tiles; the sum over other programs' partial sums is not among them
    registers: int  # a thread's
    spilled_bytes: int  # in local memory or on the stack


def machine(compiled) -> Machine:
    return _nvidia(compiled.asm["cubin"]) if "cubin" in compiled.asm else _amd(compiled.asm["amdgcn"])


def spilled_bytes(compiled) -> int:
    """That of `machine`, without the assembly of NVIDIA's, which takes longest."""
    if "cubin" in compiled.asm:
        return _nvidia_usage(_cuobjdump(compiled.asm["cubin"], "--dump-resource-usage"))[1]
    return _amd(compiled.asm["amdgcn"]).spilled_bytes


def _cuobjdump(cubin: bytes, *options: str) -> str:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def _nvidia_usage(text: str) -> tuple[int, int]:
    """Registers of a thread, and bytes spilled."""
    return int(re.search(r"REG:(\d+)", text)[1]), sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", text)))


def _nvidia(cubin: bytes) -> Machine:
    sass = _cuobjdump(cubin, "-sass", "--dump-resource-usage")
    listing = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +(\S[^;]*);", sass)]
    loops = {}  # by where they start, to the last branch back there
    for end, text in listing:
        target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if target and (start := int(target[1], 16)) < end:
            loops[start] = Loop([text for address, text in listing if start <= address <= end])
    # Loads of what other programs wrote are the only strong ones.
    return Machine(_with_stream(loops.values(), "STRONG"), *_nvidia_usage(sass))


def _amd(text: str) -> Machine:
    # LLVM says of each block which loop it is in: a loop's blocks need not stand together, nor behind its header.
    around, blocks = {}, []  # the loops around each loop, which is named by its header; the loop and instructions of each block
    for block in re.split(r"^(?=\.LBB\w+:|; %bb\.)", text, flags=re.MULTILINE):
        loop = re.search(r"in Loop: Header=(BB\w+)", block)
        if "Loop Header: Depth" in block:
            loop = re.match(r"\.L(BB\w+)", block)
            around[loop[1]] = re.findall(r"Parent Loop (BB\w+)", block)
        if loop:
            lines = (line.split(";")[0].strip() for line in block.splitlines())
            blocks.append((loop[1], [line for line in lines if re.match(r"[a-z]\w+_", line)]))
    loops = {name: Loop([line for at, lines in blocks if name in (at, *around[at]) for line in lines]) for name in around}
    # Scalar registers spill into lanes of vector registers, not into memory.
    spilled = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
    return Machine(_with_stream(loops.values(), "sc0 nt"), registers, sum(map(int, spilled)))


def _with_stream(loops: Iterable[Loop], partial_sums: str) -> list[Loop]:
    return [
        loop for loop in loops if any(loop.widths().values()) and not any(partial_sums in text for text in loop.instructions)
    ]
