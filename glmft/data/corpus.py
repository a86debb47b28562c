"""From data set names to the samples of a run: prepared sets, mixed, split, and the counts that are shown.

Needs SentencePiece and NumPy only: a run's data is checked before torch is imported.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from glmft.data.encoding import CUT, DAMAGE, SPLIT, SPLIT_LESS, OnBadRecord, OnTooLong, Policies
from glmft.data.mixing import Mix, Samples, Until, choose, interleave, weights_of
from glmft.data.preparation import PreparedSet, prepare_set
from glmft.data.registry import DatasetEntry, direct_file, find_datasets
from glmft.data.tally import dropped
from glmft.errors import ProblemList, UserError, nearest
from glmft.messages import Conversation

LEAST_REPLAYED = 64  # records
HELD_OUT, REPLAY = "held_out", "replay"
T = TypeVar("T")


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
    mix: Mix = "concat"
    mix_weights: Any = None
    mix_until: Until = "first_exhausted"
    max_length: int = 2048
    on_too_long: OnTooLong = "truncate"
    on_bad_record: OnBadRecord = "error"
    train_on_prompt: bool = False
    mask_history: bool = False
    max_samples: Any = None
    fill: tuple[tuple[str, str], ...] = ()
    replay: str | None = None
    replay_share: float = 0.0
    seed: int = 0
    cache: bool = True

    @classmethod
    def of(cls, model_folder: Path, **options: Any) -> CorpusSpec:
        """From the options of `InstructionData`; those that do not decide the samples are ignored."""
        names = {f.name for f in fields(cls)}
        frozen = {k: _freeze(v) for k, v in options.items() if k in names and v is not None}
        return cls(tokenizer=str(model_folder / "tokenizer.model"), **frozen)

    @property
    def policies(self) -> Policies:
        """What is done with the records."""
        return Policies(**{f.name: getattr(self, f.name) for f in fields(Policies)})


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple(sorted((str(k), str(v)) for k, v in value.items()))
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


@dataclass
class Corpus:
    """Everything a run learns from and is validated on.

    `train` holds the user's own samples, then replayed ones; `validation` holds each set by name.
    """

    sets: list[PreparedSet]
    train: Samples
    validation: dict[str, Samples]
    replayed: int = 0
    per_set: dict[str, dict[str, int]] = field(default_factory=dict)

    @cached_property
    def own(self) -> Samples:
        """The training samples without replayed ones."""
        return self.train.take(np.arange(len(self.train) - self.replayed))

    def conversations(self, samples: Samples, chosen: Sequence[int]) -> list[Conversation]:
        """The conversations of some samples, by position; read again from the data files."""
        return self._ask(PreparedSet.conversations, samples, chosen)

    def sources(self, samples: Samples, chosen: Sequence[int]) -> list[str]:
        """Where the records of some samples stand: `mine.json: record 7`."""
        return self._ask(PreparedSet.sources, samples, chosen)

    def _ask(
        self, what: Callable[[PreparedSet, list[int]], list[T]], samples: Samples, chosen: Sequence[int]
    ) -> list[T]:
        by_store = {id(s.store): s for s in self.sets}
        found: dict[int, T] = {}
        for part, store in enumerate(samples.stores):
            mine = [i for i in chosen if samples.part[i] == part]
            if mine:
                read = what(by_store[id(store)], [int(samples.index[i]) for i in mine])
                found |= dict(zip(mine, read, strict=True))
        return [found[i] for i in chosen]

    def fingerprint(self) -> str:
        """16 hex digits of the user's own training samples and their order."""
        return hashlib.sha256(self.own.hashes().tobytes()).hexdigest()[:16]

    def report(self) -> dict[str, Any]:
        """Numbers for the start panel and the run record."""
        reports = [s.report for s in self.sets if s.name != REPLAY]
        events = _sum(r["events"] for r in reports)
        hashes = self.own.distinct().hashes()
        held = [np.unique(s.hashes()) for s in self.validation.values()]
        return {
            "records": sum(r["records"] for r in reports),
            "train": len(self.train),
            "validation": sum(map(len, self.validation.values())),
            "dropped": dict(_sum(map(dropped, reports))),
            "truncated": events[CUT],
            "split": events[SPLIT] + events[SPLIT_LESS],
            "shortened": events[SPLIT_LESS],
            "damaged": sum(events[k] for k in DAMAGE),
            "duplicates": len(hashes) - len(np.unique(hashes)),
            "overlap": int(sum(np.isin(h, hashes).sum() for h in held)),
            "replayed": self.replayed,
            "tokens": int(self.train.lengths.sum()),
            "supervised_tokens": int(self.train.num_supervised.sum()),
            "longest": int(self.train.lengths.max()),
            "sets": self.per_set,
        }


