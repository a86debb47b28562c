"""What every strategy answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glmft.models.published import PublishedConfig
from glmft.models.saving import save_model
from glmft.models.tokenizer import ChatGLM3Tokenizer


class Strategy(ABC):
    """Decides which parameters learn, and how they are kept.

    The life of a strategy: `check` before weights are loaded, `quantization` while they are, `apply` after.
    """

    output = "model"
    """Folder of the run directory that `save` writes."""

    def check(self, config: PublishedConfig) -> list[str]:
        """Problems with this model that can be known from its configuration."""
        return []

    def quantization(self, dtype: torch.dtype) -> Any:
        """A transformers quantization config for loading, or None."""
        return None

    @abstractmethod
    def apply(self, model: nn.Module) -> nn.Module:
        """The model with exactly the parameters that learn requiring gradients."""

    @contextmanager
    def base_model(self, model: nn.Module) -> Iterator[nn.Module | None]:
        """The untuned model, from the same weights where the strategy can; None where it cannot."""
        yield None

    def save(self, model: nn.Module, folder: Path, tokenizer: ChatGLM3Tokenizer, card: str) -> None:
        """Fills an empty folder with what can be used without the run: here, the model in the published layout."""
        save_model(model, folder, tokenizer=tokenizer)  # type: ignore[arg-type]
        (folder / "README.md").write_text(card, encoding="utf-8")
