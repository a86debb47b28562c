"""The language-model loss on supervised rows only.

Shapes: N supervised tokens, H hidden, V rows of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # rows whose logits exist at a time: 1024 x 65,024 x 4 bytes = 254 MiB in fp32


def cross_entropy_sum_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p(target). hidden [N, H], weight [V, H], targets [N] -> scalar fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """As the reference, but logits live for `chunk` rows only and are computed again in the backward pass."""
    if not torch.is_grad_enabled() or hidden.shape[0] <= chunk:
        return torch.stack(
            [
                cross_entropy_sum_reference(h, weight, t)
                for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
            ]
        ).sum()
    parts = [
        checkpoint(cross_entropy_sum_reference, h, weight, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.stack(parts).sum()
