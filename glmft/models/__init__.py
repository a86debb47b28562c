"""ChatGLM3: configuration, checkpoint files, tokenizer, generation. Heavy modules load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glmft.models.loading import load_model as load_model
    from glmft.models.saving import save_model as save_model
    from glmft.models.tokenizer import load_tokenizer as load_tokenizer

_HOME = {
    "load_model": "glmft.models.loading",
    "save_model": "glmft.models.saving",
    "load_tokenizer": "glmft.models.tokenizer",
}
__all__ = ["load_model", "load_tokenizer", "save_model"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
