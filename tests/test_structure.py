"""What keeps the house in order: which way imports go, who knows the kernels, and who knows one likelihood from another."""

import ast
from pathlib import Path

import pytest

import fastelbo
from fastelbo import likelihoods

HOUSE = Path(fastelbo.__file__).parent
KERNELS = HOUSE.parent / "kernels"
FILES = sorted(path for path in HOUSE.rglob("*.py") if "kernels" not in path.relative_to(HOUSE).parts)

# From below to above: what a room may import stands before it. The files that users import are one room, the last.
ROOMS = ("basics", "reference", "likelihoods", "latents", "engine", "diagnostics", "bounds", "")
DOOR = "engine/triton_backend.py"


def imported(path: Path) -> list[tuple[str, int]]:
    """The modules that a file imports, `fastelbo.` left out, and their lines."""
    here, found = ("fastelbo", *path.relative_to(HOUSE).parts[:-1]), []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level + 1]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            found += [(f"{module}.{name.name}", node.lineno) for name in node.names]
        elif isinstance(node, ast.Import):
            found += [(name.name, node.lineno) for name in node.names]
    return [(name.removeprefix("fastelbo."), line) for name, line in found if name.split(".")[0] == "fastelbo"]


def room_of(module: str) -> int:
    first = module.split(".")[0]
    return ROOMS.index(first) if first in ROOMS else len(ROOMS) - 1


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_no_import_goes_upward(path):
    own = room_of(".".join(path.relative_to(HOUSE).with_suffix("").parts))
    upward = [(name, line) for name, line in imported(path) if room_of(name) > own and name.split(".")[0] != "kernels"]
    assert not upward


def test_the_kernels_have_one_door():
    users = {str(path.relative_to(HOUSE)) for path in FILES for name, _ in imported(path) if name.split(".")[0] == "kernels"}
    assert users == {DOOR}


def test_the_kernels_import_nothing_of_the_house():
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2 and not (node.module or "").startswith("fastelbo"), path.name


def is_likelihood(node: ast.AST) -> bool:
    """Whether an expression is a likelihood by its name, or something of one."""
    while isinstance(node, ast.Attribute):
        if node.attr == "likelihood":
            return True
        node = node.value
    return isinstance(node, ast.Name) and node.id == "likelihood"


def questions(path: Path) -> list[str]:
    """Where a file asks which likelihood it has."""
    kinds = {name for name in likelihoods.__all__ if name not in ("Likelihood", "Range", "record")}
    modules = [(name.split("."), line) for name, line in imported(path)]
    found = [f"{path}:{line}" for parts, line in modules if parts[0] == "likelihoods" and parts[-1] in kinds]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            asks = node.func.id in ("isinstance", "hasattr", "getattr", "type") and is_likelihood(node.args[0])
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            facts = [side for side in sides if isinstance(side, ast.Attribute) and side.attr in ("name", "kernel")]
            asks = any(map(is_likelihood, facts))
            asks = asks and not any(isinstance(side, ast.Constant) and side.value is None for side in sides)
        else:
            asks = False
        if asks:
            found.append(f"{path.relative_to(HOUSE)}:{getattr(node, 'lineno', 0)}")
    return found


def test_nobody_asks_which_likelihood_it_has():
    assert not [place for path in FILES if path.parent.name != "likelihoods" for place in questions(path)]


@pytest.mark.parametrize("text", (
    "isinstance(likelihood, Gaussian)", "hasattr(call.likelihood, 'dim')", "likelihood.name == 'gaussian'",
    "plan.call.likelihood.kernel in ('mse',)", "from .likelihoods import Categorical",
    "from fastelbo.likelihoods.counts import NegativeBinomial",
))  # fmt: skip
def test_a_question_is_seen(text, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "HOUSE", tmp_path)
    (tmp_path / "some.py").write_text(text)
    assert questions(tmp_path / "some.py")


@pytest.mark.parametrize("folder", (HOUSE, KERNELS), ids=("fastelbo", "kernels"))
def test_files_are_short(folder):
    long = {path.name: lines for path in folder.rglob("*.py") if (lines := len(path.read_text().splitlines())) > 411}
    assert not long
