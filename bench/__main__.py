"""`python -m bench`: fastelbo timed next to the naive code, eager and under torch.compile, in one run."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from . import report
from .conftest import add_options, device_name


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
    output = options.output or report.RESULTS / report.file_name(device_name(options.device))
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "benchmark.json"
        arguments = [str(Path(__file__).parent), "--benchmark-json", str(written), "--benchmark-quiet", "--tb=short"]
        for name, value in vars(options).items():
            if name == "output" or value is None or value is False:
                continue
            values = [] if value is True else value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *map(str, values)]
        code = pytest.main([*arguments, "-p", "no:cacheprovider"])
        if not written.exists():
            return code or 1
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(written, output)  # of what was measured, even if something else failed
    print(report.terminal([report.load(output)]), f"\n\nWritten: {output}")
    return code


if __name__ == "__main__":
    sys.exit(main())
