"""Lightning checkpoints: the best by validation loss, and the last."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from glmft.schema import Positive


class Checkpoints(ModelCheckpoint):
    """best.ckpt and last.ckpt, each with what was trained, the optimizer and the loops.

    Args:
        dirpath: where they lie.
        every_n_train_steps: optimizer steps between two saves; None saves at each validation or epoch end.
    """

    def __init__(self, dirpath: str, every_n_train_steps: Positive | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor="val/loss",
            save_last=True,
            save_top_k=1,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data is not None and len(data.corpus.validation) == 0:
            self.monitor, self.save_top_k = None, 0  # nothing to choose the best by
        super().setup(trainer, pl_module, stage)
