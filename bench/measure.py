"""How it is measured: contenders in turns, on one clock, next to a copy; then memory and kernels."""

import ctypes
import gc
import itertools
import math
import random
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from .cases import Case
from .subjects import Step, Streams

CONTENDERS = ("eager", "compiled", "fastelbo", "fastelbo compiled")
SAMPLE = 2e-3  # seconds: a call is repeated until a sample lasts as long, so that starting and stopping the clock is nothing
ROUNDS = (7, 200)  # at least, at most


class Timing(NamedTuple):
    """One contender of a case."""

    seconds: list[float]  # a call, one number a round
    peak_bytes: int | None  # above the inputs
    kernels: int | None  # on CUDA


class Measured(NamedTuple):
    """A case. Rounds correspond across contenders and the copy."""

    timings: dict[str, Timing]
    missing: dict[str, str]  # contender -> why it did not run
    copy_seconds: list[float]  # of one copy of the prediction, or of the latents; none for training steps
    copy_bytes: int  # read and written by it
    least_bytes: int | None  # that the case has to read and write


def measure(case: Case, device: torch.device, seconds: float, compiles: bool = True) -> Measured:
    """Time all contenders on a case, those that have to be compiled only if asked for, for about so many seconds. They must
    agree first."""
    torch.compiler.reset()  # or the limit of recompilations would turn compiled contenders into eager ones
    settle(device)
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    subject = (Step if case.subject == "step" else Streams)(case, device, cache_bytes)
    contenders, missing, expected = {}, {}, None
    for name in CONTENDERS:
        compiled, function = name.endswith("compiled"), subject.fused if name.startswith("fastelbo") else subject.naive
        if compiled and not compiles:
            continue
        calls = subject.bind(torch.compile(function, fullgraph=True, dynamic=False) if compiled else function)
        try:
            found = subject.results(calls[0])
        except Exception as error:
            if not compiled:
                raise
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"  # no C++ compiler, for one
            continue
        expected = expected or found
        _check_agreement(f"{case.id}: {name}", found, expected)
        contenders[name] = in_turn(calls)
        if device.type == "cuda" and case.mode != "varying":  # a replay cannot be given another factor
            contenders[f"{name}, graph"] = in_turn(_captured(calls))
    copies = subject.copies()
    samples = interleaved(contenders | ({"copy": in_turn(copies)} if copies else {}), device, seconds)
    copy_seconds = samples.pop("copy", [])
    timings = {}
    for name, times in samples.items():
        subject.clear()
        if name.endswith("graph"):
            timings[name] = Timing(times, None, None)
        else:
            peak = peak_bytes(contenders[name], device)
            timings[name] = Timing(times, peak, count_kernels(contenders[name]) if device.type == "cuda" else None)
    return Measured(timings, missing, copy_seconds, subject.copy_bytes, subject.least_bytes)


TRIM, MMAP = -1, -3  # glibc's names for numbers: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD


def settle(device: torch.device) -> None:
    """glibc keeps what is freed, as it comes to do in a training loop, for blocks of up to 32 MB. Else some contenders pay more
    for page faults than for arithmetic, and others nothing."""
    if device.type != "cpu" or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP, 2**25)
        mallopt(TRIM, 2**30)


def share_a_core() -> bool:
    """Whether threads of Torch stand on one core just now: then an operator that they share takes a time slice of the system,
    some milliseconds, where it is waited for, instead of some microseconds."""
    if torch.get_num_threads() == 1:
        return False
    probe = torch.ones(2**18)
    start = time.perf_counter()
    torch.neg(probe, out=probe)
    return time.perf_counter() - start > 2e-3


def interleaved(contenders: dict[str, Callable], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds a call of each contender: one sample each a round, in random order, for `seconds` in all."""
    repeats, round_seconds = {}, 0.0
    for name, call in contenders.items():
        once = min(_sample(call, 1, device) for _ in range(5))
        repeats[name] = math.ceil(SAMPLE / once)
        round_seconds += (repeats[name] + 1) * once
    samples = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        rounds = min(max(int(seconds / round_seconds), ROUNDS[0]), ROUNDS[1])
        for tried in range(2 * rounds):
            if len(samples[order[0]]) == rounds:
                break
            shuffle(order)
            found = {}
            for name in order:
                contenders[name]()  # what the one before has left in caches and allocators is not this one's
                found[name] = _sample(contenders[name], repeats[name], device)
            if tried < rounds and device.type == "cpu" and share_a_core():
                continue  # as what it was timed on is not what it is about
            for name in order:
                samples[name].append(found[name])
    finally:
        gc.enable()
    return samples


def _sample(call: Callable, repeats: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(calls: list[Callable]) -> Callable[[], None]:
    """One call after the other: on CUDA, the inputs of each have left the cache when it comes round again."""
    following = itertools.cycle(calls)

    def call() -> None:
        next(following)()

    return call


def _captured(calls: list[Callable]) -> list[Callable]:
    """Each call as the replay of a CUDA graph."""
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graphs = []
    for call in calls:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool, stream=stream):
            call()
    return [graph.replay for graph in graphs]


def _check_agreement(name: str, found: list, expected: list) -> None:
    for (value, tolerance), (reference, _) in zip(found, expected, strict=True):
        difference = ((value - reference).abs().max() / reference.abs().max()).item()
        if not difference <= tolerance:  # or NaN
            raise AssertionError(f"{name} computes something else: off by {difference:.1e}, {tolerance:.1e} allowed")


def peak_bytes(call: Callable, device: torch.device) -> int:
    """The most memory that a call holds at one time, beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        call()
    changes = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def count_kernels(call: Callable) -> int | None:
    """Kernels that a call launches; None where the profiler sees none."""
    return sum(not name.startswith(("Memcpy", "Memset")) for name in device_events(call)) or None


def device_events(call: Callable) -> list[str]:
    """The names of all kernels, copies and fills of a call on CUDA.

    Regions of the host's code that have a name, such as an optimizer's step or a compiled function, stand among the device's
    events too, as annotations.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as prof:
        call()
        torch.cuda.synchronize()
    on_device = (event for event in prof.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return [event.name for event in on_device if not event.is_user_annotation]
