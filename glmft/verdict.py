"""Did a run do anything, and did it break anything? Judged from likelihoods and answers of base and tuned model.

*learned*: did the answers of the records become likelier, and are they now the model's own first choice?
*kept*: does the tuned model still answer general prompts as the base did?
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from glmft.models.scoring import Scores

Grade = Literal["yes", "weak", "no", "unknown"]
GAIN_YES, GAIN_WEAK = 0.05, 0.01  # share of the base's loss that is gone
CHANGED = 0.02  # share of answer tokens where another token became the first choice
KEPT_YES, KEPT_WEAK = 0.9, 0.75  # of the general prompts that the base answers right, those still right
DRIFT_YES, DRIFT_WEAK = 0.2, 0.6  # nats a token, where too few of them can be judged
ENOUGH = 10  # general prompts that the base must answer right to be judged by
REPETITION = 0.1  # more of the answers' 4-grams repeated than in the base's
FOREIGN = {  # marks of other models' templates that users leave in their records
    r"\[Round \d+\]": "ChatGLM2",
    r"\[gMASK\]|<\|(user|assistant|system|observation)\|>": "ChatGLM3 (glmft adds it itself)",
    r"<\|im_(start|end)\|>": "ChatML",
    r"\[/?INST\]": "Llama 2",
    r"###\s*(Instruction|Response|Input)": "Alpaca",
}


@dataclass(frozen=True)
class Learned:
    """One set of records, base against tuned. Losses in nats a token; `gain` with its 95 % bootstrap interval."""

    records: int
    base_loss: float
    tuned_loss: float
    gain: float
    low: float
    high: float
    base_exact: float
    """Share of records whose reference is the base's greedy answer."""
    tuned_exact: float
    changed: float
    """Share of answer tokens where base and tuned model prefer different ones."""

    @property
    def share(self) -> float:
        """Of the base's loss that is gone."""
        return self.gain / max(self.base_loss, 1e-9)


def compare_scores(base: Scores, tuned: Scores, seed: int = 0) -> Learned:
    """Evidence of one set; both scores are of the same answers."""
    b, t, n = base.per_answer(base.loss), tuned.per_answer(tuned.loss), base.lengths
    draws = np.random.default_rng(seed).integers(0, len(n), (2000, len(n)))
    gains = (b - t)[draws].sum(1) / n[draws].sum(1)
    low, high = np.quantile(gains, [0.025, 0.975])
    return Learned(
        records=len(n),
        base_loss=float(b.sum() / n.sum()),
        tuned_loss=float(t.sum() / n.sum()),
        gain=float((b - t).sum() / n.sum()),
        low=float(low),
        high=float(high),
        base_exact=float(base.chosen.mean()),
        tuned_exact=float(tuned.chosen.mean()),
        changed=float((base.choice != tuned.choice).mean()),
    )


@dataclass(frozen=True)
class Kept:
    """The general prompts, base against tuned."""

    prompts: int
    base_right: int
    still_right: int
    """Of those that the base answers right."""
    same: float
    """Share of answers that are the base's, word for word."""
    drift: float
    """How much less likely the tuned model finds the base's answers, nats a token."""
    base_repetition: float
    tuned_repetition: float
    lost: list[str] = field(default_factory=list)
    """Some prompts that are no longer answered right."""


def is_right(answer: str, expect: Sequence[str]) -> bool:
    """An answer holds one of the expected words; an expected number is the last number of the answer."""
    numbers = re.findall(r"\d+", answer)
    return any(numbers[-1:] == [e] if e.isdigit() else e in answer.lower() for e in expect)


def repetition(answers: Sequence[str], n: int = 4) -> float:
    """Share of character n-grams that already occurred in the same answer."""
    seen = total = 0
    for answer in answers:
        grams = Counter(answer[i : i + n] for i in range(len(answer) - n + 1))
        total += grams.total()
        seen += grams.total() - len(grams)
    return seen / total if total else 0.0


def compare_answers(prompts: Sequence[dict[str, Any]], base: Sequence[str], tuned: Sequence[str], drift: float) -> Kept:
    """Evidence of the general prompts: {"prompt", "expect"}, and both models' answers to them."""
    right = [i for i, p in enumerate(prompts) if is_right(base[i], p["expect"])]
    lost = [i for i in right if not is_right(tuned[i], prompts[i]["expect"])]
    return Kept(
        prompts=len(prompts),
        base_right=len(right),
        still_right=len(right) - len(lost),
        same=sum(map(str.__eq__, base, tuned)) / max(len(prompts), 1),
        drift=drift,
        base_repetition=repetition(base),
        tuned_repetition=repetition(tuned),
        lost=[f"{prompts[i]['prompt']} -> {tuned[i]}" for i in lost[:5]],
    )


@dataclass(frozen=True)
class Facts:
    """What is known of the run itself, for reasons and advice."""

    steps: int
    epochs: int | None
    """Of `trainer.max_epochs`; None where steps decide."""
    lr: float
    truncated: float = 0.0
    """Share of records that were cut."""
    max_length: int = 0
    replay: bool = False
    foreign: str = ""
    """Another model's template in the records, by name."""
    other_layout: bool = False
    """The records were encoded in another layout than prompts are."""
    missing: tuple[str, ...] = ()
    """Evidence that could not be had, each with its reason."""


