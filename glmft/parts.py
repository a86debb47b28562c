"""Micro-batches computed whole, or in parts once memory ran out, with the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glmft.data.collate import Batch, split

MOST = 64


class Parts:
    """Where memory runs out, the gradients of the step so far are dropped, and its micro-batches are computed again in
    twice as many parts: nothing is lost, and the sum is the same.

    Args:
        share: a batch's share of the step's loss, scalar with a graph.
        forget: drops what the step has so far: its gradients and its loss.
        accumulate: micro-batches of a step, by which Lightning divides the loss of a whole one.
        allowed: whether a step may be split at all; of several ranks, the others would wait for gradients.
    """

    def __init__(
        self,
        share: Callable[[Batch], Tensor],
        forget: Callable[[], None],
        accumulate: Callable[[], int],
        allowed: Callable[[], bool],
    ) -> None:
        self.share, self.forget, self.accumulate, self.allowed = share, forget, accumulate, allowed
        self.number = 1
        self._repeat = False  # the gradients of this step were dropped

    def forward(self, batch: Batch) -> Tensor | None:
        """The batch's share of the loss, or None where `backward` has to compute it in parts."""
        if self.number == 1:
            try:
                return self.share(batch)
            except torch.OutOfMemoryError:
                self._more()
        return None

    def backward(self, loss: Tensor | None, window: Sequence[Batch], *args: Any, **kwargs: Any) -> None:
        """Adds the gradients of the last batch of a step's window; of all of them, where they were dropped.

        Raises:
            torch.OutOfMemoryError: no further split is possible.
        """
        again = self._repeat
        if loss is not None:
            try:
                loss.backward(*args, **kwargs)
                return
            except torch.OutOfMemoryError:
                self._more()
                again = True
        del loss
        while True:
            self._repeat = False
            try:
                for batch in window if again else window[-1:]:
                    self._in_parts(batch)
                return
            except torch.OutOfMemoryError:
                self._more()
                again = True

    def _more(self) -> None:
        """Called while an out-of-memory error is handled; raises it again where nothing can be split."""
        if not self.allowed() or self.number >= MOST:
            raise
        self.number, self._repeat = 2 * self.number, True
        print(f"glmft: out of memory: micro-batches are computed in {self.number} parts from here on", flush=True)
        self.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _in_parts(self, batch: Batch) -> None:
        for part in split(batch, self.number):
            share = self.share(part) / self.accumulate()
            share.backward()  # type: ignore[no-untyped-call]
            del share
