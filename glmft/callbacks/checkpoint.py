"""Checkpoints of a run: the newest and the best by validation loss, each a verified folder."""

from __future__ import annotations

import time
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from glmft.artefacts import SaveFailed, remove
from glmft.checkpoints import CheckpointFiles
from glmft.module import FineTuner
from glmft.runs import Run
from glmft.schema import Positive, Rate

FAILURES = 3  # saves in a row that may fail before the run ends


class Checkpoints(Checkpoint):
    """Writes checkpoints/step-N: what was trained, the optimizer, the loops, and a manifest.

    Saves happen between optimizer steps only. A new one is whole and verified before an older one is removed.

    Args:
        run_dir: the run directory.
        every_n_train_steps: optimizer steps between two saves, besides those at each validation, at the end of an
            epoch, and at the end.
        every_minutes: longest time between two saves.
    """

    def __init__(
        self, run_dir: str, every_n_train_steps: Positive | None = None, every_minutes: Rate | None = 10.0
    ) -> None:
        self.run, self.every_n_train_steps, self.every_minutes = Run(Path(run_dir)), every_n_train_steps, every_minutes
        self.saved_step = -1
        self._saved_at = time.monotonic()
        self._failures = 0
        self._waiting = False  # to be saved at the end of the step

    def on_train_start(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        self._saved_at = time.monotonic()

    def on_train_batch_start(self, trainer: L.Trainer, tuner: L.LightningModule, *args: object) -> None:
        assert isinstance(tuner, FineTuner)
        if self.every_minutes and time.monotonic() - self._saved_at > 60 * self.every_minutes:
            tuner.wants["save"] = 1  # ranks agree on it, since their clocks differ

    def on_train_batch_end(self, trainer: L.Trainer, tuner: L.LightningModule, *args: object) -> None:
        assert isinstance(tuner, FineTuner)
        if tuner.step_metrics is None or at_last_batch(trainer):  # mid-step; the end of an epoch saves by itself
            return
        due = tuner.agreed["save"] or (self.every_n_train_steps and trainer.global_step % self.every_n_train_steps == 0)
        if due or self._waiting:
            self.save(trainer)
            tuner.wants["save"] = 0

    def on_validation_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.sanity_checking or loss is None:
            return
        assert isinstance(tuner, FineTuner)
        tuner.validated = {"step": trainer.global_step, "val/loss": float(loss)}
        if trainer.fit_loop._should_accumulate():  # validated in the middle of a step: saved at its end
            self._waiting = True
        else:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        self.save_once(trainer)

    def on_train_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        self.save_once(trainer)
        if self.saved_step != trainer.global_step:
            raise SaveFailed(
                f"{self.run.checkpoints}: the last step could not be saved; free some space, and run it again"
            )

    def save_once(self, trainer: L.Trainer) -> None:
        """Saves, unless this step is saved already."""
        if self.saved_step != trainer.global_step:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Saves now; then older checkpoints are removed, but the best.

        Raises:
            SaveFailed: for the third time in a row; until then it is said, and tried again at the next time.
        """
        self._waiting, self._saved_at = False, time.monotonic()
        trainer.save_checkpoint(self.run.checkpoint(trainer.global_step))
        files = trainer.strategy.checkpoint_io
        assert isinstance(files, CheckpointFiles)
        failure = str(files.failure) if files.failure else None
        if trainer.world_size > 1:  # only the first rank writes
            failure = trainer.strategy.broadcast(failure)
        if failure is None:
            self.saved_step, self._failures = trainer.global_step, 0
            if trainer.is_global_zero:
                self._rotate(trainer.global_step)
            return
        self._failures += 1
        if self._failures == FAILURES:
            raise SaveFailed(failure)
        if trainer.is_global_zero:
            print(f"glmft: {failure}; the run goes on and tries again", flush=True)

    def _rotate(self, newest: int) -> None:
        """Keeps the one just written and the best."""
        found = self.run.manifests()
        scored = [(m["val/loss"], -step) for step, m in found.items() if m.get("val/loss") is not None]
        best = -min(scored)[1] if scored else None
        for step in found:
            if step not in (newest, best):
                remove(self.run.checkpoint(step))


def at_last_batch(trainer: L.Trainer) -> bool:
    """The epoch, or the run, ends with this batch."""
    return trainer.fit_loop.epoch_loop._is_training_done
