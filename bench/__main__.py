"""`python -m bench`: fastelbo timed next to the naive code, eager and under torch.compile, in one run."""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from . import report
from .conftest import add_options, device_name

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__.partition(": ")[2],
        epilog="Without subjects, shapes, likelihoods, dtypes and modes: the usual cases. With some of them: all such cases, in"
        " float32 and mode backward unless chosen otherwise.",
    )
    add_options(parser.add_argument)
    parser.add_argument("--output", type=Path, help="the JSON file (bench/results/<device>.json)")
    options = parser.parse_args()
    name = re.sub(r"\W+", "-", device_name(options.device)).strip("-").lower()
    output = options.output or HERE / "results" / f"{name}.json"
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "benchmark.json"
        arguments = [str(HERE), "--benchmark-json", str(written), "--benchmark-quiet", "-p", "no:cacheprovider"]
        for name, value in vars(options).items():
            if name != "output" and value is not None:
                arguments += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        if code := pytest.main(arguments):
            return code
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(written, output)
    print(report.terminal([report.load(output)]), f"\n\nWritten: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
