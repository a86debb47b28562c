"""The verdict at the end of a run: base against tuned model on training, validation and general prompts."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from glmft.callbacks import find_callback
from glmft.data.corpus import Corpus
from glmft.data.datamodule import InstructionData
from glmft.data.encoding import digest
from glmft.data.mixing import Samples
from glmft.files import read_json, write_json
from glmft.loggers import log_rows
from glmft.messages import Conversation, Message
from glmft.models.generation import evaluating, generate_ids
from glmft.models.hub import PACKAGED
from glmft.models.scoring import Pair, Scores, score_answers
from glmft.models.tokenizer import ChatGLM3Tokenizer
from glmft.module import FineTuner
from glmft.schema import Positive
from glmft.verdict import FOREIGN, Facts, Verdict, compare_answers, compare_scores, judge

GENERAL = PACKAGED / "prompts" / "general.json"
STOP_EXACT = 0.98  # early stopping: share of references that are the tuned model's greedy answer


def verdict_of(trainer: L.Trainer) -> Verdict | None:
    """The verdict of a run that has one already."""
    callback = find_callback(trainer, GiveVerdict)
    return callback.result if callback else None


@dataclass
class Measured:
    """One model: scores of the record sets, its replies to the general prompts, and the scores of those."""

    sets: dict[str, Scores]
    replies: list[list[int]]
    own: Scores


class GiveVerdict(L.Callback):
    """Measures base and tuned model when training ends and writes verdict.json.

    Args:
        run_dir: the run directory.
        max_records: so many training and validation records, chosen by seed.
        max_new_tokens: longest answer to a general prompt.
        general: JSON file of general prompts, [{"prompt", "expect": [words of a right answer]}]; null for the
            packaged ones.
        stop_early: end training when the sampled training records were learned at the end of two epochs in a row.
    """

    def __init__(
        self,
        run_dir: str,
        max_records: Positive = 48,
        max_new_tokens: Positive = 64,
        general: str | None = None,
        stop_early: bool = False,
    ) -> None:
        self.run_dir, self.max_records, self.max_new_tokens = Path(run_dir), max_records, max_new_tokens
        self.general_file, self.stop_early = Path(general) if general else GENERAL, stop_early
        self.result: Verdict | None = None
        self._sets: dict[str, list[Pair]] | None = None  # chosen once
        self._base: Measured | None = None  # of strategies that cannot show the base afterwards
        self._missing: list[str] = []
        self._learned_epochs = 0

    # ---- training

    def on_train_start(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        assert isinstance(tuner, FineTuner)
        if not trainer.is_global_zero:
            return
        self._choose(trainer, tuner)
        with tuner.tuning.base_model(tuner.network) as base:
            if base is None and trainer.global_step == 0:
                self._base = self._measure(tuner.network, tuner)

    def on_train_epoch_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        """All ranks look at the same records, so that they decide alike."""
        assert isinstance(tuner, FineTuner)
        if not self.stop_early:
            return
        sets = self._choose(trainer, tuner)
        if "training" not in sets:
            return
        scores = score_answers(tuner.network, sets["training"], tuner.tokenizer.pad_id)
        self._learned_epochs = self._learned_epochs + 1 if scores.chosen.mean() >= STOP_EXACT else 0
        if self._learned_epochs == 2:
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        assert isinstance(tuner, FineTuner)
        if not trainer.is_global_zero:
            return
        self._choose(trainer, tuner)  # if the run ended before, its last checkpoint left no step to start with
        self.result = self._judge(trainer, tuner)
        write_json(self.run_dir / "verdict.json", self.result.to_json())
        log_rows(trainer.loggers, "verdict", [{"learned": self.result.learned, "kept": self.result.kept}])

    # ---- evidence

    def _choose(self, trainer: L.Trainer, tuner: FineTuner) -> dict[str, list[Pair]]:
        if self._sets is not None:
            return self._sets
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, InstructionData)
        self._data = data
        rng = random.Random("verdict")
        corpus = data.corpus
        chosen = {"training": self._sampled(corpus, [corpus.own], rng)}
        chosen["validation"] = self._sampled(corpus, list(corpus.validation.values()), rng)
        longest = data.max_length
        pairs = {k: [as_pair(tuner.tokenizer, c, longest) for c in v] for k, v in chosen.items() if v}
        self._sets = {k: kept for k, v in pairs.items() if (kept := [p for p in v if len(p[0]) + len(p[1]) <= longest])}
        if "validation" not in pairs:
            self._missing.append("validation: there are no held-out records (data.val_fraction=0.1)")
        if "training" not in self._sets:
            self._missing.append(f"training: every sampled record is longer than data.max_length={longest}")
        self._foreign = foreign_template(chosen["training"])
        trained = data.corpus.train
        first = [trained[i][0].tolist() for i in range(min(8, len(trained)))]
        self._other_layout = not all(starts_alike(tuner.tokenizer, ids) for ids in first)
        seen = set(corpus.own.hashes(of_prompts=True).tolist())
        general = [
            (p, tuner.tokenizer.encode_prompt([Message("user", p["prompt"])])) for p in read_json(self.general_file)
        ]
        general = [(p, ids) for p, ids in general if digest(np.asarray(ids, np.int32).tobytes()) not in seen]
        self._general, self._asked = [p for p, _ in general], [ids for _, ids in general]
        return self._sets

    def _sampled(self, corpus: Corpus, sets: Sequence[Samples], rng: random.Random) -> list[Conversation]:
        total = sum(map(len, sets))
        chosen = sorted(rng.sample(range(total), min(total, self.max_records)))
        found: list[Conversation] = []
        start = 0
        for samples in sets:
            inside = [i - start for i in chosen if start <= i < start + len(samples)]
            found += corpus.conversations(samples, inside)
            start += len(samples)
        return found

    def _judge(self, trainer: L.Trainer, tuner: FineTuner) -> Verdict:
        with tuner.tuning.base_model(tuner.network) as shown:
            base = self._base if shown is None else self._measure(shown, tuner)
        missing = list(self._missing)
        if base is None:
            missing.append("the base, which this strategy changes and a continued run no longer has")
            return judge(None, None, None, self._facts(trainer, missing))
        tuned = self._measure(tuner.network, tuner)
        evidence = {k: compare_scores(base.sets[k], tuned.sets[k]) for k in base.sets}
        general = None
        if self._general:
            said = score_answers(tuner.network, self._said(base.replies, tuner), tuner.tokenizer.pad_id)
            drift = float((said.loss.sum() - base.own.loss.sum()) / said.lengths.sum())
            before, after = ([tuner.tokenizer.parse_reply(r).content for r in m.replies] for m in (base, tuned))
            general = compare_answers(self._general, before, after, drift)
        else:
            missing.append("general prompts: all of them are training records")
        return judge(evidence.get("training"), evidence.get("validation"), general, self._facts(trainer, missing))

    def _measure(self, model: Any, tuner: FineTuner) -> Measured:
        assert self._sets is not None
        pad_id = tuner.tokenizer.pad_id
        sets = {k: score_answers(model, pairs, pad_id) for k, pairs in self._sets.items()}
        with evaluating(model):
            replies = generate_ids(model, self._asked, tuner.tokenizer, self.max_new_tokens) if self._asked else []
        return Measured(sets, replies, score_answers(model, self._said(replies, tuner), pad_id))

    def _said(self, replies: list[list[int]], tuner: FineTuner) -> list[Pair]:
        return [(p, [*r, tuner.tokenizer.eos_id]) for p, r in zip(self._asked, replies, strict=True)]

    def _facts(self, trainer: L.Trainer, missing: Sequence[str]) -> Facts:
        report = self._data.corpus.report()
        optimizers = trainer.optimizers
        lr = optimizers[0].param_groups[0].get("initial_lr", optimizers[0].param_groups[0]["lr"]) if optimizers else 0.0
        return Facts(
            steps=trainer.global_step,
            epochs=None if trainer.max_steps != -1 or trainer.max_epochs == -1 else trainer.max_epochs,
            lr=float(lr),
            truncated=report["truncated"] / max(report["records"], 1),
            max_length=self._data.max_length,
            replay=self._data.replay is not None,
            foreign=self._foreign,
            other_layout=self._other_layout,
            missing=tuple(missing),
        )


def as_pair(tokenizer: ChatGLM3Tokenizer, conversation: Conversation, max_length: int) -> Pair:
    """The last answer that is learned and what asks for it, in the layout of inference; without the earlier turns
    where it would be longer than `max_length` with them."""
    messages = conversation.messages
    answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
    last = next((i for i in reversed(answers) if messages[i].learns), answers[-1])
    answer = tokenizer.encode_answer(messages[last])
    prompt = tokenizer.encode_prompt(messages[:last])
    if len(prompt) + len(answer) > max_length:
        question = max(i for i in range(last) if messages[i].role == "user")
        system = messages[: messages[0].role == "system"]
        prompt = tokenizer.encode_prompt([*system, *messages[question:last]])
    return prompt, answer


def starts_alike(tokenizer: ChatGLM3Tokenizer, ids: list[int]) -> bool:
    """A training sample has the prefix and the role tokens that prompts have."""
    prefix = tokenizer.encode_prompt([])[:2]
    roles = [tokenizer.control_ids[f"<|{r}|>"] for r in ("user", "assistant")]
    return ids[:2] == prefix and any(r in ids for r in roles)


def foreign_template(conversations: Sequence[Conversation]) -> str:
    """The name of a template whose marks stand in at least half of the prompts, or an empty string."""
    texts = [c.prompt[-1].content + c.answer for c in conversations]
    for pattern, name in FOREIGN.items():
        if texts and np.mean([bool(re.search(pattern, t)) for t in texts]) >= 0.5:
            return name
    return ""
