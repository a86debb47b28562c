"""What leaves glmft loads elsewhere and answers the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_chat import adapter

from glmft.artefacts import verify
from glmft.errors import GlmftError, UserError
from glmft.export import main
from glmft.models import load_model
from glmft.strategies.adapter import CONFIG, WEIGHTS, load_adapter, write_published

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
    card = (tmp_path / "out" / "README.md").read_text()
    assert "commercial use asks for a registration" in card
    assert f"layout `{layout}`, float32" in card


def test_small_shards_and_a_base_without_any_run(tiny, tmp_path):
    """The converter alone; of a base nothing changes."""
    options = ["--dtype", "float32", "--device", "cpu", "--shard-size", "2MB"]
    assert main([str(tiny), str(tmp_path / "out"), *options]) == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    before, after = load_model(tiny, dtype="float32"), load_model(tmp_path / "out", dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize("tuned", [{}], ids=["lora"], indirect=True)
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


@pytest.mark.parametrize("layout", ["glm_hf", "chatglm"])
def test_an_adapter_in_the_names_of_either_layout(tiny, tuned, tmp_path, capsys, layout):
    """There, and back from there, with the same logits; the published names have one layer for q, k and v."""
    options = ["--adapter", "--model", str(tiny), "--device", "cpu", "--layout"]
    assert main([str(tuned), str(tmp_path / "out"), *options, layout]) == 0, capsys.readouterr().err
    assert "--enable-lora --max-lora-rank" in capsys.readouterr().out
    names = set(load_file(tmp_path / "out" / WEIGHTS))
    assert any("query_key_value" in n for n in names) == (layout == "chatglm")
    assert any("q_proj" in n for n in names) == (layout == "glm_hf")
    assert main([str(tmp_path / "out"), str(tmp_path / "back"), *options, "glm_hf"]) == 0
    found, expected = (
        load_adapter(load_model(tiny, dtype="float32").eval(), folder)(IDS).logits
        for folder in (tmp_path / "back", tuned)
    )
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_an_adapter_made_elsewhere_on_the_fused_layer(tiny, tmp_path):
    """PEFT on query_key_value of the published network: here, on the weights, W x + B A x is computed by hand."""
    model = load_model(tiny, dtype="float32").eval()
    torch.manual_seed(0)
    attention = model.model.layers[1].self_attn
    rows = [p.out_features for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    down, up = torch.randn(4, 192) * 0.1, torch.randn(sum(rows), 4) * 0.1
    place = "base_model.model.transformer.encoder.layers.1.self_attention.query_key_value.lora_"
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    save_file({f"{place}A.weight": down, f"{place}B.weight": up}, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query_key_value"]}
    (folder / CONFIG).write_text(json.dumps(config | {"layers_to_transform": [1]}))
    found = load_adapter(load_model(tiny, dtype="float32").eval(), folder)(IDS).logits
    for part, delta in zip("qkv", (2 * up @ down).split(rows), strict=True):
        getattr(attention, f"{part}_proj").weight.data += delta
    assert torch.allclose(found, model(IDS).logits, atol=1e-5)
    again = tmp_path / "again"
    write_published(folder, again, model)
    state = load_file(again / WEIGHTS)
    assert state[f"{place}A.weight"].shape == (4, 192)  # q, k and v share their A: the rank does not grow
    assert torch.equal(state[f"{place}B.weight"], up)


@pytest.mark.parametrize(
    ("targets", "rank"), [(["q_proj", "v_proj", "o_proj"], 12), (["o_proj", "down_proj"], 4), (["k_proj"], 12)]
)
def test_some_of_the_layers(tiny, tmp_path, targets, rank):
    folder = adapter(tiny, tmp_path / "mine", 1, targets=targets)
    model = load_model(tiny, dtype="float32").eval()
    write_published(folder, tmp_path / "out", model)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["r"] == rank
    found = load_adapter(load_model(tiny, dtype="float32").eval(), tmp_path / "out")(IDS).logits
    assert torch.allclose(found, load_adapter(model, folder)(IDS).logits, atol=1e-5)


def test_settings_by_layer_name_are_not_translated(tiny, tmp_path):
    for settings, says in (
        ({"alpha_pattern": {"o_proj": 32}}, "differ by layer"),
        ({"init_lora_weights": "pissa"}, "moves the base's weights"),
    ):
        folder = adapter(tiny, tmp_path / says[:5], 1)
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | settings))
        (folder / "manifest.json").unlink()
        with pytest.raises(UserError, match=says):
            write_published(folder, tmp_path / "out", load_model(tiny, dtype="float32"))


def test_what_has_no_exact_counterpart(tiny, tmp_path):
    folder = adapter(tiny, tmp_path / "mine", 1, targets=["q_proj", "v_proj"], use_dora=True)
    with pytest.raises(UserError, match="DoRA on some of q, k and v only"):
        write_published(folder, tmp_path / "out", load_model(tiny, dtype="float32"))
    state = {k.replace("self_attn.q_proj", "rotary"): v for k, v in load_file(folder / WEIGHTS).items()}
    published = {"base_model.model.transformer.encoder.layers.0.mlp.other.lora_A.weight": torch.zeros(4, 192)}
    for odd, says in ((published, "for which GLM has no exact name"), (state, "missing|not an adapter")):
        shutil.copytree(folder, tmp_path / "odd", dirs_exist_ok=True)
        (tmp_path / "odd" / "manifest.json").unlink(missing_ok=True)
        save_file(odd, tmp_path / "odd" / WEIGHTS)
        with pytest.raises(GlmftError, match=says):
            load_adapter(load_model(tiny, dtype="float32"), tmp_path / "odd")


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