@dataclass(frozen=True)
class Advice:
    """A next step: why, and what to change ({} where a command cannot do it)."""

    why: str
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The judgement with its evidence."""

    learned: Grade
    kept: Grade
    training: Learned | None
    validation: Learned | None
    general: Kept | None
    reasons: list[str]
    advice: list[Advice]
    missing: list[str]

    def to_json(self) -> dict[str, Any]:
        """verdict.json."""
        return asdict(self)


def judge(training: Learned | None, validation: Learned | None, general: Kept | None, facts: Facts) -> Verdict:
    """From evidence to grades, reasons and next steps. What is missing makes a grade "unknown", never a guess."""
    reasons: list[str] = []
    learned = _grade_learned(training, validation, reasons)
    if facts.foreign:
        reasons.append(f"the records carry the template of {facts.foreign}; only such prompts are answered as trained")
    if facts.other_layout:
        reasons.append("the records were encoded in another layout than prompts are: what was learned is not asked for")
        learned = "weak" if learned == "yes" else learned
    kept = _grade_kept(general, reasons)
    if facts.truncated > 0.1:
        reasons.append(f"{facts.truncated:.0%} of the records were cut at data.max_length={facts.max_length}")
    advice = _advise(learned, kept, training, validation, facts)
    return Verdict(learned, kept, training, validation, general, reasons, advice, list(facts.missing))


def _grade_learned(training: Learned | None, validation: Learned | None, reasons: list[str]) -> Grade:
    if training is None:
        return "unknown"
    if training.gain == 0.0 and training.changed == 0.0:
        reasons.append("the tuned model is the base: what was trained is zero, or is not used")
        return "no"
    if training.low <= 0 or training.share < GAIN_WEAK:
        reasons.append("the answers of the training records did not become likelier")
        return "no"
    if training.share < GAIN_YES:
        reasons.append(f"only {training.share:.1%} of the base's loss is gone")
        return "weak"
    if training.changed < CHANGED:
        reasons.append("the answers became likelier, but the base's are still preferred")
        return "weak"
    if validation is not None and validation.low <= 0:
        reasons.append("learned by heart: held-out records did not become likelier")
        return "weak"
    return "yes"


def _grade_kept(general: Kept | None, reasons: list[str]) -> Grade:
    if general is None:
        return "unknown"
    repeats = general.tuned_repetition - general.base_repetition > REPETITION
    if repeats:
        reasons.append(
            f"answers to general prompts repeat themselves: {general.base_repetition:.0%} -> "
            f"{general.tuned_repetition:.0%} of their 4-grams"
        )
    if general.base_right >= ENOUGH:
        share = general.still_right / general.base_right
        if share < KEPT_YES:
            reasons.append(f"{general.base_right - general.still_right} general prompts are no longer answered right")
        grade = _grade(share, KEPT_YES, KEPT_WEAK)
    else:
        reasons.append(f"the base answers only {general.base_right} general prompts right: judged by drift")
        grade = _grade(-general.drift, -DRIFT_YES, -DRIFT_WEAK)
    return {"yes": "weak", "weak": "no"}.get(grade, grade) if repeats else grade  # type: ignore[return-value]


def _grade(value: float, yes: float, weak: float) -> Grade:
    return "yes" if value >= yes else "weak" if value >= weak else "no"


def _advise(
    learned: Grade, kept: Grade, training: Learned | None, validation: Learned | None, facts: Facts
) -> list[Advice]:
    found: list[Advice] = []
    if facts.foreign:
        found.append(Advice("remove the other model's template from the records"))
    if facts.truncated > 0.1:
        found.append(Advice("read the records whole", {"data.max_length": 2 * facts.max_length}))
    if learned in ("no", "weak") and training is not None:
        by_heart = validation is not None and validation.low <= 0 and training.tuned_exact > 0.5
        if by_heart and facts.epochs and facts.epochs > 1:
            found.append(Advice("fewer rounds over the same records", {"trainer.max_epochs": facts.epochs // 2}))
        elif facts.steps < 100:
            longer = (
                {"trainer.max_epochs": 4 * facts.epochs} if facts.epochs else {"trainer.max_steps": 4 * facts.steps}
            )
            found.append(Advice("more rounds over the records", longer))
        else:
            found.append(Advice("a higher learning rate", {"optimizer.lr": _round(facts.lr * 5)}))
    if kept in ("no", "weak"):
        if not facts.replay:
            found.append(Advice("mix in the base's own answers", {"data.replay": "self"}))
        found.append(Advice("a lower learning rate", {"optimizer.lr": _round(facts.lr / 5)}))
    return found


def _round(value: float) -> float:
    return float(f"{value:.2g}")


def summary_lines(verdict: Verdict) -> list[str]:
    """The verdict in plain words, as the end panel and the model card show it."""
    lines = [f"learned: {verdict.learned}"]
    for name, e in (("training", verdict.training), ("validation", verdict.validation)):
        if e is not None:
            lines.append(
                f"  {name}, {e.records} records: loss {e.base_loss:.3f} -> {e.tuned_loss:.3f}, "
                f"gain {e.gain:.3f} [{e.low:.3f}, {e.high:.3f}] nats a token; "
                f"reference is the first choice {e.base_exact:.0%} -> {e.tuned_exact:.0%}"
            )
    lines.append(f"kept: {verdict.kept}")
    if g := verdict.general:
        lines.append(
            f"  {g.prompts} general prompts: {g.still_right} of the {g.base_right} that the base answers right are "
            f"still right; {g.same:.0%} word for word, drift {g.drift:.3f} nats a token"
        )
    lines += [f"  {reason}" for reason in verdict.reasons]
    lines += [f"  not measured: {what}" for what in verdict.missing]
    return lines
