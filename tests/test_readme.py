"""What the README links to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKS = sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text())))


@pytest.mark.parametrize("link", LINKS)
def test_links(link):
    assert (ROOT / link).exists()
