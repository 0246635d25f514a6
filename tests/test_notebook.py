"""The notebook's cells run from top to bottom and print what is kept in it. It needs no Jupyter for that."""

import json
import sys
from pathlib import Path

import pytest

from conftest import DEVICE, once

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))

import blocks  # noqa: E402

pytestmark = [once, pytest.mark.skipif(DEVICE.type != "cpu", reason="it is about a CPU")]


@pytest.fixture(autouse=True)
def _poison():
    """In the place of the one that makes tensors of NaN: what a cell allocates is its own."""


def test_quickstart(monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib").use("agg")
    path = ROOT / "examples/quickstart.ipynb"
    scope, pictures = {"__name__": "quickstart"}, 0
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            outputs = cell["outputs"]
            shown = "".join(text for output in outputs for text in output.get("text", []))
            printed = blocks.execute("".join(cell["source"]), path, 1, scope)
            assert blocks.is_same(shown, printed), printed
            pictures += sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures == len(scope["pyplot"].get_fignums()) == 1
    scope["pyplot"].close("all")
    assert scope["rows"].shape == (3, 10, 8, 8)
    assert path.stat().st_size < 50_000  # small outputs are kept, and no others
