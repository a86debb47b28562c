"""Freeze tuning: the last decoder layers learn, the rest stays."""

from __future__ import annotations

from torch import nn

from glmft.models.loading import glm
from glmft.models.published import PublishedConfig
from glmft.schema import Positive
from glmft.strategies.base import Strategy


class Freeze(Strategy):
    """Only the last layers learn.

    Args:
        num_layers: how many decoder layers, counted from the end.
    """

    def __init__(self, num_layers: Positive = 2) -> None:
        self.num_layers = num_layers

    def check(self, config: PublishedConfig) -> list[str]:
        if self.num_layers > config.num_layers:
            return [f"strategy.num_layers={self.num_layers}: the model has {config.num_layers} layers"]
        return []

    def apply(self, model: nn.Module) -> nn.Module:
        model.requires_grad_(False)
        for layer in glm(model).model.layers[-self.num_layers :]:
            layer.requires_grad_(True)
        return model
