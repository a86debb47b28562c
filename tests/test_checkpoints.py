"""Checkpoint files: what goes in comes out, bit for bit, and the 6B's LoRA checkpoint stays small."""

from __future__ import annotations

import pytest
import torch

from glmft.checkpoints import FILE, CheckpointFiles, pack_tensors, unpack_tensors
from glmft.errors import DamagedError


def tree() -> dict:
    torch.manual_seed(0)
    return {
        "state_dict": {
            "a": torch.randn(3, 5),
            "b": torch.randn(2, dtype=torch.bfloat16),
            "large": torch.randn(600, 512),
        },
        "optimizer_states": [
            {"state": {0: {"step": torch.tensor(7.0), "m": torch.randn(0, 4)}}, "groups": [(0.9, 0.95)]}
        ],
        "loops": {"n": 3, "t": (torch.ones(2, dtype=torch.int64), "text")},
        "glmft": {},
    }


def test_what_goes_in_comes_out(tmp_path):
    CheckpointFiles().save_checkpoint(tree(), tmp_path / "a")
    found = CheckpointFiles().load_checkpoint(tmp_path / "a")
    assert str(found) == str(tree())
    for key in ("a", "b", "large"):
        assert torch.equal(found["state_dict"][key], tree()["state_dict"][key])


def test_tensors_do_not_share_memory_after_loading():
    found = unpack_tensors(pack_tensors(tree()))
    found["state_dict"]["a"].zero_()
    assert torch.equal(found["state_dict"]["b"], tree()["state_dict"]["b"])


def test_elements_that_no_mark_names_are_damage():
    packed = pack_tensors(tree())
    packed["small"]["float32"] = torch.cat([packed["small"]["float32"], torch.zeros(1)])
    with pytest.raises(DamagedError, match="not those that it lists"):
        unpack_tensors(packed)


def test_the_6b_lora_checkpoint_is_below_200_mb(tmp_path):
    """Names and shapes of ChatGLM3-6B with rank 8 on all linear layers, and AdamW's states: 199.9 MB of numbers."""
    shapes = {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (4096, 256),
        "self_attn.v_proj": (4096, 256),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_up_proj": (4096, 27392),
        "mlp.down_proj": (13696, 4096),
    }
    state, optimizer = {}, {}
    for layer in range(28):
        for name, (inputs, outputs) in shapes.items():
            for part, shape in (("A", (8, inputs)), ("B", (outputs, 8))):
                key = f"network.base_model.model.model.layers.{layer}.{name}.lora_{part}.default.weight"
                state[key] = torch.zeros(shape)
                moments = {"exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
                optimizer[len(optimizer)] = {"step": torch.tensor(1.0), **moments}
    checkpoint = {"state_dict": state, "optimizer_states": [{"state": optimizer}], "loops": {}, "glmft": {}}
    CheckpointFiles().save_checkpoint(checkpoint, tmp_path / "a")
    numbers = 3 * sum(t.numel() * 4 for t in state.values())
    size = (tmp_path / "a" / FILE).stat().st_size
    print(f"{size:,} bytes, of which {numbers:,} are numbers")
    assert numbers == 199_901_184
    assert size < 199_960_000


def test_a_checkpoint_of_something_else_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "a" / FILE)
    with pytest.raises(DamagedError, match=r"trainer\.ckpt: not a checkpoint of this program"):
        CheckpointFiles().load_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("part", ["state_dict", "loops", "optimizer_states", "glmft"])
def test_every_part_of_a_checkpoint_is_asked_for(tmp_path, part):
    whole = {"state_dict": {}, "loops": {}, "optimizer_states": [], "glmft": {}}
    del whole[part]
    (tmp_path / "a").mkdir()
    torch.save(pack_tensors(whole), tmp_path / "a" / FILE)
    with pytest.raises(DamagedError, match=f"not a checkpoint of this program .*{part}"):
        CheckpointFiles().load_checkpoint(tmp_path / "a")
