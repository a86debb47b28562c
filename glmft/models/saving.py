"""Writes a model folder: the published layout, tensor for tensor, or transformers' own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import save_torch_state_dict
from transformers import GlmForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from glmft.errors import UserError
from glmft.files import write_json
from glmft.models.conversion import published_mapping
from glmft.models.fast import fast_tokenizer
from glmft.models.published import INV_FREQ, PublishedConfig
from glmft.models.tokenizer import ChatGLM3Tokenizer

Layout = Literal["chatglm", "glm_hf"]

LICENCE = """\
The base model's licence applies. ChatGLM3's weights are free for research; commercial use asks for a registration
with its publisher.
"""
"""What every model card ends with."""


def published_state_dict(model: GlmForCausalLM) -> dict[str, torch.Tensor]:
    """The model's tensors under the published names, `inv_freq` included."""
    loaded_with = getattr(model, "_weight_conversions", None)
    model._weight_conversions = published_mapping()
    try:
        state = revert_weight_conversion(model, model.state_dict())
    finally:
        model._weight_conversions = loaded_with
    inv_freq = getattr(model, "published_inv_freq", None)
    if inv_freq is None:
        inv_freq = model.model.rotary_emb.original_inv_freq.to(model.lm_head.weight.dtype)
    return {**state, INV_FREQ: inv_freq.cpu()}


def published_config(model: GlmForCausalLM) -> PublishedConfig:
    """config.json's content: the source's own keys where the model was loaded, else derived from GLM's."""
    config = model.config
    source: PublishedConfig | None = getattr(model, "published_config", None)
    return PublishedConfig(
        num_layers=config.num_hidden_layers,
        padded_vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        kv_channels=config.head_dim,
        num_attention_heads=config.num_attention_heads,
        multi_query_group_num=config.num_key_value_heads,
        seq_length=config.max_position_embeddings,
        layernorm_epsilon=config.rms_norm_eps,
        rope_ratio=config.rope_parameters["rope_theta"] / 10000.0,
        torch_dtype=str(model.lm_head.weight.dtype).removeprefix("torch."),
        raw=source.raw if source else {},
    )


def save_model(
    model: GlmForCausalLM,
    folder: str | Path,
    layout: Layout = "chatglm",
    tokenizer: ChatGLM3Tokenizer | None = None,
    max_shard_size: str = "2GB",
) -> Path:
    """Writes config.json, safetensors shards and, where given, tokenizer.model, the fast tokenizer with the chat
    template, and the tokens that generation stops at.

    Raises:
        UserError: the folder exists and is not empty, or the layout is unknown.
    """
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target}: exists and is not empty; choose another folder")
    target.mkdir(parents=True, exist_ok=True)
    if layout == "chatglm":
        save_torch_state_dict(published_state_dict(model), target, max_shard_size=max_shard_size)
        write_json(target / "config.json", published_config(model).to_json())
    elif layout == "glm_hf":
        model.save_pretrained(target, max_shard_size=max_shard_size, save_original_format=False)
    else:
        raise UserError(f"layout={layout}: allowed are chatglm, glm_hf")
    if tokenizer is not None:
        shutil.copyfile(tokenizer.model_file, target / "tokenizer.model")
        fast_tokenizer(tokenizer, model.config.max_position_embeddings).save_pretrained(target)
        stops = {"eos_token_id": tokenizer.stop_ids, "pad_token_id": tokenizer.pad_id, "do_sample": False}
        write_json(target / "generation_config.json", stops)
    return target
