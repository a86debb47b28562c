"""What is looked for in every optimizer step."""

from __future__ import annotations

from glmft.errors import GlmftError


class Spikes:
    """Finds losses far above those before: more than six standard deviations, by running estimates."""

    def __init__(self) -> None:
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def seen(self, loss: float, weight: float = 0.95) -> bool:
        """Takes the loss of a step; true where it is a spike."""
        away = loss - self.mean
        spike = self.count >= 20 and away > 6 * self.variance**0.5 and away > 0.2 * self.mean
        self.count += 1
        weight = min(weight, 1 - 1 / self.count)
        self.mean += (1 - weight) * away
        self.variance = weight * (self.variance + (1 - weight) * away**2)
        return spike


class TrainingStopped(GlmftError):
    """Training cannot go on: the loss or a gradient is not finite, or the loss is exactly zero."""
