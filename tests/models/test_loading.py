from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import reference
from safetensors.torch import load_file, save_file

from glmft.errors import DamagedError, ProblemList, UserError
from glmft.files import read_json, write_json
from glmft.models import load_model, load_tokenizer, save_model
from glmft.models.published import check_folder, check_tokenizer, find_weights, read_config, read_header

CONTROL = "transformer.encoder.layers.0.self_attention"


@pytest.fixture(scope="module")
def golden():
    folder = reference("golden/chatglm3-small")
    return folder, load_file(folder / "expected.safetensors")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("model*.safetensors")) for k, v in load_file(f).items()}


def test_logits_loss_and_gradients_equal_the_published_model(golden):
    folder, expected = golden
    model = load_model(folder, dtype="float32")
    ids, mask = expected["input_ids"], expected["attention_mask"]
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask, position_ids=expected["position_ids"]).logits
    assert (padded - expected["logits_padded"])[mask == 1].abs().max() < 1e-5
    out = model(input_ids=ids[:1], labels=expected["labels_row0"])
    assert (out.logits - expected["logits_row0"]).abs().max() < 1e-5
    assert abs(out.loss - expected["loss_row0"]) < 1e-5
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    layer, published = "model.layers.0.", "grad.transformer.encoder.layers.0."
    pairs = {
        "grad.transformer.embedding.word_embeddings.weight": grads["model.embed_tokens.weight"],
        published + "input_layernorm.weight": grads[layer + "input_layernorm.weight"],
        published + "post_attention_layernorm.weight": grads[layer + "post_attention_layernorm.weight"],
        published + "self_attention.dense.weight": grads[layer + "self_attn.o_proj.weight"],
        published + "mlp.dense_h_to_4h.weight": grads[layer + "mlp.gate_up_proj.weight"],
        published + "mlp.dense_4h_to_h.weight": grads[layer + "mlp.down_proj.weight"],
    }
    for kind in ("weight", "bias"):
        qkv = [grads[f"{layer}self_attn.{x}_proj.{kind}"] for x in "qkv"]
        pairs[f"{published}self_attention.query_key_value.{kind}"] = torch.cat(qkv)
    assert set(pairs) == {k for k in expected if k.startswith("grad.")}
    for name, grad in pairs.items():
        assert (grad - expected[name]).abs().max() < 1e-5, name


def test_saving_gives_back_the_same_tensors_under_the_same_names(golden, tmp_path):
    folder, _ = golden
    save_model(load_model(folder, dtype="float32"), tmp_path / "again", max_shard_size="1MB")
    before, after = stored(folder), stored(tmp_path / "again")
    assert before.keys() == after.keys()
    assert "transformer.rotary_pos_emb.inv_freq" in after
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    config = read_json(tmp_path / "again" / "config.json")
    assert "auto_map" not in config
    assert config["padded_vocab_size"] == 512
    check_folder(tmp_path / "again")


