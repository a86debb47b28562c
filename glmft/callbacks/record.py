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
from glmft.module import FineTuner, total_steps
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
        self.began = self.fit_began = time.time()
        self.best: float | None = None
        self._status: Status | None = None
        self._tokens = self._all_tokens = 0
        self._tick = time.perf_counter()

    # ---- training

    def on_train_start(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        if trainer.global_rank:
            return
        self._status = Status(self.run)
        rows = self.run.metrics()
        self.run.drop_metrics_after(trainer.global_step)
        if trainer.global_step:
            self.began -= max((r["time"] for r in rows if r["step"] <= trainer.global_step), default=0.0)
        self.fit_began = time.time()
        self._tick = time.perf_counter()
        self._write_status(trainer, "running")

    def on_train_batch_end(
        self, trainer: L.Trainer, tuner: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(tuner, FineTuner)
        self._tokens += batch.num_tokens * trainer.world_size
        if tuner.step_metrics is None:
            return
        self.latest = dict(tuner.step_metrics)
        if trainer.global_step % self.every_n_steps == 0:
            now = time.perf_counter()
            self.latest["tokens_per_sec"] = self._tokens / max(now - self._tick, 1e-9)
            self.latest["memory_gib"] = memory_gib()
            self._all_tokens += self._tokens
            self._tokens, self._tick = 0, now
            self._row(trainer, self.latest)
        self._write_status(trainer, "running")

    def on_validation_start(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        self._write_status(trainer, "validating")

    def on_validation_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        value = trainer.callback_metrics.get("val/loss")
        if trainer.sanity_checking or value is None:
            return
        loss = float(value)
        self.best = loss if self.best is None else min(self.best, loss)
        self._row(trainer, {"val/loss": loss})
        self._tick = time.perf_counter()  # validation is not training time
        self._write_status(trainer, "running")

    # ---- the end

    def on_train_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        self._write_status(trainer, "saving")

    def finish(self, trainer: L.Trainer, summary: dict[str, Any]) -> dict[str, Any]:
        """Writes loss.png and summary.json, after everything else of the run; returns the summary."""
        rows = self.run.metrics()
        plot_losses(rows, self.run.path / "loss.png")
        losses = [r["train/loss"] for r in rows if "train/loss" in r]
        result = {
            "name": self.run.path.name,
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "seconds": round(time.time() - self.began, 2),
            "train/loss first": losses[0] if losses else None,
            "train/loss last": losses[-1] if losses else None,
            "val/loss best": self.best,
            "tokens_per_sec": round(self._all_tokens / max(time.time() - self.fit_began, 1e-9), 1),
            "memory_gib": round(memory_gib(), 3),
            **summary,
        }
        self.run.write_summary(result)
        self._write_status(trainer, "done")
        return result

    def fail(self, state: State, message: str) -> None:
        """The last status of a run that did not end well."""
        (self._status or Status(self.run)).write(state, message=message)

    def _row(self, trainer: L.Trainer, values: dict[str, float]) -> None:
        if trainer.global_rank:
            return
        epoch = trainer.global_step / trainer.datamodule.steps_per_epoch(trainer.world_size)  # type: ignore[attr-defined]
        row = {"step": trainer.global_step, "epoch": round(epoch, 4)}
        self.run.log_metrics(row | {"time": round(time.time() - self.began, 3)} | values)

    def _write_status(self, trainer: L.Trainer, state: State) -> None:
        if self._status is None or trainer.sanity_checking:
            return
        total = total_steps(trainer)
        done = trainer.global_step
        spent = time.time() - self.fit_began
        eta = spent / done * (total - done) if done else None
        self._status.write(state, step=done, total=total, eta=eta, best=self.best, message="")
