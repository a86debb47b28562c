"""LoRA adapters between the published layer names and GLM's, exactly.

published    self_attention.query_key_value, self_attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h
GLM          self_attn.q_proj k_proj v_proj, self_attn.o_proj,     mlp.gate_up_proj,  mlp.down_proj

One adapter of the fused layer is three with the same A and the rows of B. Three adapters are one of the fused layer
whose A are stacked and whose B stand on the diagonal: its rank is three times theirs, unless they share their A.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GlmConfig

from glmft.errors import UserError
from glmft.strategies.combining import check_plain, padded

PREFIX = "base_model.model."
FUSED = "self_attention.query_key_value"
QKV = tuple(f"self_attn.{p}_proj" for p in "qkv")
OTHERS = {
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
DOWN, UP = "lora_A.weight", "lora_B.weight"
_PUBLISHED = re.compile(r"transformer\.encoder\.layers\.(\d+)\.(.+?)\.(lora_.+)")
_GLM = re.compile(r"model\.layers\.(\d+)\.(.+?)\.(lora_.+)")

State = dict[str, Tensor]
Parts = dict[tuple[str, str], State]
"""(layer number, module) -> {"lora_A.weight": [r, in], "lora_B.weight": [out, r], ...}."""


def is_published(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of the published layout."""
    return any("transformer.encoder.layers." in name for name in state)


def _parts(state: State, pattern: re.Pattern[str]) -> Parts:
    out: Parts = {}
    for name, tensor in state.items():
        match = pattern.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            raise UserError(f"the adapter has {name}, for which the other layout has no exact name")
        out.setdefault((match[1], match[2]), {})[match[3]] = tensor
    return out


def _rows(config: GlmConfig) -> list[int]:
    groups = config.num_key_value_heads * config.head_dim
    return [config.num_attention_heads * config.head_dim, groups, groups]


def to_glm(raw: Mapping[str, Any], state: State, config: GlmConfig) -> tuple[dict[str, Any], State]:
    """(adapter_config.json, tensors) of the published names -> the same adapter in GLM's.

    Raises:
        UserError: a tensor has no place there (named).
    """
    check_plain(raw, "translated to other layer names")
    out: State = {}
    modules = set()
    for (layer, module), tensors in _parts(state, _PUBLISHED).items():
        targets = QKV if module == FUSED else (OTHERS.get(module, ""),)
        if not targets[0]:
            raise UserError(f"the adapter has {module}, for which GLM has no exact name")
        for kind, tensor in tensors.items():
            by_rows = module == FUSED and "lora_A" not in kind
            if by_rows and tensor.shape[0] != sum(_rows(config)):
                rows = sum(_rows(config))
                raise UserError(f"{module}.{kind} has {tensor.shape[0]} rows, this model's q, k and v have {rows}")
            pieces = tensor.split(_rows(config)) if by_rows else [tensor] * len(targets)
            for target, piece in zip(targets, pieces, strict=True):
                out[f"{PREFIX}model.layers.{layer}.{target}.{kind}"] = piece.clone()
        modules |= {t.rpartition(".")[2] for t in targets}
    return {**raw, "target_modules": sorted(modules)}, out


def to_published(raw: Mapping[str, Any], state: State, config: GlmConfig) -> tuple[dict[str, Any], State]:
    """(adapter_config.json, tensors) of GLM's names -> the same adapter in the published ones.

    All layers get the same rank, filled up with zeros where theirs is smaller, since not every program reads a rank a
    layer; alpha grows with it, so that the scaling stays.

    Raises:
        UserError: DoRA on some of q, k, v only, whose other rows have no magnitudes.
    """
    check_plain(raw, "translated to other layer names")
    found = _parts(state, _GLM)
    rank = int(raw["r"])
    stacked = not all(
        (layer, QKV[0]) in found and torch.equal(parts[DOWN], found[(layer, QKV[0])][DOWN])
        for (layer, module), parts in found.items()
        if module in QKV
    )
    wanted = rank * (len(QKV) if stacked else 1)
    out: State = {}
    modules = set()
    names = {v: k for k, v in OTHERS.items()}
    for layer, module in found:
        published = FUSED if module in QKV else names.get(module, "")
        if not published:
            raise UserError(f"the adapter has {module}, for which the published layout has no exact name")
        modules.add(published.rpartition(".")[2])
        place = f"{PREFIX}transformer.encoder.layers.{layer}.{published}."
        if place + DOWN in out:
            continue  # the other two of q, k, v
        tensors = _fused(found, layer, config, stacked) if module in QKV else found[(layer, module)]
        down, up = padded((tensors[DOWN], tensors[UP]), wanted)
        out |= {place + kind: tensor.clone() for kind, tensor in (tensors | {DOWN: down, UP: up}).items()}
    grown = wanted / rank
    scale = math.sqrt(grown) if raw.get("use_rslora") else grown
    alpha = raw["lora_alpha"] * scale
    alpha = int(alpha) if float(alpha).is_integer() else alpha
    return {**raw, "r": wanted, "lora_alpha": alpha, "target_modules": sorted(modules)}, out


def _fused(found: Parts, layer: str, config: GlmConfig, stacked: bool) -> State:
    """q, k and v of one layer as one; those that are missing have no part in B."""
    parts = [found.get((layer, m)) for m in QKV]
    given = [p for p in parts if p is not None]
    blocks = []
    for part, rows in zip(parts, _rows(config), strict=True):
        like = given[0][UP]
        blocks.append(like.new_zeros(rows, like.shape[1]) if part is None else part[UP])
    out = {DOWN: given[0][DOWN], UP: torch.cat(blocks)}
    if stacked:
        downs = [given[0][DOWN] * 0 if p is None else p[DOWN] for p in parts]
        out = {DOWN: torch.cat(downs), UP: torch.block_diag(*blocks)}
    for kind in given[0]:
        if kind in out:
            continue
        if len(given) < len(parts):
            raise UserError("DoRA on some of q, k and v only has no exact counterpart in the published layout")
        out[kind] = torch.cat([p[kind] for p in given])
    return out
