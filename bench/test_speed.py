"""One row per case and contender. The times were taken with all contenders of a case in turns; here they go on record."""

import statistics

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile has many to give


class Tape:
    """A clock that shows how much of the measured time has been played back."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds) -> None:
        self.now += next(seconds)


tape = Tape()


def _quartiles(values: list[float]) -> list[float]:
    return [round(value, 4) for value in statistics.quantiles(values, n=4)]


@pytest.mark.benchmark(timer=tape)
def test_speed(benchmark, measured, contender):
    case, found, threads = measured
    if contender in found.missing:
        pytest.skip(found.missing[contender])
    if contender not in found.timings:
        pytest.skip("not run in this mode")
    timing = found.timings[contender]
    benchmark.group = case.id
    benchmark.extra_info.update(case._asdict(), contender=contender, peak_bytes=timing.peak_bytes, kernels=timing.kernels)
    if threads:
        benchmark.extra_info["threads"] = threads
    # Paired: both of a ratio are from the same round.
    benchmark.extra_info["speedup_over"] = {
        other: _quartiles([a / b for a, b in zip(theirs.seconds, timing.seconds, strict=True)])
        for other, theirs in found.timings.items()
        if other != contender
    }
    if found.missing:
        benchmark.extra_info["missing"] = found.missing
    if found.least_bytes:
        copied = statistics.median(found.copy_seconds)
        benchmark.extra_info["least_bytes"] = found.least_bytes
        benchmark.extra_info["copy_bytes_per_second"] = round(found.copy_bytes / copied)
    samples = iter(timing.seconds)
    benchmark.pedantic(tape.advance, args=(samples,), rounds=len(timing.seconds))
