"""From data set names to encoded samples: read, convert, encode, apply the length policy, count what was dropped.

Needs SentencePiece and NumPy only: a run's data is checked before torch is imported.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from glmft.data.formats import FORMATS, RecordError
from glmft.data.reading import read_records
from glmft.data.registry import DatasetEntry, direct_file, find_datasets
from glmft.errors import ProblemList, UserError
from glmft.messages import IGNORE_INDEX, Conversation, Sample
from glmft.models.tokenizer import ChatGLM3Tokenizer, load_tokenizer

LEAST_REPLAYED = 64  # records
OnTooLong = Literal["truncate", "drop", "error"]
OnBadRecord = Literal["error", "drop"]


@dataclass(frozen=True)
class CorpusSpec:
    """What decides the samples of a run; hashable, so that the same request is prepared once a process.

    `fill` holds the values of {{name}}-style blanks. Lengths are tokens. `replay` is a file of records that are mixed
    into the training records until they are `replay_share` of all.
    """

    tokenizer: str
    datasets: tuple[str, ...] = ()
    path: str | None = None
    dir: str | None = None
    val_datasets: tuple[str, ...] = ()
    val_fraction: float = 0.0
    max_length: int = 2048
    on_too_long: OnTooLong = "truncate"
    on_bad_record: OnBadRecord = "error"
    max_samples: int | None = None
    fill: tuple[tuple[str, str], ...] = ()
    replay: str | None = None
    replay_share: float = 0.0
    seed: int = 0

    @classmethod
    def of(cls, model_folder: Path, **options: Any) -> CorpusSpec:
        """From the options of `InstructionData`; those that do not decide the samples are ignored."""
        names = {f.name for f in fields(cls)}
        frozen = {k: _freeze(v) for k, v in options.items() if k in names and v is not None}
        return cls(tokenizer=str(model_folder / "tokenizer.model"), **frozen)


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted((k, str(v)) for k, v in value.items()))
    return tuple(value) if isinstance(value, list) else value


@dataclass
class SampleStore:
    """Samples as flat arrays: ids [tokens] int32, supervised [tokens] bool, offsets [samples + 1] int64."""

    ids: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> SampleStore:
        """Packs samples into the three arrays."""
        lengths = [len(s) for s in samples]
        ids = np.fromiter((i for s in samples for i in s.input_ids), np.int32, sum(lengths))
        supervised = np.fromiter((y != IGNORE_INDEX for s in samples for y in s.labels), np.bool_, sum(lengths))
        return cls(ids, supervised, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [T], supervised [T]) of sample i."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[span], self.supervised[span]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample."""
        return np.diff(self.offsets)

    @property
    def num_supervised(self) -> np.ndarray:
        """Predicted tokens of each sample (its first token is never predicted)."""
        sums = np.concatenate([[0], np.cumsum(self.supervised, dtype=np.int64)])
        return sums[self.offsets[1:]] - sums[self.offsets[:-1]] - self.supervised[self.offsets[:-1]]


@dataclass
class Corpus:
    """Everything a run learns from, and the counts that are shown before it starts.

    `conversations` are the user's own records; `train` holds replayed ones behind them.
    """

    train: SampleStore
    validation: SampleStore
    conversations: list[Conversation]
    val_conversations: list[Conversation]
    counts: Counter[str] = field(default_factory=Counter)

    def report(self) -> dict[str, Any]:
        """Numbers for the start panel and the run record."""
        return {
            "records": self.counts["records"],
            "train": len(self.train),
            "validation": len(self.validation),
            "dropped": {k.removeprefix("dropped: "): v for k, v in self.counts.items() if k.startswith("dropped: ")},
            "truncated": self.counts["truncated"],
            "replayed": self.counts["replayed"],
            "tokens": int(self.train.offsets[-1]),
            "supervised_tokens": int(self.train.num_supervised.sum()),
            "longest": int(self.train.lengths.max()),
        }


def read_conversations(
    entry: DatasetEntry, fill: Mapping[str, str], on_bad_record: OnBadRecord, counts: Counter[str]
) -> list[Conversation]:
    """All conversations of a data set.

    Raises:
        UserError: the file cannot be read.
        ProblemList: records that cannot be used, unless `on_bad_record` is "drop".
    """
    convert = FORMATS[entry.formatting]
    conversations, problems = [], []
    for number, record in enumerate(read_records(entry.file), start=1):
        counts["records"] += 1
        try:
            filled = {k: _fill(v, fill) for k, v in record.items()}
            conversations.append(convert(filled, entry.columns, f"{entry.file} record {number}"))
        except RecordError as e:
            problems.append(f"{entry.file}: record {number}: {e}")
    if problems and on_bad_record == "error":
        title = (
            f"{len(problems)} of {counts['records']} records cannot be used (data.on_bad_record=drop leaves them out)"
        )
        raise ProblemList(title, problems)
    if problems:
        counts["dropped: bad record"] += len(problems)
    return conversations


