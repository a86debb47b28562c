"""Optimizers and learning-rate schedules, as factories that Hydra fills partly and the module completes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from glmft.errors import ResourceError
from glmft.schema import Count, NonNegative, Rate, Share

OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LambdaLR]


def _groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices are decayed, biases and norms are not."""
    params = [p for _, p in named if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def adamw(
    named_params: Iterable[tuple[str, nn.Parameter]],
    lr: Rate = 1e-4,
    weight_decay: NonNegative = 0.0,
    beta1: Share = 0.9,
    beta2: Share = 0.999,
    eps: Rate = 1e-8,
) -> Optimizer:
    """AdamW, in one fused kernel. States take the parameters' dtype."""
    return torch.optim.AdamW(_groups(named_params, weight_decay), lr=lr, betas=(beta1, beta2), eps=eps, fused=True)


def adamw_8bit(
    named_params: Iterable[tuple[str, nn.Parameter]],
    lr: Rate = 1e-4,
    weight_decay: NonNegative = 0.0,
    beta1: Share = 0.9,
    beta2: Share = 0.999,
    eps: Rate = 1e-8,
) -> Optimizer:
    """bitsandbytes' AdamW with 8-bit states (tensors under 4,096 elements keep 32 bit).

    Raises:
        ResourceError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ResourceError("optimizer=adamw_8bit needs bitsandbytes: pip install bitsandbytes") from None
    optimizer: Optimizer = AdamW8bit(_groups(named_params, weight_decay), lr=lr, betas=(beta1, beta2), eps=eps)
    return optimizer


def _schedule(
    optimizer: Optimizer, total_steps: int, warmup_steps: int, warmup_ratio: float, after: Callable[[float], float]
) -> LambdaLR:
    warmup = warmup_steps or math.ceil(total_steps * warmup_ratio)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return after(min(1.0, (step - warmup) / max(1, total_steps - warmup)))

    return LambdaLR(optimizer, factor)


def cosine(
    optimizer: Optimizer,
    total_steps: int,
    warmup_steps: Count = 0,
    warmup_ratio: Share = 0.0,
    min_ratio: Share = 0.0,
) -> LambdaLR:
    """From 0 up over the warm-up (in steps, or as a share of all steps), then half a cosine down to min_ratio."""
    return _schedule(
        optimizer,
        total_steps,
        warmup_steps,
        warmup_ratio,
        lambda done: min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done)),
    )


def linear(
    optimizer: Optimizer,
    total_steps: int,
    warmup_steps: Count = 0,
    warmup_ratio: Share = 0.0,
    min_ratio: Share = 0.0,
) -> LambdaLR:
    """Warm-up, then a straight line down to min_ratio."""
    return _schedule(optimizer, total_steps, warmup_steps, warmup_ratio, lambda done: 1 - (1 - min_ratio) * done)


def constant(optimizer: Optimizer, total_steps: int, warmup_steps: Count = 0, warmup_ratio: Share = 0.0) -> LambdaLR:
    """Warm-up, then the full rate."""
    return _schedule(optimizer, total_steps, warmup_steps, warmup_ratio, lambda done: 1.0)
