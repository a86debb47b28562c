"""Lightning checkpoints: the best by validation loss, and the last."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from glmft.module import FineTuner
from glmft.schema import Positive


class Checkpoints(Checkpoint):
    """best.ckpt and last.ckpt, each with what was trained, the optimizer and the loops.

    Lightning's ModelCheckpoint saves nothing between validations where it monitors the validation loss; here the last
    checkpoint does not wait for a metric. Saves happen between optimizer steps only.

    Args:
        dirpath: where they lie.
        every_n_train_steps: optimizer steps between two saves of last.ckpt, besides those at each validation, at the
            end of an epoch without validation, and at the end.
    """

    def __init__(self, dirpath: str, every_n_train_steps: Positive | None = None) -> None:
        self.folder, self.every_n_train_steps = Path(dirpath), every_n_train_steps
        self.best: float | None = None
        self._saved_step = -1
        self._waiting = ""  # or "last", "best": to be saved at the end of the step

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_batch_end(self, trainer: L.Trainer, tuner: L.LightningModule, *args: Any) -> None:
        assert isinstance(tuner, FineTuner)
        if tuner.step_metrics is None:  # in the middle of an optimizer step
            return
        due = self.every_n_train_steps and trainer.global_step % self.every_n_train_steps == 0
        if due or self._waiting:
            self._save(trainer)
        if self._waiting == "best":
            self._keep_as_best(trainer)
        self._waiting = ""

    def on_validation_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.sanity_checking or loss is None:
            return
        better = self.best is None or float(loss) < self.best
        self.best = float(loss) if better else self.best
        if trainer.fit_loop._should_accumulate():  # validated in the middle of a step: saved at its end
            self._waiting = "best" if better else "last"
            return
        self._save(trainer)
        if better:
            self._keep_as_best(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        if self._saved_step != trainer.global_step:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        if self._saved_step != trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self._saved_step = trainer.global_step

    def _keep_as_best(self, trainer: L.Trainer) -> None:
        """best.ckpt becomes another name of the file just written: saving replaces files, it never changes them."""
        if not trainer.is_global_zero:
            return
        part = self.folder / ".best.part"
        part.unlink(missing_ok=True)
        try:
            os.link(self.folder / "last.ckpt", part)
        except OSError:  # a file system without hard links
            shutil.copyfile(self.folder / "last.ckpt", part)
        part.replace(self.folder / "best.ckpt")