def _fill(value: Any, fill: Mapping[str, str]) -> Any:
    if isinstance(value, str) and "{{" in value:
        for name, text in fill.items():
            value = value.replace("{{" + name + "}}", text)
    return value


def limit_length(sample: Sample, max_length: int, policy: OnTooLong, counts: Counter[str]) -> Sample | None:
    """The sample within `max_length` tokens, or None where it is dropped. A cut answer never ends with </s>.

    Raises:
        UserError: it is too long and the policy is "error".
    """
    if len(sample) > max_length:
        if policy == "error":
            raise UserError(
                f"{sample.source}: {len(sample)} tokens, data.max_length={max_length}; "
                "raise it, or choose data.on_too_long=truncate|drop"
            )
        if policy == "drop":
            counts["dropped: too long"] += 1
            return None
        sample = Sample(sample.input_ids[:max_length], sample.labels[:max_length], sample.source)
        if sample.num_supervised == 0:
            counts["dropped: nothing left to learn within max_length"] += 1
            return None
        counts["truncated"] += 1
    return sample


def split_validation(n: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """(train, validation) positions of n records, by seed; both in their original order."""
    size = round(n * fraction)
    chosen = set(random.Random(f"validation {seed}").sample(range(n), size))
    return [i for i in range(n) if i not in chosen], sorted(chosen)


@lru_cache(maxsize=2)
def prepare(spec: CorpusSpec) -> Corpus:
    """Reads, encodes and splits all data sets of a run.

    Raises:
        UserError: a data set is missing or unreadable, or nothing is left to train on.
        ProblemList: several of these, or bad records.
    """
    entries, problems = find_datasets(spec.datasets, spec.dir)
    val_entries, more = find_datasets(spec.val_datasets, spec.dir)
    problems += more
    if spec.path is not None:
        try:
            entries.append(direct_file(spec.path))
        except UserError as e:
            problems.append(str(e))
    elif not spec.datasets:
        problems.append("data.datasets is empty and data.path is not given: there is nothing to train on")
    if problems:
        raise ProblemList("data", problems)
    tokenizer = load_tokenizer(spec.tokenizer)
    counts: Counter[str] = Counter()
    conversations = _read_all(entries, spec, counts)
    if spec.max_samples is not None:
        conversations = conversations[: spec.max_samples]
    samples = _encode(conversations, tokenizer, spec, counts)
    val_samples = _encode(_read_all(val_entries, spec, counts), tokenizer, spec, counts)
    train, held_out = split_validation(len(samples), spec.val_fraction, spec.seed)
    pairs = [samples[i] for i in train]
    val_pairs = [samples[i] for i in held_out] + val_samples
    if not pairs:
        dropped = ", ".join(f"{v} {k.removeprefix('dropped: ')}" for k, v in counts.items() if k.startswith("dropped"))
        raise UserError(f"data: no record is left to train on ({dropped or f'{len(val_pairs)} for validation'})")
    return Corpus(
        SampleStore.of([s for _, s in pairs] + _replayed(len(pairs), tokenizer, spec, counts)),
        SampleStore.of([s for _, s in val_pairs]),
        [c for c, _ in pairs],
        [c for c, _ in val_pairs],
        counts,
    )


def _replayed(own: int, tokenizer: ChatGLM3Tokenizer, spec: CorpusSpec, counts: Counter[str]) -> list[Sample]:
    """Samples of the replay file, chosen by seed: the share, but a few records need more than their share."""
    if spec.replay is None:
        return []
    records = read_conversations(DatasetEntry("replay", Path(spec.replay)), {}, "error", Counter())
    wanted = max(round(own * spec.replay_share / (1 - spec.replay_share)), LEAST_REPLAYED)
    chosen = random.Random(f"replay {spec.seed}").sample(records, min(wanted, len(records)))
    samples = [s for _, s in _encode(chosen, tokenizer, spec, Counter())]
    counts["replayed"] = len(samples)
    return samples


def _read_all(entries: Sequence[DatasetEntry], spec: CorpusSpec, counts: Counter[str]) -> list[Conversation]:
    fill = dict(spec.fill)
    return [c for e in entries for c in read_conversations(e, fill, spec.on_bad_record, counts)]


def _encode(
    conversations: Sequence[Conversation], tokenizer: ChatGLM3Tokenizer, spec: CorpusSpec, counts: Counter[str]
) -> list[tuple[Conversation, Sample]]:
    pairs = []
    for conversation in conversations:
        sample = tokenizer.encode_conversation(conversation)
        kept = limit_length(sample, spec.max_length, spec.on_too_long, counts)
        if kept is not None:
            pairs.append((conversation, kept))
    return pairs
