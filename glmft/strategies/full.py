"""Full fine-tuning: every parameter learns."""

from __future__ import annotations

from torch import nn

from glmft.strategies.base import Strategy


class Full(Strategy):
    """All parameters learn. On the 6B: 12.5 GB of weights, as much of gradients, and the optimizer's states."""

    def apply(self, model: nn.Module) -> nn.Module:
        return model.requires_grad_(True)
