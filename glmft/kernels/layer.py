"""One decoder layer on a packed row, written for the compiler: what its modules compute, with fewer passes.

q, k and v come from one matrix product, adapters that share an input share their narrow side, and the MLP's adapters
are computed inside its activation function (`glmft.kernels.swiglu`). The plain reference is transformers' own layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

from glmft.kernels.attention import packed_attention
from glmft.kernels.lora import is_plain
from glmft.kernels.swiglu import swiglu


class Adapter(NamedTuple):
    """A plain adapter beside its frozen layer: base(x) + up (down x), with down [r, in] scaled, up [out, r]."""

    base: nn.Module
    down: Tensor
    up: Tensor


def _adapter(linear: nn.Module, dtype: torch.dtype) -> Adapter | None:
    if not (isinstance(linear, LoraLayer) and linear.training and is_plain(linear)):
        return None
    name = linear.active_adapters[0]
    down = linear.lora_A[name].weight * linear.scaling[name]
    return Adapter(linear.base_layer, down.to(dtype), linear.lora_B[name].weight.to(dtype))


def packed_layer(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """hidden [1, T, H], cos and sin [1, T, R], cu_seqlens as in `glmft.kernels.attention` -> [1, T, H]."""
    attention, mlp = layer.self_attn, layer.mlp
    x = layer.input_layernorm(hidden)
    projected = _projections(attention, x)
    q, k, v = (t.unflatten(-1, (-1, attention.head_dim)) for t in projected)  # [1, T, heads, D]
    q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    out = packed_attention(q[0], k[0], v[0], cu_seqlens, max_seqlen, attention.scaling)
    hidden = hidden + _linear(attention.o_proj, out.flatten(1)[None])
    return hidden + _mlp(mlp, layer.post_attention_layernorm(hidden))


def _linear(linear: nn.Module, x: Tensor) -> Tensor:
    adapter = _adapter(linear, x.dtype)
    if adapter is None:
        out: Tensor = linear(x)
        return out
    return adapter.base(x) + F.linear(F.linear(x, adapter.down), adapter.up)


def _projections(attention: Any, x: Tensor) -> list[Tensor]:
    """q, k, v [1, T, heads x D]."""
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    joined = getattr(attention, "joined_qkv", None)
    adapters = [a for a in (_adapter(linear, x.dtype) for linear in linears) if a is not None]
    bare = not any(isinstance(linear, LoraLayer) for linear in linears)
    if joined is None or not (bare or len(adapters) == len(linears)):  # some have none, or one that is not plain
        return [_linear(linear, x) for linear in linears]
    out = F.linear(x, *joined)
    if adapters:
        low = F.linear(x, torch.cat([a.down for a in adapters]))
        out = out + F.linear(low, torch.block_diag(*(a.up for a in adapters)))
    return list(out.split([linear.out_features for linear in linears], dim=-1))


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    first, second = _adapter(mlp.gate_up_proj, x.dtype), _adapter(mlp.down_proj, x.dtype)
    if first is None and second is None:
        out: Tensor = mlp(x)
        return out
    x = x[0]
    width = mlp.down_proj.in_features
    nothing = x.new_empty(0, width), x.new_empty(2 * width, 0), x.new_empty(x.shape[0], 0)
    gate_up = (first.base if first else mlp.gate_up_proj)(x)
    low = F.linear(x, first.down) if first else nothing[2]
    hidden, narrow = swiglu(gate_up, low, first.up if first else nothing[1], second.down if second else nothing[0])
    out = (second.base if second else mlp.down_proj)(hidden)
    return (out + F.linear(narrow, second.up) if second else out)[None]


def join_qkv(layer: Any) -> None:
    """Lays the frozen weights of q, k and v side by side, where they are plain: the layers keep views of the whole."""
    attention = layer.self_attn
    linears = [getattr(p, "base_layer", p) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    parameters = [p for linear in linears for p in linear.parameters()]
    if not all(type(linear) is nn.Linear for linear in linears) or any(p.requires_grad for p in parameters):
        return
    joined: list[Tensor | None] = []
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        if parts[0] is None:
            joined.append(None)
            continue
        whole = torch.cat([p.data for p in parts])
        for part, view in zip(parts, whole.split([len(p) for p in parts]), strict=True):
            part.data = view
        joined.append(whole)
    attention.joined_qkv = tuple(joined)
