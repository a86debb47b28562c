"""The trained adapter (or model) in the run directory, with a model card."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from glmft.artefacts import write_folder
from glmft.callbacks.card import model_card
from glmft.module import FineTuner


class SaveTuned(L.Callback):
    """Writes what was trained in a form that others load: `adapter/` in PEFT's format, or `model/`.

    Args:
        run_dir: the run directory.
        at_validation: also after each validation, so that it can be tried while training goes on.
    """

    def __init__(self, run_dir: str, at_validation: bool = False) -> None:
        self.run_dir, self.at_validation = Path(run_dir), at_validation

    def on_validation_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        if self.at_validation and not trainer.sanity_checking:
            self._save(trainer, tuner)

    def on_train_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        self._save(trainer, tuner)

    def _save(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        assert isinstance(tuner, FineTuner)
        if trainer.is_global_zero:
            folder = self.run_dir / tuner.tuning.output
            card = model_card(trainer, tuner, self.run_dir)
            facts = {"step": trainer.global_step, "strategy": type(tuner.tuning).__name__, **tuner.facts}
            write_folder(folder, lambda part: tuner.tuning.save(tuner.network, part, tuner.tokenizer, card), facts)