def split_validation(n: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """(train, validation) positions of n records, by seed; both in their original order."""
    size = min(max(round(n * fraction), 1), n - 1) if fraction and n > 1 else 0
    chosen = set(random.Random(f"validation {seed}").sample(range(n), size))
    return [i for i in range(n) if i not in chosen], sorted(chosen)


def prepare(spec: CorpusSpec) -> Corpus:
    """Reads, encodes, mixes and splits all data sets of a run.

    Raises:
        UserError: a data set is missing or unreadable, or nothing is left to train on.
        ProblemList: several of these, or bad records.
    """
    entries, val_entries = _find(spec)
    weights = weights_of([e.name for e in entries], spec.mix_weights) if spec.mix == "interleave" else None
    sets, val_sets = _prepare_all([*entries, *val_entries], spec, len(entries))
    training = [_chosen(s, spec) for s in sets]
    held: list[np.ndarray] = []
    if spec.val_fraction:
        training, held = _hold_out(sets, training, spec)
    if not any(map(len, training)):
        raise UserError(f"data: no record is left to train on ({_why_none(sets, held)})")
    if weights is not None:
        if empty := [s.name for s, chosen in zip(sets, training, strict=True) if not len(chosen)]:
            raise UserError(f"data.mix=interleave: no record of '{empty[0]}' is left to train on")
        drawn = interleave([len(t) for t in training], weights, spec.mix_until, spec.seed)
        training = [chosen[d] for chosen, d in zip(training, drawn, strict=True)]
    stores = [s.store for s in sets]
    per_set = {
        s.name: {"samples": len(c), "tokens": int(s.store.lengths[c].sum())}
        for s, c in zip(sets, training, strict=True)
    }
    replay = _replayed(sum(map(len, training)), spec) if spec.replay else None
    if replay is not None:
        stores.append(replay[0].store)
        training.append(replay[1])
    validation = {HELD_OUT: Samples.of([s.store for s in sets], held)} if held and any(map(len, held)) else {}
    for s in val_sets:
        if not len(s.store):
            raise UserError(f"data.val_datasets: no record of '{s.name}' is left to validate on ({_why_none([s], [])})")
        validation[s.name] = Samples.of([s.store], [_chosen(s, spec)])
    replayed = len(replay[1]) if replay else 0
    replay_sets = [replay[0]] if replay else []
    return Corpus([*sets, *val_sets, *replay_sets], Samples.of(stores, training), validation, replayed, per_set)


def _replayed(own: int, spec: CorpusSpec) -> tuple[PreparedSet, np.ndarray] | None:
    """The replay file's set and the samples that are mixed in: their share, but a few records need more."""
    entry = DatasetEntry(REPLAY, (Path(str(spec.replay)),))
    replay = prepare_set(entry, Path(spec.tokenizer), spec.policies, cache=spec.cache)
    wanted = max(round(own * spec.replay_share / (1 - spec.replay_share)), LEAST_REPLAYED)
    return replay, choose(len(replay.store), wanted, "replay", spec.seed)


def _find(spec: CorpusSpec) -> tuple[list[DatasetEntry], list[DatasetEntry]]:
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
    for names in ([e.name for e in entries], [e.name for e in val_entries]):
        if twice := [n for n, k in Counter(names).items() if k > 1]:
            problems.append(f"data: two sets are called '{twice[0]}'; leave one out or rename it")
    if spec.val_fraction and HELD_OUT in spec.val_datasets:
        problems.append(f"data.val_datasets: '{HELD_OUT}' is the name of what data.val_fraction holds out; rename it")
    if problems:
        raise ProblemList("data", problems)
    return entries, val_entries


def _prepare_all(
    entries: Sequence[DatasetEntry], spec: CorpusSpec, num_training: int
) -> tuple[list[PreparedSet], list[PreparedSet]]:
    """(training, validation) sets; what is wrong with any of them is reported together."""
    prepared: list[PreparedSet] = []
    errors: list[UserError] = []
    for entry in entries:
        try:
            prepared.append(prepare_set(entry, Path(spec.tokenizer), spec.policies, cache=spec.cache))
        except UserError as e:
            errors.append(e)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ProblemList("data", [str(e) for e in errors])
    return prepared[:num_training], prepared[num_training:]


def _chosen(prepared: PreparedSet, spec: CorpusSpec) -> np.ndarray:
    """The samples of a set whose records are used: `num_samples` of the registry, then `max_samples`, each by seed.

    Raises:
        UserError: `num_samples` is more than there are, or `max_samples` names a set that is not used.
    """
    records = registered_records(prepared, spec.seed)
    limit = spec.max_samples
    if isinstance(limit, tuple):
        limits = {k: int(v) for k, v in limit}
        known = (*spec.datasets, *spec.val_datasets, *([Path(spec.path).stem] if spec.path else []))
        if unknown := [k for k in limits if k not in known]:
            raise UserError(f"data.max_samples: '{unknown[0]}' is none of the data sets{nearest(unknown[0], known)}")
        limit = limits.get(prepared.name)
    kept = records[choose(len(records), limit, prepared.name, spec.seed)]
    return np.flatnonzero(np.isin(prepared.store.records, kept))


def registered_records(prepared: PreparedSet, seed: int) -> np.ndarray:
    """The records (positions) that `num_samples` of the registry leaves, of those that have a sample.

    Raises:
        UserError: it is more than there are records.
    """
    records, asked = np.unique(prepared.store.records), prepared.entry.num_samples
    there = prepared.report["records"]
    if asked is not None and asked > there:
        raise UserError(f"'{prepared.name}': num_samples is {asked}, but there are {there} records")
    return records[choose(len(records), asked, f"num_samples {prepared.name}", seed)]


def _hold_out(
    sets: Sequence[PreparedSet], training: Sequence[np.ndarray], spec: CorpusSpec
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(training, held out) samples of each set; all samples of a record are on the same side."""
    records = [s.store.records[t] for s, t in zip(sets, training, strict=True)]
    ids = [np.unique(r) for r in records]
    ends = np.cumsum([0, *map(len, ids)])
    held = np.asarray(split_validation(int(ends[-1]), spec.val_fraction, spec.seed)[1], np.int64)
    out: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for mine, record, known, a, b in zip(training, records, ids, ends, ends[1:], strict=False):
        chosen = np.isin(record, known[held[(held >= a) & (held < b)] - a])
        out[0].append(mine[~chosen])
        out[1].append(mine[chosen])
    return out


def _why_none(sets: Sequence[PreparedSet], held: Sequence[np.ndarray]) -> str:
    reasons = _sum(dropped(s.report) for s in sets)
    return ", ".join(f"{n} {why}" for why, n in reasons.items()) or f"{sum(map(len, held))} for validation"


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for c in counts:
        total.update(c)
    return total
