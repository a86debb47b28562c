"""Models of random weights, built on the device, and what a step of theirs costs."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import GlmForCausalLM

from glmft.kernels import attention
from glmft.models.conversion import glm_config
from glmft.models.published import PublishedConfig, linear_shapes

Size = Literal["6b", "tiny"]
SIZES: dict[str, PublishedConfig] = {
    "6b": PublishedConfig(28, 65024, 4096, 13696, 128, 32, 2, 8192),
    "tiny": PublishedConfig(4, 1216, 192, 512, 32, 6, 2, 2048),
}


def random_model(
    size: Size, device: torch.device, dtype: torch.dtype, quantization: Any = None, implementation: str = attention.NAME
) -> GlmForCausalLM:
    """A frozen model of random weights, the same for the same device; its linear layers in 4 bit where asked."""
    attention.register()
    config = glm_config(SIZES[size])
    config._attn_implementation = implementation
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = GlmForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if quantization is not None:
        quantize(model, quantization)
    model.published_config = SIZES[size]
    return model.requires_grad_(False)


def quantize(model: nn.Module, how: Any) -> None:
    """bitsandbytes' 4-bit layers in place of the decoder layers' linear ones, one at a time."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in model.model.layers.modules():  # type: ignore[union-attr]
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear:
                continue
            options = {"compress_statistics": how.bnb_4bit_use_double_quant, "quant_type": how.bnb_4bit_quant_type}
            with torch.device("meta"):
                small = Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=linear.bias is not None,
                    compute_dtype=how.bnb_4bit_compute_dtype,
                    **options,
                )
            weight = linear.weight.data
            small.weight = Params4bit(weight.cpu(), requires_grad=False, module=small, **options).to(weight.device)
            if linear.bias is not None:
                small.bias = nn.Parameter(linear.bias.data, requires_grad=False)
            setattr(parent, name, small)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT asks  # type: ignore[assignment]


def flops(size: Size, lengths: np.ndarray, supervised: int, full: bool) -> float:
    """Floating-point operations of a training step on these documents: 4 a parameter and token where the base is
    frozen (its weights get no gradient), 6 where all learns; the head on supervised tokens; causal attention."""
    config = SIZES[size]
    linear = sum(a * b for a, b in linear_shapes(config).values()) * config.num_layers
    head = config.padded_vocab_size * config.hidden_size
    attention_forward = 2.0 * config.query_rows * config.num_layers * float((lengths.astype(float) ** 2).sum())
    each = 6 if full else 4
    return each * (linear * float(lengths.sum()) + head * supervised) + 3 * attention_forward
