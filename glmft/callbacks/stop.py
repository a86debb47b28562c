"""Signals: finish the step, save, and leave with 128 + the signal's number."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from glmft.callbacks import find_callback
from glmft.callbacks.checkpoint import Checkpoints, at_last_batch
from glmft.module import FineTuner

REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)  # sent by SLURM before its time limit (sbatch --signal=USR1@300)
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *REQUEUE)


class GracefulStop(Checkpoint):  # a Checkpoint, so that Lightning calls it behind Checkpoints
    """Catches signals from `install` to `restore`.

    While optimizer steps are made, a signal waits for the end of the step and the save that follows; all ranks stop
    after the same step. Before and after, nothing can be half done: it ends the run at once. So does a second Ctrl-C.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._tuner: FineTuner | None = None  # while steps are made
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Takes over the signals."""
        self._before |= {s: signal.getsignal(s) for s in HANDLED if s not in self._before}
        for s in HANDLED:
            signal.signal(s, self._handle)

    def restore(self) -> None:
        """Gives them back."""
        for s, handler in self._before.items():
            signal.signal(s, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None and number == signal.SIGINT
        self.signal = self.signal or signal.Signals(number)
        if self._tuner is None or again:
            raise SystemExit(128 + number)
        self._tuner.wants["stop"] = int(self.signal)
        hint = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
        print(f"glmft: {self.signal.name}: finishing the step, then saving{hint}", flush=True)

    # ---- called by Lightning

    def on_train_start(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        assert isinstance(tuner, FineTuner)
        self.install()  # Lightning has put its own in their place
        self._tuner = tuner

    def on_train_batch_end(self, trainer: L.Trainer, tuner: L.LightningModule, *args: object) -> None:
        assert isinstance(tuner, FineTuner)
        if tuner.step_metrics is not None and tuner.agreed["stop"] and not at_last_batch(trainer):
            self._leave(trainer, tuner)

    def on_validation_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        self._leave_between(trainer, tuner)

    def on_train_epoch_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        self._leave_between(trainer, tuner)

    def on_train_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        self._tuner = None

    def _leave_between(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        """At the end of a validation or an epoch, where the signal may have come since the last step."""
        assert isinstance(tuner, FineTuner)
        if self._tuner is None or trainer.fit_loop._should_accumulate():
            return
        wanted = tuner.agreed["stop"] or tuner.wants["stop"]
        if trainer.world_size > 1:
            wanted = int(trainer.strategy.reduce_boolean_decision(bool(wanted), all=False)) and (
                wanted or signal.SIGTERM
            )
        if wanted:
            tuner.agreed["stop"] = int(wanted)
            self._leave(trainer, tuner)

    def _leave(self, trainer: L.Trainer, tuner: FineTuner) -> None:
        number = signal.Signals(tuner.agreed["stop"])
        checkpoints = find_callback(trainer, Checkpoints)
        if checkpoints is not None:
            checkpoints.save_once(trainer)
            if checkpoints.saved_step != trainer.global_step and trainer.is_global_zero:
                print(f"glmft: step {trainer.global_step} is not saved", flush=True)
        self._tuner = None
        if number in REQUEUE and trainer.is_global_zero:
            requeue()
        raise SystemExit(128 + number)


def requeue() -> None:
    """Puts this SLURM job back into the queue; the run's name follows from the job's id, so it goes on there."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    if not re.fullmatch(r"[0-9_]+", job):
        print("glmft: no SLURM job to put back into the queue", flush=True)
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        said = done.stderr.strip() or "done"
    except (OSError, subprocess.TimeoutExpired) as e:
        said = str(e)
    print(f"glmft: scontrol requeue {job}: {said}", flush=True)
