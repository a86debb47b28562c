"""How answers compare with references: the scores that people quote, with the convention of each named.

BLEU and chrF are sacrebleu's; ROUGE is rouge-chinese's, over the tokens that the name says. Both come with the extra
`eval`; what needs none is always there. Two conventions are kept so that numbers can be compared, though not with each
other: LLaMA-Factory's (BLEU-4 over characters, ROUGE over jieba's words, in percent) and THUDM's fine-tuning demo's
(both over jieba's words, BLEU from 0 to 1).
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{HAN}]|[^\W{HAN}]+|[^\w\s]")
PREDICTIONS = "predictions.jsonl"  # what `glmft predict` writes, and what is scored and judged
NEEDED = ("sacrebleu", "rouge_chinese", "jieba", "nltk")
Pairs = Sequence[tuple[str, str]]
"""(answer, reference)."""


@dataclass(frozen=True)
class Answer:
    """What was said: text, number of tokens, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


def tokens(text: str) -> list[str]:
    """Chinese characters one by one, other words and signs whole."""
    return _TOKEN.findall(text.lower())


def available() -> bool:
    """Whether the extra `eval` is installed."""
    return all(importlib.util.find_spec(name) for name in NEEDED)


def repetition(text: str, n: int = 4) -> float:
    """Share of n-grams that stood before."""
    words = tokens(text)
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = sum(grams.values())
    return 1 - len(grams) / total if total else 0.0


def per_answer(answers: Sequence[Answer], references: Sequence[str | None]) -> dict[str, np.ndarray]:
    """Scores of each answer [N], not a number where there is no reference; those of the extra `eval` if it is there."""
    out = {
        "length (tokens)": np.array([a.tokens for a in answers], float),
        "repetition": np.array([repetition(a.text) for a in answers]),
        "ended": np.array([a.ended for a in answers], float),
    }
    if all(r is None for r in references):
        return out
    scored: dict[str, Callable[[str, str], float]] = {"exact": lambda a, r: float(a.strip() == r.strip())}
    if available():
        scored |= _library_scores()
    for name, score in scored.items():
        pairs = zip(answers, references, strict=True)
        out[name] = np.array([np.nan if r is None else score(a.text, r) for a, r in pairs])
    return out


def _library_scores() -> dict[str, Callable[[str, str], float]]:
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge
    from sacrebleu.metrics import CHRF

    jieba.setLogLevel(logging.ERROR)
    smooth = SmoothingFunction().method3

    def words(text: str) -> list[str]:
        return list(jieba.cut(text))

    def rouge(kind: str, cut: Callable[[str], list[str]], scale: float = 1.0) -> Callable[[str, str], float]:
        def score(answer: str, reference: str) -> float:
            a, r = " ".join(cut(answer)), " ".join(cut(reference))
            if not a.strip() or not r.strip():
                return 0.0
            return scale * float(Rouge().get_scores(a, r)[0][kind]["f"])

        return score

    def bleu(cut: Callable[[str], list[str]], scale: float = 1.0) -> Callable[[str, str], float]:
        return lambda a, r: scale * float(sentence_bleu([cut(r)], cut(a), smoothing_function=smooth)) if a else 0.0

    kinds = {"ROUGE-1": "rouge-1", "ROUGE-2": "rouge-2", "ROUGE-L": "rouge-l"}
    chrf = CHRF()
    out: dict[str, Callable[[str, str], float]] = {
        "chrF": lambda a, r: float(chrf.sentence_score(a, [r]).score),
        "BLEU-4 (LLaMA-Factory)": bleu(list, 100),
        "BLEU-4 (THUDM)": bleu(words),
    }
    out |= {f"{name} (characters, words)": rouge(kind, tokens) for name, kind in kinds.items()}
    out |= {f"{name} (LLaMA-Factory)": rouge(kind, words, 100) for name, kind in kinds.items()}
    return out


def corpus_bleu(pairs: Pairs) -> dict[str, float]:
    """sacrebleu's corpus BLEU; its "zh" tokenisation where most references hold Chinese, else "13a"."""
    if not pairs or not available():
        return {}
    from sacrebleu.metrics import BLEU

    chinese = np.mean([bool(re.search(f"[{HAN}]", r)) for _, r in pairs]) > 0.5
    how = "zh" if chinese else "13a"
    metric = BLEU(tokenize=how)
    return {
        f"BLEU (sacrebleu, {how})": float(metric.corpus_score([a for a, _ in pairs], [[r for _, r in pairs]]).score)
    }


def bootstrap(differences: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of paired differences [N], by resampling the pairs."""
    values = differences[~np.isnan(differences)]
    if not len(values):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
