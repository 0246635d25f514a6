"""The benchmark of counts in CSR: its contenders agree, and its rows say what was measured."""

import pytest
import torch

from bench import sparse
from conftest import once

pytestmark = once


@pytest.mark.parametrize("name", sparse.CASES)
def test_contenders_agree(name):
    """And what does not is no contender."""
    torch.manual_seed(0)
    calls, target = sparse.contenders(sparse.CASES[name], 0.1, (8, 40))
    assert target.layout == torch.sparse_csr and 0 < target._nnz() < 8 * 40
    sparse.check(calls)
    for wrong in calls:
        if wrong != "formula":
            with pytest.raises(AssertionError):
                sparse.check(calls | {wrong: lambda wrong=wrong: [1.01 * t for t in calls[wrong]()]})


def test_a_row(monkeypatch):
    seconds = {"formula": 4e-3, "formula, made dense": 5e-3, "dense": 1e-3, "dense, made dense": 3e-3, "CSR": 2e-3}
    monkeypatch.setattr(sparse, "interleaved", lambda calls, *_: {name: [seconds[name]] * 3 for name in calls})
    found = sparse.row("poisson_log", 0.25, (4, 100), 0.0)
    assert sparse.header("1 thread", torch.device("cpu")).splitlines()[0].count("|") == found.count("|")
    assert found.startswith("| `poisson_log`, 4x100 | 25% | 4 | 2 | 2.00 | 2.50 | 0.50 ▼ | 1.50 | 0.0016 / ")


def test_contenders_on_a_gpu(monkeypatch):
    """Of which some are compiled, and the rows with a column more."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    case = sparse.CASES["negative_binomial of logits"]
    calls, _ = sparse.contenders(case, 0.1, (8, 40), compiles=True)
    assert list(calls)[:2] == ["formula", "formula, compiled"] and compiled == [case.nll]
    sparse.check(calls)
    columns = [sparse.header("", torch.device(kind)).splitlines()[0].count("|") for kind in ("cpu", "cuda")]
    assert columns[1] == columns[0] + 1
    names = [name for name, *_ in sparse.ROWS_ON_GPU]
    assert set(names[:4]) == {"negative_binomial of logits", "multinomial"} and set(names) == set(sparse.CASES)
