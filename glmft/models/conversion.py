"""Published ChatGLM3 names <-> transformers' GLM names, in transformers' own conversion mechanism.

transformer.encoder.layers.N.self_attention.query_key_value   [Q + 2K, H]   rows: q, k, v
model.layers.N.self_attn.{q,k,v}_proj                         [Q, H], [K, H], [K, H]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GlmConfig, conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from glmft.models.published import PublishedConfig

_RENAMED = (
    ("transformer.embedding.word_embeddings", "model.embed_tokens"),
    ("transformer.encoder.final_layernorm", "model.norm"),
    ("transformer.output_layer", "lm_head"),
    ("transformer.encoder.layers", "model.layers"),
    ("self_attention.dense", "self_attn.o_proj"),
    ("mlp.dense_h_to_4h", "mlp.gate_up_proj"),
    ("mlp.dense_4h_to_h", "mlp.down_proj"),
)


def _only(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, list) else value


class SplitQKV(ConversionOps):
    """[Q + 2K, ...] -> [Q, ...], [K, ...], [K, ...], with the sizes of the model's configuration."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], target_patterns: list[str], model: Any = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        (fused,) = (_only(v) for v in input_dict.values())
        config = model.config
        groups = config.num_key_value_heads * config.head_dim
        parts = fused.split([config.num_attention_heads * config.head_dim, groups, groups])
        # clones: a view would keep the fused tensor alive and could not be saved on its own
        return {name: part.clone() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return JoinQKV()


class JoinQKV(ConversionOps):
    """The reverse: q, k, v rows into one tensor."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, torch.Tensor]:
        return {target_patterns[0]: torch.cat([_only(input_dict[p]) for p in source_patterns])}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitQKV()


def published_mapping() -> list[WeightRenaming | WeightConverter]:
    """Seven renamings and two conversions."""
    mapping: list[WeightRenaming | WeightConverter] = [WeightRenaming(a, b) for a, b in _RENAMED]
    for kind in ("weight", "bias"):
        parts = [f"self_attn.{p}_proj.{kind}" for p in "qkv"]
        mapping.append(WeightConverter(f"self_attention.query_key_value.{kind}", parts, [SplitQKV()]))
    return mapping


@contextmanager
def published_layout() -> Iterator[None]:
    """Inside, transformers reads and writes GLM checkpoints in the published layout.

    The registry is process-wide, so the entry is taken back at the end: other GLM models of this process, and
    PEFT, see transformers as it was.
    """
    conversion_mapping.get_checkpoint_conversion_mapping("glm")  # builds the table
    table = conversion_mapping._checkpoint_conversion_mapping_cache
    before = table.get("glm")
    conversion_mapping.register_checkpoint_conversion_mapping("glm", published_mapping(), overwrite=True)
    try:
        yield
    finally:
        table.pop("glm") if before is None else table.update(glm=before)
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard("glm")


def glm_config(config: PublishedConfig, **more: Any) -> GlmConfig:
    """The published configuration in GLM's terms: rope_theta = 10000 x rope_ratio, half of each head rotated."""
    return GlmConfig(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.multi_query_group_num,
        head_dim=config.kv_channels,
        max_position_embeddings=config.seq_length,
        rms_norm_eps=config.layernorm_epsilon,
        attention_bias=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0 * config.rope_ratio,
            "partial_rotary_factor": 0.5,
        },
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
        **more,
    )
