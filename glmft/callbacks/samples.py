"""Fixed prompts, answered at each validation and at the end: what changes while training goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from glmft.files import append_jsonl
from glmft.loggers import log_rows
from glmft.messages import Message
from glmft.models.generation import answer
from glmft.module import FineTuner
from glmft.runs import Run, read_jsonl
from glmft.schema import Positive


class SampleAnswers(L.Callback):
    """Answers prompts with the tuned model (and, before step 1, with the untouched one).

    Args:
        run_dir: the run directory; rows go to samples.jsonl.
        prompts: what is asked.
        max_new_tokens: longest answer.
    """

    def __init__(self, run_dir: str, prompts: list[str], max_new_tokens: Positive = 64) -> None:
        self.run, self.prompts, self.max_new_tokens = Run(Path(run_dir)), list(prompts), max_new_tokens
        self.rows: list[dict[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.rows = [r for r in read_jsonl(self.run.path / "samples.jsonl") if r["prompt"] in self.prompts]
        if trainer.global_step == 0:
            self._ask(trainer, tuner)

    @property
    def base(self) -> list[str]:
        """The answers before step 1, when the adapter did nothing yet."""
        return [r["answer"] for r in self.rows if r["step"] == 0]

    def on_validation_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            self._ask(trainer, tuner)

    def on_train_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        if trainer.is_global_zero and (not self.rows or self.rows[-1]["step"] != trainer.global_step):
            self._ask(trainer, tuner)
        log_rows(trainer.loggers, "samples", self.rows)

    def _ask(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        assert isinstance(tuner, FineTuner)
        if not self.prompts:
            return
        conversations = [(Message("user", p),) for p in self.prompts]
        answers = answer(tuner.network, tuner.tokenizer, conversations, self.max_new_tokens)
        for prompt, text in zip(self.prompts, answers, strict=True):
            row = {"step": trainer.global_step, "prompt": prompt, "answer": text}
            self.rows.append(row)
            append_jsonl(self.run.path / "samples.jsonl", row)

    @property
    def tuned(self) -> list[str]:
        """The latest answers."""
        return [r["answer"] for r in self.rows[-len(self.prompts) :]]
