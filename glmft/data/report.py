"""What a data set holds, what training would leave out of it, and what an epoch of it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from glmft.data.encoding import CUT, DAMAGE, DROPPED, SPLIT, SPLIT_LESS
from glmft.data.packing import Schedule, plan_rows
from glmft.data.preparation import PreparedSet
from glmft.data.tally import BAD, dropped, messages, numbers, place_of

BINS = 10
BAR = 40  # characters


@dataclass(frozen=True)
class Report:
    """Counts of one data set. Lengths are tokens; `numbers` holds the records (from 1) of each finding."""

    name: str
    files: list[str]
    formatting: str
    records: int
    samples: int
    dropped: dict[str, int]
    cut: int
    split: int
    shortened: int  # split records of which a turn is left out
    damaged: dict[str, int]
    duplicates: int  # samples that are there already, word for word
    contradictions: int  # prompts that have several answers
    numbers: dict[str, list[str]]
    messages: list[str]  # the first problems in full
    tokens: int
    supervised_share: float
    shortest: int
    median: int
    longest: int
    histogram: list[tuple[int, int, int]]  # from, to (inclusive), samples
    packing: float | None  # share of the rows that holds tokens
    steps_per_epoch: int | None

    @property
    def complete(self) -> bool:
        """Whether every record becomes a sample."""
        return not self.dropped

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def report(prepared: PreparedSet, tokens_per_step: int) -> Report:
    """The report of a prepared set; steps are those of `tokens_per_step` tokens, packed."""
    store, counts = prepared.store, prepared.report
    lengths, events = store.lengths, counts["events"]
    repeated, several = _repeated(store.hashes)
    places = {_named(what, counts): found for what, found in counts["numbers"].items()}
    for what, found in (("duplicates", repeated), ("ambiguous", several)):
        if len(found):
            places[what] = [place_of(counts, int(store.records[i])) for i in found[:1000]]
    schedule = Schedule(tokens_per_step, tokens_per_step, prepared.policies.max_length)
    rows = len(plan_rows(lengths, schedule.row_budget, 0, 0)) if len(lengths) else 0
    return Report(
        name=prepared.name,
        files=[str(f) for f in prepared.entry.files],
        formatting=prepared.entry.formatting,
        records=counts["records"],
        samples=len(store),
        dropped=dropped(counts),
        cut=events.get(CUT, 0),
        split=events.get(SPLIT, 0) + events.get(SPLIT_LESS, 0),
        shortened=events.get(SPLIT_LESS, 0),
        damaged={k: events[k] for k in DAMAGE if k in events},
        duplicates=len(repeated),
        contradictions=len(np.unique(store.hashes[several, 1])) if len(several) else 0,
        numbers=numbers(prepared.entry, counts | {"numbers": places}),
        messages=messages(prepared.entry, counts),
        tokens=int(lengths.sum(dtype=np.int64)),
        supervised_share=float(store.num_supervised.sum(dtype=np.int64) / max(lengths.sum(dtype=np.int64), 1)),
        shortest=int(lengths.min()) if len(lengths) else 0,
        median=int(np.median(lengths)) if len(lengths) else 0,
        longest=int(lengths.max(initial=0)),
        histogram=histogram(lengths),
        packing=float(lengths.sum(dtype=np.int64) / (rows * schedule.row_budget)) if rows else None,
        steps_per_epoch=schedule.num_steps(rows) if rows else None,
    )


def _named(what: str, counts: dict[str, Any]) -> str:
    return BAD + what if what in counts["problems"] else what.removeprefix(DROPPED)


def _repeated(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(samples that repeat an earlier one, samples whose prompt has several answers), as positions."""
    _, first = np.unique(hashes[:, 0], return_index=True)
    repeated = np.setdiff1d(np.arange(len(hashes)), first)
    distinct = np.sort(first)
    _, group, size = np.unique(hashes[distinct, 1], return_inverse=True, return_counts=True)
    return repeated, distinct[size[group] > 1]


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, to, samples) of ten ranges up to the longest; to is inclusive."""
    if not len(lengths):
        return []
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // BINS)
    counts = np.bincount((lengths - low) // width, minlength=1)
    return [(low + i * width, low + (i + 1) * width - 1, int(n)) for i, n in enumerate(counts)]


def lines(found: Report, tokens_per_step: int) -> list[str]:
    """The report as text."""
    out = [
        f"{found.name}: {found.formatting} records in {', '.join(found.files[:3])}"
        + (f" and {len(found.files) - 3} more files" if len(found.files) > 3 else ""),
        f"  records     {found.records:,}, {found.samples:,} samples; cut: {found.cut:,}"
        + (f"; split: {found.split:,}" if found.split else "")
        + (f" ({found.shortened:,} without a turn that is too long)" if found.shortened else ""),
    ]
    for why, n in found.dropped.items():
        out.append(f"  dropped     {n:,} {why}{_numbers(found.numbers, why)}")
    out += [f"              {m}" for m in found.messages]
    for what, n in found.damaged.items():
        out.append(f"  damaged     {n:,} with {what}{_numbers(found.numbers, what)}")
    if found.duplicates:
        out.append(f"  duplicates  {found.duplicates:,} word for word{_numbers(found.numbers, 'duplicates')}")
    if found.contradictions:
        where = _numbers(found.numbers, "ambiguous")
        out.append(f"  ambiguous   {found.contradictions:,} prompts with several answers{where}")
    if found.samples:
        out += [
            f"  tokens      {found.tokens:,}, {found.supervised_share:.1%} of them learned",
            f"  length      {found.shortest} to {found.longest}, median {found.median}",
        ]
        most = max(n for _, _, n in found.histogram)
        out += [f"  {a:>7} - {b:<6} {'█' * -(-BAR * n // most):<{BAR}} {n:,}" for a, b, n in found.histogram]
        out.append(
            f"  an epoch    {found.steps_per_epoch:,} steps of {tokens_per_step:,} tokens, "
            f"{found.packing:.1%} of each filled"
        )
    return out


def _numbers(numbers: dict[str, list[str]], what: str) -> str:
    found = numbers.get(what, [])
    return f": record {', '.join(found[:10])}{', ...' if len(found) > 10 else ''}" if found else ""
