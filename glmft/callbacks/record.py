"""metrics.jsonl, status.json, loss.png and summary.json."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from glmft.callbacks.plot import plot_losses
from glmft.data.collate import Batch
from glmft.data.datamodule import total_steps
from glmft.module import FineTuner
from glmft.runs import Run, State, Status
from glmft.schema import Positive


def memory_gib() -> float:
    """Peak memory: allocated on the GPU, else resident in the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class RunRecord(L.Callback):
    """Writes the run directory as training goes; independent of `logger`.

    Args:
        run_dir: the run directory.
        every_n_steps: optimizer steps between two rows of metrics.jsonl.
    """

    def __init__(self, run_dir: str, every_n_steps: Positive = 1) -> None:
        self.run = Run(Path(run_dir))
        self.every_n_steps = every_n_steps
        self.latest: dict[str, float] = {}
        self.best: float | None = None
        self.ended = False
        self.status = Status(self.run)
        self.began = time.time()
        self.first_step = 0
        self._seconds = self._step_began = 0.0  # of training steps alone: no validation, no answers, no saving
        self._tokens = self._row_tokens = 0
        self._row_seconds = 0.0

    # ---- training

    def on_train_start(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        self.first_step = trainer.global_step
        if not trainer.is_global_zero:
            return
        self.run.drop_metrics_after(trainer.global_step or -1)
        rows = self.run.metrics()
        self.began = time.time() - max((r["time"] for r in rows), default=0.0)
        self.best = min((r["val/loss"] for r in rows if "val/loss" in r), default=None)
        self._write_status(trainer, "running")
        if trainer.global_step == 0:
            self._record_sets(trainer)

    def _record_sets(self, trainer: L.Trainer) -> None:
        """How much of each data set is trained on, here and in the loggers."""
        sets = trainer.datamodule.corpus.per_set  # type: ignore[attr-defined]
        counts = {f"data/{name}/{k}": float(n) for name, of in sets.items() for k, n in of.items()}
        self._row(trainer, counts)
        for logger in trainer.loggers:
            logger.log_metrics(counts, step=0)

    def on_train_batch_start(self, trainer: L.Trainer, tuner: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        self._step_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, tuner: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(tuner, FineTuner)
        spent = time.perf_counter() - self._step_began
        tokens = batch.num_tokens * trainer.world_size
        self._seconds, self._row_seconds = self._seconds + spent, self._row_seconds + spent
        self._tokens, self._row_tokens = self._tokens + tokens, self._row_tokens + tokens
        if tuner.step_metrics is None:
            return
        self.latest = dict(tuner.step_metrics)
        if trainer.global_step % self.every_n_steps == 0:
            self.latest["tokens_per_sec"] = self._row_tokens / max(self._row_seconds, 1e-9)
            self.latest["memory_gib"] = memory_gib()
            self._row_tokens, self._row_seconds = 0, 0.0
            self._row(trainer, self.latest)
        self._write_status(trainer, "running")

    def on_validation_start(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        self._write_status(trainer, "validating")

    def on_validation_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        losses = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if trainer.sanity_checking or not losses:
            return
        self.best = min(losses["val/loss"], losses["val/loss"] if self.best is None else self.best)
        self._row(trainer, losses)
        self._write_status(trainer, "running")

    # ---- the end

    def on_train_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        self.ended = True
        self._write_status(trainer, "saving")

    def finish(self, trainer: L.Trainer, summary: dict[str, Any]) -> dict[str, Any]:
        """Writes loss.png and summary.json, after everything else of the run; returns the summary."""
        rows = self.run.metrics()
        plot_losses(rows, self.run.path / "loss.png")
        losses = [r["train/loss"] for r in rows if "train/loss" in r]
        rates = [r["tokens_per_sec"] for r in rows if "tokens_per_sec" in r]  # of an earlier start, if no step was left
        rate = self._tokens / self._seconds if self._seconds else next(reversed(rates), 0.0)
        result = {
            "name": self.run.path.name,
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "seconds": round(max(time.time() - self.began, *(r["time"] for r in rows), 0.0), 2),
            "train/loss first": losses[0] if losses else None,
            "train/loss last": losses[-1] if losses else None,
            "val/loss best": min((r["val/loss"] for r in rows if "val/loss" in r), default=None),
            "tokens_per_sec": round(rate, 1),
            "memory_gib": round(memory_gib(), 3),
            **summary,
        }
        self.run.write_summary(result)
        self._write_status(trainer, "done")
        return result

    def fail(self, state: State, message: str) -> None:
        """The last status of a run that did not end well."""
        self.status.write(state, message=message)

    def _row(self, trainer: L.Trainer, values: dict[str, float]) -> None:
        if trainer.global_rank:
            return
        epoch = trainer.global_step / trainer.datamodule.steps_per_epoch(trainer.world_size)  # type: ignore[attr-defined]
        row = {"step": trainer.global_step, "epoch": round(epoch, 4)}
        self.run.log_metrics(row | {"time": round(time.time() - self.began, 3)} | values)

    def _write_status(self, trainer: L.Trainer, state: State) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        total, step = total_steps(trainer), trainer.global_step
        eta = self.eta(step, total)
        self.status.write(state, step=step, total=total, eta=eta, best=self.best, message="")

    def eta(self, step: int, total: int) -> float | None:
        """Seconds of training left, from the steps of this process; None before the first."""
        made = step - self.first_step
        return self._seconds / made * (total - step) if made else None
