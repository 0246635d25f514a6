"""What the README links to is there, and its plot is of the numbers that are kept. Its code runs with the pages of docs/."""

import importlib
import re
from pathlib import Path

import pytest

from conftest import DEVICE, once

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LINKS = sorted(set(re.findall(r'(?:\]\(|src="|srcset=")(?!https?:)([^)#"]+)', README)))


@pytest.mark.parametrize("link", LINKS)
def test_links(link):
    assert (ROOT / link).exists()


@once
@pytest.mark.skipif(DEVICE.type != "cpu", reason="operators are counted on a CPU")
def test_the_plot(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "docs/figures")
    gain = importlib.import_module("gain")
    for theme in ("light", "dark"):
        drawn = re.findall(r">([\d.]+x?)</text>", (ROOT / f"docs/_static/gain-{theme}.svg").read_text())
        assert set(gain.labels()) <= set(drawn)
    faster = gain.speedups()[1].values()
    words = [f"{end(pair[at] for pair in faster):.2f}" for at in (0, 1) for end in (min, max)]
    words += [f"{end(pair[at] for pair in gain.counts().values())}" for at in (0, 1) for end in (min, max)]
    shown = re.findall(r"\b\d+(?:\.\d+)?", re.search(r'alt="(.*?)"', README, re.DOTALL)[1])
    assert shown == words


def test_it_is_short():
    assert len(README.splitlines()) <= 90
