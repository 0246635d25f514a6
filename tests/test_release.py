"""What a release is made of agrees with itself. `make release-check` builds one and tries it."""

import re
from pathlib import Path

import fastelbo
from conftest import once

pytestmark = once
ROOT = Path(__file__).parents[1]


def test_the_version_stands_once():
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\S+), (\S+)$", changes, re.MULTILINE)
    released, _, rest = fastelbo.__version__.partition(".dev")
    assert newest[1] == released and (newest[2] == "unreleased") == bool(rest)
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


def test_workflows_run_make_targets():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    files = sorted((ROOT / ".github/workflows").glob("*.yml"))
    ran = [command for path in files for command in re.findall(r"^ +- run: (.*)$", path.read_text(), re.MULTILINE)]
    assert {"make test", "make docs", "make release-check"} <= set(ran)
    for command in ran:
        assert command.split()[0] == "make" and command.split()[1] in targets


def test_a_report_of_a_bug_has_that_of_the_package():
    text = (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text()
    assert "python -m fastelbo" in text and "required: true" in text


def test_all_rooms_are_packaged():
    listed = re.search(r"^packages = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    rooms = {path.parent.name for path in (ROOT / "fastelbo").glob("*/__init__.py")} | {"kernels"}  # which is a link, if any
    assert {f"fastelbo.{room}" for room in rooms} | {"fastelbo"} == {name.strip(' "') for name in listed.split(",")}
