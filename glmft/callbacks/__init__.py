"""What happens around training: the run record, progress, sample answers, the adapter, comparison and verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import lightning as L

T = TypeVar("T")


def find_callback(trainer: L.Trainer, kind: type[T]) -> T | None:
    """The trainer's first callback of a class, or None."""
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]
