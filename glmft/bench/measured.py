"""What one side of the bench measured."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

BEGAN = time.time()


class Steps:
    """Optimizer steps as they are made: seconds, losses; memory at the end."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.seconds, self.losses = warmup, list[float](), list[float]()
        self.until_first = 0.0
        self._at = time.perf_counter()

    def begin(self) -> None:
        """Starts the clock of the next step; what building the model took is no part of the peak."""
        synchronize()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._at = time.perf_counter()

    def done(self, loss: float | None = None) -> None:
        """A step is done."""
        synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._at)
        self._at = now
        if loss is not None:
            self.losses.append(loss)
        self.until_first = self.until_first or time.time() - BEGAN

    def result(self, tokens: list[int]) -> dict[str, Any]:
        """`tokens` of each step, without padding, from the list of documents."""
        measured = slice(self.warmup, len(self.seconds))
        seconds, counted = self.seconds[measured], tokens[measured]
        return {
            "tokens_per_sec": round(sum(counted) / sum(seconds), 1),
            "step_ms": round(1000 * float(np.median(seconds)), 2),
            "seconds": [round(s, 5) for s in self.seconds],
            "losses": self.losses,
            "tokens": tokens,
            "first_step_seconds": round(self.seconds[0], 2),
            "start_to_first_step_seconds": round(self.until_first, 1),
            **memory(),
        }


def memory() -> dict[str, float]:
    """Peaks of this process, GiB."""
    if not torch.cuda.is_available():
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"allocated_gib": round(allocated / 2**30, 2), "reserved_gib": round(reserved / 2**30, 2)}


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
