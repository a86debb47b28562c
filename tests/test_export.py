"""What leaves glmft loads elsewhere and answers the same."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_chat import adapter

from glmft.artefacts import verify
from glmft.export import main
from glmft.models import load_model
from glmft.strategies.adapter import load_adapter

pytestmark = pytest.mark.share("use")
IDS = torch.arange(5, 30)[None]


@pytest.fixture(scope="module", params=[{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def tuned(request, tiny, tmp_path_factory):
    return adapter(tiny, tmp_path_factory.mktemp("a") / "mine", 1, **request.param)


@pytest.mark.parametrize("layout", ["glm_hf", "chatglm"])
def test_merged_is_base_and_adapter_together(tiny, tuned, tmp_path, capsys, layout):
    options = ["--model", str(tiny), "--dtype", "float32", "--device", "cpu", "--layout", layout]
    assert main([str(tuned), str(tmp_path / "out"), *options]) == 0
    assert "loaded again, logits differ by" in capsys.readouterr().out
    together = load_adapter(load_model(tiny, dtype="float32").eval(), tuned)(IDS).logits
    merged = load_model(tmp_path / "out", dtype="float32").eval()(IDS).logits
    assert (together - merged).abs().max() < 1e-5 * together.abs().max() + 1e-5
    assert verify(tmp_path / "out")["layout"] == layout


def test_plain_transformers_reads_it(tiny, tuned, tmp_path):
    """In a process that never imports glmft."""
    options = ["--model", str(tiny), "--dtype", "float32", "--device", "cpu"]
    assert main([str(tuned), str(tmp_path / "out"), *options]) == 0
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()\n"
        "torch.save(m(torch.arange(5, 30)[None]).logits, sys.argv[2]); assert 'glmft' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    together = load_adapter(load_model(tiny, dtype="float32").eval(), tuned)(IDS).logits
    assert torch.allclose(torch.load(tmp_path / "logits", weights_only=True), together, atol=2e-5)


def test_what_cannot_be_exported(tiny, tuned, tmp_path, capsys, monkeypatch):
    assert main([str(tuned), str(tmp_path)]) == 2
    assert "exists; choose another folder" in capsys.readouterr().err
    assert main(["nothing", str(tmp_path / "out")]) == 2
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage)
    assert main([str(tuned), str(tmp_path / "out"), "--model", str(tiny)]) == 4
    err = capsys.readouterr().err
    assert "not saved: needed" in err
    assert not (tmp_path / "out").exists()
