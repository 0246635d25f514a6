"""The code on the pages of docs/ and of the README runs, prints what stands below it, and computes what closed forms say."""

import math
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import fastelbo
from conftest import DEVICE, once
from fastelbo import diagnostics, likelihoods, nn, reference, schedules

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [path for path in (*sorted(DOCS.glob("*.md")), ROOT / "README.md") if "```python" in path.read_text()]
sys.path.append(str(DOCS))

import blocks  # noqa: E402
import costs  # noqa: E402

WIDE = ("own-likelihood.md", "README.md")  # as their code stands in files

# A page runs on a CPU, by Torch; its samples are those of one random generator.
pytestmark = [once, pytest.mark.skipif(DEVICE.type != "cpu", reason="the pages are about a CPU")]


@pytest.fixture(autouse=True)
def _poison():
    """In the place of the one that makes tensors of NaN: what a page's code allocates is its own."""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_blocks_of_a_page(path):
    if path.stem == "getting-started":
        pytest.importorskip("sklearn")
    page = blocks.once(path)
    for block in page.blocks:
        if block.printed is not None:
            assert blocks.is_same(block.shown, block.printed), f"{path.name}:{block.line} prints\n{block.printed}"
    assert any(block.printed is not None for block in page.blocks)


def test_code_is_no_wider_than_a_page():
    codes = {(path.name, match["code"]) for path in PAGES for match in blocks.BLOCK.finditer(path.read_text())}
    assert not [line for name, code in codes for line in code.splitlines() if len(line) > 88 and name not in WIDE]


def test_what_does_not_run_says_which_test_has_it():
    left_out = {(path.stem, block.why) for path in PAGES for block in blocks.once(path).blocks if block.why}
    assert {page for page, _ in left_out} == {"recipes", "own-likelihood"} and len(left_out) == 4
    for _, why in left_out:
        assert (ROOT / re.search(r"tests/\w+\.py", why)[0]).exists()


@pytest.mark.parametrize(("shown", "printed", "same"), (
    ("loss 1.23, kl 4", "loss 1.24,  kl 4", True), ("loss 1.23", "loss 1.25", False), ("4 units", "5 units", False),
    ("1.5e-05", "1.6e-05", True), ("1.5e-05", "1.5e-04", False), ("True", "False", False), ("1 2", "1", False),
    ("", "1", False),
))  # fmt: skip
def test_what_counts_as_the_same(shown, printed, same):
    assert blocks.is_same(shown, printed) is same


