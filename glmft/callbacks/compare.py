"""At the end of a run: base and tuned answers on named data sets, counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L

from glmft.data.corpus import CorpusSpec, prepare
from glmft.messages import Conversation
from glmft.models.generation import answer
from glmft.module import FineTuner
from glmft.schema import Positive


@dataclass(frozen=True)
class Comparison:
    """Shares of a data set's records, 0 to 1."""

    records: int
    base_equal: float  # the base gives the reference answer
    tuned_equal: float
    tuned_right: float | None  # of the references with filled-in values: the tuned answer holds them all
    kept: float  # the tuned answer is the base's


class Compare(L.Callback):
    """Answers data sets with the base (the same weights, adapter off) and with the tuned model.

    Args:
        datasets: names of data sets, shown under these names.
        fill: values of the blanks in their records, which a right answer must hold.
        dir: folder of dataset_info.json.
        max_records: so many of each set.
        max_new_tokens: longest answer.
    """

    def __init__(
        self,
        datasets: list[str],
        fill: dict[str, str | int | float] | None = None,
        dir: str | None = None,
        max_records: Positive = 200,
        max_new_tokens: Positive = 48,
    ) -> None:
        self.datasets, self.fill, self.dir = list(datasets), {k: str(v) for k, v in (fill or {}).items()}, dir
        self.max_records, self.max_new_tokens = max_records, max_new_tokens
        self.results: dict[str, Comparison] = {}

    def on_train_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        assert isinstance(tuner, FineTuner)
        if not trainer.is_global_zero:
            return
        for name in self.datasets:
            spec = CorpusSpec.of(tuner.folder, datasets=[name], dir=self.dir, fill=self.fill)
            corpus = prepare(spec)
            conversations = corpus.conversations(corpus.own, range(min(len(corpus.own), self.max_records)))
            with tuner.tuning.base_model(tuner.network) as base:
                if base is None:  # the strategy changed the base itself
                    return
                before = self._answers(base, tuner, conversations)
            after = self._answers(tuner.network, tuner, conversations)
            self.results[name] = compare(conversations, before, after, list(self.fill.values()))

    def _answers(self, model: Any, tuner: FineTuner, conversations: list[Conversation]) -> list[str]:
        return answer(model, tuner.tokenizer, conversations, self.max_new_tokens, batch_size=64)


def compare(conversations: list[Conversation], base: list[str], tuned: list[str], values: list[str]) -> Comparison:
    """Counts answers against the references and against each other."""
    n = len(conversations)
    references = [c.answer for c in conversations]
    wanted = [[v for v in values if v in r] for r in references]
    right = [all(v in t for v in w) for w, t in zip(wanted, tuned, strict=True) if w]
    return Comparison(
        records=n,
        base_equal=sum(map(str.__eq__, base, references)) / n,
        tuned_equal=sum(map(str.__eq__, tuned, references)) / n,
        tuned_right=sum(right) / len(right) if right else None,
        kept=sum(map(str.__eq__, tuned, base)) / n,
    )
