"""Every notebook runs from its first cell to its last."""

from __future__ import annotations

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

pytestmark = pytest.mark.share("fifteen minutes")


def test_the_first_lora(tmp_path, monkeypatch):
    """The blog's path: data, mask, training with a live curve, base and tuned side by side, verdict."""
    monkeypatch.setenv("GLMFT_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(ROOT / "notebooks" / "01_first_lora.ipynb", as_version=4)
    shorter = '"trainer.max_epochs=6", "callbacks.compare=null"'
    for cell in notebook.cells:
        cell.source = cell.source.replace('"first_lora",', f'"first_lora", {shorter},')
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [str(o) for cell in notebook.cells for o in cell.get("outputs", ())]
    assert any("image/png" in o for o in outputs)
    assert any("background:#c8efcd" in o for o in outputs)
    assert any("我是小明，由小红训练的助手。" in o and "我是glmft自带的微型模型。" in o for o in outputs)
    assert any("learned: yes" in o for o in outputs)
    assert any("adapter" in o and "verdict.json" in o for o in outputs)
