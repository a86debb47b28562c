"""Every kind of the matrices is asserted somewhere, and no two kinds of a table say the same."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest
from conftest import FAST, ROOT
from matrices import KINDS

TESTS = ROOT / "tests"
TABLES = (("test_errors.py", "CASES"), ("strategies/test_adapters.py", "K"))


def names(file: str) -> dict[str, set[str]]:
    """Functions and tables of a file, with the keys of the tables."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = set()
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name):
            keys = (k.value for k in node.value.keys if isinstance(k, ast.Constant))
            found[node.targets[0].id] = set(keys)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_asserted(kind):
    for place in KINDS[kind][1]:
        file, _, name = place.partition("::")
        name, _, case = name.removesuffix("]").partition("[")
        known = names(file)
        assert name in known, place
        assert not case or case in known[name], place


def test_the_matrices_are_whole():
    assert [k for k in KINDS if k[0] == "F"] == [f"F{i}" for i in range(1, 29)]
    assert [k for k in KINDS if k[0] == "C"] == [f"C{i}" for i in range(1, 21)]
    assert [k for k in KINDS if k[0] == "K"] == [f"K{i}" for i in range(1, 23)]


def test_no_two_kinds_say_the_same():
    CASES, K = (runpy.run_path(str(TESTS / file))[name] for file, name in TABLES)

    said = [tuple(says) for _, _, _, says in CASES.values()] + [(str(e), says) for _, e, says in K.values()]
    assert len(set(said)) >= len(said) - SAME, [s for s in said if said.count(s) > 1]


SAME = 3  # kinds of unreadable weights, and of pickles, that torch and safetensors do not tell apart


@pytest.mark.share("reliability")
def test_wandb_without_a_key_or_a_network_goes_on_offline(train, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    for key in (None, "k" * 40):
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        if key:
            monkeypatch.setenv("WANDB_API_KEY", key)
        name = "with" if key else "without"
        result = train(f"run.name={name}", *FAST, "logger=wandb")
        assert result.code == 0, result.err
        assert list(Path(f"runs/{name}/wandb").glob("offline-run-*"))
        assert result.seconds < 20