def test_a_page_that_is_wrong_is_seen_and_mended(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One\n\n```python\nx = 2\nprint(x + 0.5)\n```\n\n```text\n3.5\n```\n\n```python\nprint(x)\n```\n\nEnd.\n")
    first, second = blocks.run(page).blocks
    assert (first.line, first.shown, first.printed) == (4, "3.5\n", "2.5\n") and not second.shown
    page.write_text(blocks.written(page))
    assert "```text\n2.5\n```\n\n```python\nprint(x)\n```\n\n```text\n2\n```\n\nEnd.\n" in page.read_text()
    assert all(blocks.is_same(block.shown, block.printed) for block in blocks.run(page).blocks)
    page.write_text("\n\n```python\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as error:
        blocks.run(page)
    assert (str(error.traceback[-1].path), error.traceback[-1].lineno + 1) == (str(page), 4)


# The numbers of the page on the ELBO, by formulas of their own.


@pytest.fixture
def elbo() -> dict:
    return blocks.once(DOCS / "elbo.md").scope


def test_the_exercise(elbo):
    mean, variance = 1 / 1.5, 0.33
    recon = 0.5 * math.log(2 * math.pi * 0.5) + ((1 - mean) ** 2 + variance) / (2 * 0.5)
    kl = 0.5 * (variance + mean**2 - 1 - math.log(variance))
    log_p, gap = -0.5 * math.log(2 * math.pi * 1.5) - 1 / 3, 0.5 * (0.99 - 1 - math.log(0.99))
    loss = elbo["exercise"].loss.item()
    assert elbo["exercise"].recon.item() == pytest.approx(recon, rel=1e-13)
    assert elbo["exercise"].kl.item() == pytest.approx(kl, rel=1e-13)
    assert -loss == pytest.approx(log_p - gap, rel=1e-13)
    # The variance of one sample's estimate: of recon alone, which is (x - z)^2 and a constant.
    spread = math.sqrt(2 * variance**2 + 4 * variance * (1 - mean) ** 2)
    assert elbo["drawn"].std().item() == pytest.approx(spread, rel=0.05)
    assert elbo["drawn"].mean().item() == pytest.approx(-loss, abs=5 * spread / 100)
    by_mean = log_p - 0.5 * (0.99 - 1 - math.log(0.99) + 3 * (elbo["means"] - mean) ** 2)
    torch.testing.assert_close(elbo["over_means"], by_mean)
    by_variance = log_p - 0.5 * (3 * elbo["variances"] - 1 - torch.log(3 * elbo["variances"]))
    torch.testing.assert_close(elbo["over_variances"], by_variance)


def test_log_p_is_the_sum(elbo):
    torch.testing.assert_close(elbo["elbo"] + elbo["gap"], elbo["row_log_p"], rtol=0, atol=1e-10)
    # log p once more, by the eigenvalues of its covariance instead of a factor of it
    W, s, x = elbo["W"], 0.7, elbo["rows"]
    eigenvalues, vectors = torch.linalg.eigh(W @ W.T + s**2 * torch.eye(5, dtype=torch.float64))
    log_p = -0.5 * ((x @ vectors) ** 2 / eigenvalues + torch.log(2 * math.pi * eigenvalues)).sum(1)
    torch.testing.assert_close(elbo["row_log_p"], log_p)


def test_em_and_the_vae(elbo):
    em, log_p, best = elbo["em"], elbo["em_log_p"], elbo["best"]
    assert all(b > a for a, b in pairwise(em))
    assert all(b >= a - 1e-12 for a, b in pairwise(log_p))
    assert all(bound <= p + 1e-12 for bound, p in zip(em + elbo["vae"], log_p + elbo["vae_log_p"], strict=True))
    assert best - 1e-3 < em[-1] < best and best - 0.1 < elbo["vae"][-1] < best
    assert any(b < a for a, b in pairwise(elbo["vae"]))


def test_the_balance(elbo):
    for beta, mean, variance, recon, kl in elbo["balance"]:
        precision = 1 + 1 / (0.5 * beta)  # of the prior times the likelihood to the power 1 / beta
        assert (mean, variance) == pytest.approx((2 / beta / precision, 1 / precision), abs=1e-5)
        assert kl == pytest.approx(0.5 * (variance + mean**2 - 1 - math.log(variance)), rel=1e-9)
        assert recon == pytest.approx(0.5 * math.log(math.pi) + (1 - mean) ** 2 + variance, rel=1e-9)


def test_the_collapse(elbo):
    for beta, found in elbo["collapse"].items():
        closed = [max(0.0, 0.5 * math.log(eigenvalue / beta)) for eigenvalue in (8, 4, 2, 0.8)]
        assert found.tolist() == pytest.approx(closed, abs=0.01)


def test_the_gap_of_iwae(elbo):
    variance = 1 / math.sqrt(5 / 9) * math.exp(4 / 9 / (5 / 3)) - 1  # of N(2/3, 1/3) over N(0, 1), by an integral of Gaussians
    kl = 0.5 * (3 + 4 / 3 - 1 - math.log(3))  # from q to the posterior
    for count, gap, error, leading in elbo["iwae"]:
        assert leading == pytest.approx(variance / (2 * count), rel=1e-12)
        truth, slack = (kl, 0) if count == 1 else (leading, 6 * leading**2)
        assert abs(gap - truth) < 5 * error + slack
    assert abs(elbo["off"]) < 4


# What the pages are to have.


def public_names() -> list[str]:
    modules = {"schedules": ("linear", "cosine", "cyclical", "Schedule"), "diagnostics": ("Monitor", "CollapseWarning")}
    modules |= {"reference": ("elbo_loss", "reparameterize"), "nn": ("ELBOLoss",), "likelihoods": tuple(likelihoods.__all__)}
    for module in (schedules, diagnostics, reference, nn):
        name = module.__name__.rpartition(".")[2]
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        assert {key for key in own if not key.startswith("_")} == set(modules[name])
    names = [f"fastelbo.{name}" for name in fastelbo.__all__ if name not in modules]
    return names + [f"fastelbo.{module}.{name}" for module, some in modules.items() for name in some]


def test_the_reference_has_every_public_name():
    text = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(public_names())


def test_every_likelihood_has_a_section_with_its_cost():
    text = (DOCS / "likelihoods.md").read_text()
    assert set(re.findall(r"{{ (\w+) }}", text)) == set(costs.costs()) - {"cost_continuous_bernoulli", "cost_poisson"}
    for name in likelihoods.BY_NAME:
        assert f'`"{name}"`' in text
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:-2]:
        assert "$$" in section and "```python" in section and "**Cost**" in section, section.partition("\n")[0]


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: str(path.relative_to(DOCS)))
def test_links(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        if "figures/out/" not in link:
            assert (path.parent / link).exists(), link


def test_what_is_drawn_is_shown():
    sys.path.append(str(DOCS / "figures"))
    drawn = set(re.findall(r'draw\("(\w+)"', "".join(path.read_text() for path in (DOCS / "figures").glob("*.py"))))
    drawn |= set(re.findall(r'^    "(\w+)": Plot\(', (DOCS / "figures/likelihoods.py").read_text(), re.MULTILINE))
    shown = set(re.findall(r"figures/out/(\w+)-light\.svg", "".join(path.read_text() for path in DOCS.glob("*.md"))))
    dark = set(re.findall(r"figures/out/(\w+)-dark\.svg", "".join(path.read_text() for path in DOCS.glob("*.md"))))
    assert drawn - {"gain"} == shown == dark  # that one is the README's


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {name for some in targets for name in some.split()}
    pages = [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    named = {name for path in pages for name in re.findall(r"(?:^|`| {4})make ([\w-]+)", path.read_text(), re.MULTILINE)}
    assert named and named <= targets
