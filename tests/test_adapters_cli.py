"""Sums of adapters answer as the sum of their changes; what is extracted from a full model has its answers."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_chat import adapter

from glmft.adapters_cli import main
from glmft.models import load_model, load_tokenizer, save_model
from glmft.strategies.adapter import load_adapter, read_adapter
from glmft.strategies.combining import pairs_of, truncated

pytestmark = pytest.mark.share("use")
IDS = torch.arange(5, 30)[None]


def merged(tiny, *weighted):
    """The base with every change added by hand."""
    model = load_model(tiny, dtype="float32").eval()
    parameters = dict(model.named_parameters())
    for folder, weight in weighted:
        for name, (down, up) in pairs_of(*read_adapter(folder, model)).items():
            parameters[name.removeprefix("base_model.model.") + ".weight"].data += weight * up @ down
    return model


def test_a_weighted_sum_is_exact(tiny, tmp_path, capsys):
    one = adapter(tiny, tmp_path / "one", 1)
    two = adapter(tiny, tmp_path / "two", 2, targets=["q_proj", "down_proj"], use_rslora=True)
    out = tmp_path / "sum"
    assert main(["combine", str(out), str(one), f"{two}=-0.5", "--model", str(tiny)]) == 0
    assert "rank 8" in capsys.readouterr().out
    found = load_adapter(load_model(tiny, dtype="float32").eval(), out)(IDS).logits
    expected = merged(tiny, (one, 1.0), (two, -0.5))(IDS).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_smaller_rank_is_the_best_of_its_size(tiny, tmp_path, capsys):
    one, two = (adapter(tiny, tmp_path / n, s) for n, s in (("one", 1), ("two", 2)))
    assert main(["combine", str(tmp_path / "sum"), str(one), str(two), "--rank", "5", "--model", str(tiny)]) == 0
    assert "% of the change is missing, at most" in capsys.readouterr().out
    torch.manual_seed(0)
    pair = torch.randn(6, 40), torch.randn(30, 6)
    (down, up), lost = truncated(pair, 3)
    whole = pair[1] @ pair[0]
    s = torch.linalg.svdvals(whole)
    assert lost == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-4)
    assert float((up @ down - whole).norm() / whole.norm()) == pytest.approx(lost, rel=1e-4)


def test_what_full_fine_tuning_changed(tiny, tmp_path, capsys):
    """A change of rank 4 is found again whole at rank 4; at rank 2 the error is said; other tensors are named."""
    one = adapter(tiny, tmp_path / "one", 1)
    tuned = merged(tiny, (one, 1.0))
    expected = tuned(IDS).logits
    tuned.model.norm.weight.data[0] += 1e-6
    save_model(tuned, tmp_path / "full", "glm_hf", load_tokenizer(tiny))
    options = ["--model", str(tiny), "--rank"]
    assert main(["extract", str(tmp_path / "lora"), str(tmp_path / "full"), *options, "4"]) == 0
    said = capsys.readouterr().out
    assert "1 other tensors changed" in said
    assert "model.norm.weight most" in said
    errors = [float(e) for e in re.findall(r"rank \d: ([\d.]+)%", said)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5
    found = load_adapter(load_model(tiny, dtype="float32").eval(), tmp_path / "lora")(IDS).logits
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_what_cannot_be_combined(tiny, tmp_path, capsys):
    one, dora = adapter(tiny, tmp_path / "one", 1), adapter(tiny, tmp_path / "dora", 1, use_dora=True)
    pissa = adapter(tiny, tmp_path / "pissa", 1, init_weights="pissa")
    other = shutil.copytree(tiny, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"num_layers": 3}
    (other / "config.json").write_text(json.dumps(config))
    state = {k: v for k, v in load_file(other / "model.safetensors").items() if ".layers.3." not in k}
    save_file(state, other / "model.safetensors")
    for arguments, says in (
        (["combine", str(tmp_path / "x"), str(one), str(dora)], "a DoRA adapter is no sum of low rank"),
        (["combine", str(tmp_path / "x"), str(pissa)], "moves the base's weights"),
        (["extract", str(tmp_path / "x"), str(other)], "not models of one shape"),
        (["combine", str(tmp_path), str(one)], "exists; choose another folder"),
        (["combine", str(tmp_path / "x"), f"{one}=lots"], "lots is no number"),
        (["combine", str(tmp_path / "x"), str(tiny)], "holds no adapter"),
        (["combine", str(tmp_path / "x"), str(one), "--rank", "0"], "--rank 0: must be 1 or more"),
        (["extract", str(tmp_path / "x"), str(one)], "not a fully tuned model"),
        (["extract", str(tmp_path / "x"), str(tiny)], "its linear layers are those of the base"),
    ):
        assert main([*arguments, "--model", str(tiny)]) == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