def test_glm_layout_round_trip(tiny, tmp_path):
    model = load_model(tiny, dtype="float32")
    save_model(model, tmp_path / "hf", layout="glm_hf")
    assert "model.layers.0.self_attn.q_proj.weight" in read_header(tmp_path / "hf" / "model.safetensors")
    again = load_model(tmp_path / "hf", dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_bin_shards_are_read_without_unpickling_code(tiny_copy):
    tensors = stored(tiny_copy)
    (tiny_copy / "model.safetensors").unlink()
    torch.save(tensors, tiny_copy / "pytorch_model.bin")
    model = load_model(tiny_copy, dtype="float32")
    assert torch.equal(model.lm_head.weight, tensors["transformer.output_layer.weight"].float())
    del tensors[f"{CONTROL}.dense.weight"]
    torch.save(tensors, tiny_copy / "pytorch_model.bin")
    with pytest.raises(ProblemList, match=r"missing .*dense\.weight"):
        load_model(tiny_copy)

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tiny_copy / "pwned",))

    torch.save({"x": Evil()}, tiny_copy / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported"):
        load_model(tiny_copy)
    assert not (tiny_copy / "pwned").exists()


def test_rotary_frequencies_stay_fp32(tiny):
    model = load_model(tiny, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_rope_ratio_of_the_long_models(tiny_copy):
    config = read_json(tiny_copy / "config.json") | {"rope_ratio": 50}
    write_json(tiny_copy / "config.json", config)
    model = load_model(tiny_copy)
    assert model.config.rope_parameters["rope_theta"] == 500000.0
    save_model(model, tiny_copy / "again")
    assert read_json(tiny_copy / "again" / "config.json")["rope_ratio"] == 50


def test_host_memory_stays_mapped(tiny, tmp_path):
    """On the CPU, in the file's dtype, only the split q, k, v are copied; the rest stays on the file."""
    from transformers import GlmForCausalLM

    from glmft.models.conversion import glm_config
    from glmft.models.published import PublishedConfig

    def anonymous() -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

    model = GlmForCausalLM(glm_config(PublishedConfig(2, 32768, 1024, 2048, 64, 16, 2, 128)))
    save_model(model, tmp_path / "wide", max_shard_size="100MB")
    size = sum(p.numel() * 4 for p in model.parameters())
    del model
    before = anonymous()
    loaded = load_model(tmp_path / "wide")
    assert loaded.dtype == torch.float32
    assert anonymous() - before < size / 2 < 200e6


# ---- what is refused


def test_missing_and_truncated_shards_are_named(golden, tmp_path):
    folder, _ = golden
    for file in folder.iterdir():
        if file.name != "expected.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1000])
    with pytest.raises(DamagedError, match=r"model-00002.*truncated"):
        load_model(tmp_path)
    shard.write_bytes(content[:4])
    with pytest.raises(DamagedError, match="no readable safetensors header"):
        load_model(tmp_path)
    shard.write_bytes(struct.pack("<Q", 2**60) + content[8:])
    with pytest.raises(DamagedError, match="no readable safetensors header"):
        load_model(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"1 of 2 shards are missing: model-00002"):
        load_model(tmp_path)


def test_every_wrong_tensor_is_named(tiny_copy):
    tensors = stored(tiny_copy)
    tensors["surprise"] = torch.zeros(1)
    tensors[f"{CONTROL}.query_key_value.bias"] = torch.zeros(3)
    del tensors["transformer.output_layer.weight"]
    save_file(tensors, tiny_copy / "model.safetensors")
    with pytest.raises(ProblemList) as caught:
        load_model(tiny_copy)
    text = str(caught.value)
    assert "unexpected surprise" in text
    assert "missing transformer.output_layer.weight" in text
    assert f"{CONTROL}.query_key_value.bias has shape [3]" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_sequence_length": 2048}, "ChatGLM-6B"),
        ({"_name_or_path": "THUDM/chatglm2-6b"}, "ChatGLM2"),
        ({"padded_vocab_size": 151552}, "GLM-4"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"quantization_bit": 4}, "quantization_bit is 4"),
        ({"rmsnorm": False}, "rmsnorm is False"),
        ({"add_bias_linear": True}, "add_bias_linear is True"),
        ({"num_layers": "four"}, "num_layers is 'four'"),
    ],
)
def test_relatives_are_refused_by_name(tiny_copy, change, says):
    write_json(tiny_copy / "config.json", read_json(tiny_copy / "config.json") | change)
    with pytest.raises(UserError, match=says):
        read_config(tiny_copy)


def test_folder_without_a_model(tmp_path, tiny_copy):
    with pytest.raises(UserError, match="no such folder"):
        read_config(tmp_path / "nothing")
    with pytest.raises(UserError, match="no weights"):
        find_weights(tmp_path)
    (tiny_copy / "config.json").write_text("{")
    with pytest.raises(DamagedError, match="not JSON"):
        read_config(tiny_copy)


def test_index_may_not_point_outside(tiny_copy):
    (tiny_copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(UserError, match="outside its folder"):
        find_weights(tiny_copy)


def test_another_models_tokenizer(tiny):
    config, _, _ = check_folder(tiny)
    check_tokenizer(len(load_tokenizer(tiny)), config, tiny)
    with pytest.raises(UserError, match="not the model's tokenizer"):
        check_tokenizer(64798, config, tiny)
