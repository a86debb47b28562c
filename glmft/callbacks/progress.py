"""Progress in the terminal: a bar where there is one, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from glmft.callbacks import find_callback
from glmft.callbacks.record import RunRecord
from glmft.data.datamodule import total_steps
from glmft.schema import Rate


class TrainingProgress(L.Callback):
    """Loss, learning rate, tokens/s, memory and the time left.

    Args:
        every_seconds: between two lines where the output is no terminal.
    """

    def __init__(self, every_seconds: Rate = 10.0) -> None:
        self.every_seconds = every_seconds
        self._bar: Progress | None = None
        self._task: Any = None
        self._printed = 0.0

    def on_train_start(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        console = Console()
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=console,
            )
            total = total_steps(trainer)
            self._task = self._bar.add_task("train", total=total, completed=trainer.global_step, numbers="")
            self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, tuner: L.LightningModule, *args: Any) -> None:
        record = find_callback(trainer, RunRecord)
        if record is None or not record.latest or not trainer.is_global_zero:
            return
        total = total_steps(trainer)
        numbers = _numbers(record, trainer.global_step, total)
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, numbers=numbers)
        elif time.time() - self._printed >= self.every_seconds or trainer.global_step == total:
            self._printed = time.time()
            print(f"step {trainer.global_step}/{total}  {numbers}", flush=True)

    def on_train_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, tuner: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _numbers(record: RunRecord, step: int, total: int) -> str:
    latest = record.latest
    parts = [f"loss {latest['train/loss']:.4f}", f"lr {latest['lr']:.3g}"]
    if "tokens_per_sec" in latest:
        parts += [f"{latest['tokens_per_sec']:,.0f} tokens/s", f"{latest['memory_gib']:.1f} GiB"]
    return "  ".join([*parts, f"eta {duration(record.eta(step, total) or 0.0)}"])


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
