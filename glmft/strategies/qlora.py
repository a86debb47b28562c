"""QLoRA (Dettmers et al. 2023, arXiv:2305.14314): LoRA on a base quantised to 4-bit NormalFloat while it is loaded."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from glmft.models.published import PublishedConfig, linear_shapes
from glmft.schema import Positive, Rate, Share
from glmft.strategies.combining import MOVE_THE_BASE
from glmft.strategies.lora import InitWeights, LoRA

BLOCK = 64  # weights that share one scale


class QLoRA(LoRA):
    """LoRA over frozen 4-bit weights; the options of LoRA and two of the quantisation.

    Args:
        quant_type: "nf4" (NormalFloat) or "fp4".
        double_quant: quantise the scales too (0.4 bit a weight less).
    """

    def __init__(
        self,
        r: Positive = 8,
        alpha: Rate = 16,
        dropout: Share = 0.0,
        targets: Literal["all", "attention"] | list[str] = "all",
        use_rslora: bool = False,
        use_dora: bool = False,
        init_weights: InitWeights = "default",
        quant_type: Literal["nf4", "fp4"] = "nf4",
        double_quant: bool = True,
    ) -> None:
        super().__init__(r, alpha, dropout, targets, use_rslora, use_dora, init_weights)
        self.quant_type, self.double_quant = quant_type, double_quant

    def check(self, config: PublishedConfig) -> list[str]:
        problems = super().check(config)
        if importlib.util.find_spec("bitsandbytes") is None:
            problems.append("strategy=qlora needs bitsandbytes: pip install bitsandbytes, or choose strategy=lora")
        if self.config.init_lora_weights in (*MOVE_THE_BASE, "orthogonal"):
            problems.append(
                f"strategy.init_weights={self.config.init_lora_weights} needs weights that are not quantised; "
                "choose default or gaussian, or strategy=lora"
            )
        if odd := [f"{name} {shape}" for name, shape in linear_shapes(config).items() if shape[0] % BLOCK]:
            problems.append(f"strategy=qlora: widths must be multiples of {BLOCK}, these are not: {', '.join(odd)}")
        return problems

    def quantization(self, dtype: torch.dtype) -> Any:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )

    def apply(self, model: nn.Module) -> nn.Module:
        keep_weights_in_place(model)
        return super().apply(model)


def keep_weights_in_place(model: nn.Module) -> None:
    """On CPUs with AVX512-BF16 the first forward in eval mode repacks the 4-bit weights, after which gradients are
    wrong or missing; this switches that off."""
    import bitsandbytes as bnb

    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
