"""The plan of an epoch: which samples share a row, which rows share an optimizer step, in which order.

A *row* holds whole samples within a fixed budget of tokens. A *step* (one optimizer step) is a fixed number of rows.
A *micro-batch* is a part of a step's rows on one rank: it decides memory, never what is learned together. The plan is
a function of (lengths, seed, epoch) alone, so it needs no saved state, and every rank and worker makes the same one.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from glmft.errors import ProblemList


def best_fit(lengths: np.ndarray, order: np.ndarray, budget: int) -> list[list[int]]:
    """Puts samples, in the given order, each into the fullest row that still has room. Returns rows of positions.

    Rows are kept by their free tokens; the bits of `free` say which numbers of free tokens there are, so that the
    fullest row with room is one shift away.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(budget + 1)]
    free = 0
    for i, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                free ^= 1 << room
            rows[row].append(i)
        else:
            room, row = budget, len(rows)
            rows.append([i])
        by_room[room - length].append(row)
        free |= 1 << (room - length)
    return rows


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Python would look for cycles through everything that is loaded, each time some thousand lists were made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def plan_rows(lengths: np.ndarray, budget: int, seed: int, epoch: int) -> list[list[int]]:
    """Rows of an epoch, in random order. Their number is the same in every epoch, their content is not.

    Samples are sorted by length with a little noise, so that each epoch packs differently; where the noise costs a
    row, the exact order is taken, with ties at random.
    """
    rng = np.random.default_rng((seed, epoch))
    ties = rng.permutation(len(lengths))
    exact = ties[np.argsort(-lengths[ties], kind="stable")]
    with _no_collection():
        rows = best_fit(lengths, exact, budget)
        noisy = np.argsort(-(lengths * rng.uniform(0.8, 1.0, len(lengths))), kind="stable")
        candidate = best_fit(lengths, noisy, budget)
    if len(candidate) == len(rows):
        rows = candidate
    return [rows[i] for i in rng.permutation(len(rows))]


def plan_padded_rows(lengths: np.ndarray, budget: int, seed: int, epoch: int) -> list[list[int]]:
    """Rows for batches that are padded instead of packed: samples of similar length, count x longest <= budget."""
    rng = np.random.default_rng((seed, epoch))
    ties = rng.permutation(len(lengths))
    rows: list[list[int]] = []
    for i in ties[np.argsort(-lengths[ties], kind="stable")].tolist():
        if rows and (len(rows[-1]) + 1) * int(lengths[rows[-1][0]]) <= budget:
            rows[-1].append(i)
        else:
            rows.append([i])
    return [rows[i] for i in rng.permutation(len(rows))]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one rank computes at a time. `step_tokens` is the number of supervised tokens of the whole step."""

    samples: tuple[int, ...]
    step_tokens: int
    epoch: int
    index: int  # of the micro-batch within the epoch, over all ranks


@dataclass(frozen=True)
class Schedule:
    """Budgets of a run, in tokens, turned into rows: how many make a step, a micro-batch, an accumulation.

    Raises:
        ProblemList: the budgets do not fit each other (all problems together).
    """

    tokens_per_step: int
    tokens_per_batch: int
    max_length: int
    world_size: int = 1

    def __post_init__(self) -> None:
        problems = []
        if self.max_length > self.tokens_per_step:
            problems.append(
                f"data.max_length={self.max_length} does not fit data.tokens_per_step={self.tokens_per_step}"
            )
        elif self.row_budget > self.tokens_per_batch:
            problems.append(
                f"data.tokens_per_batch={self.tokens_per_batch} is less than a row of {self.row_budget} tokens "
                f"(data.max_length={self.max_length}, data.tokens_per_step={self.tokens_per_step})"
            )
        elif self.rows_per_step < self.world_size:
            problems.append(
                f"data.tokens_per_step={self.tokens_per_step} is {self.rows_per_step} rows, "
                f"too few for {self.world_size} devices"
            )
        if problems:
            raise ProblemList("token budgets", problems)

    @property
    def rows_per_step(self) -> int:
        """m: rows of an optimizer step over all ranks."""
        return self.tokens_per_step // self.max_length

    @property
    def row_budget(self) -> int:
        """Tokens of a row: at least max_length, and rows_per_step of them make tokens_per_step."""
        return self.tokens_per_step // max(1, self.rows_per_step)

    @property
    def rows_per_batch(self) -> int:
        """n: rows of a micro-batch on one rank, as many as fit and no more than the rank's share of a step."""
        share = math.ceil(self.rows_per_step / self.world_size)
        return min(share, self.tokens_per_batch // self.row_budget)

    @property
    def accumulate(self) -> int:
        """Micro-batches of a rank in a full step."""
        return math.ceil(self.rows_per_step / (self.rows_per_batch * self.world_size))

    def num_steps(self, num_rows: int) -> int:
        """Optimizer steps of an epoch; the last may be smaller."""
        return math.ceil(num_rows / self.rows_per_step)

    def num_batches(self, num_rows: int) -> int:
        """Micro-batches of a rank in an epoch."""
        full, rest = divmod(num_rows, self.rows_per_step)
        return full * self.accumulate + math.ceil(rest / (self.rows_per_batch * self.world_size))

    def micro_batches(
        self, rows: Sequence[Sequence[int]], num_supervised: np.ndarray, epoch: int, rank: int = 0
    ) -> list[MicroBatch]:
        """The micro-batches of one rank, in order. Ranks take the rows of a step in turn, so each gets its share; where
        that would leave a micro-batch empty, rows are divided."""
        out: list[MicroBatch] = []
        for start in range(0, len(rows), self.rows_per_step):
            step = rows[start : start + self.rows_per_step]
            tokens = int(sum(num_supervised[list(row)].sum() for row in step))
            parts = math.ceil(len(step) / (self.rows_per_batch * self.world_size))
            mine = _divided(step, parts * self.world_size)[rank :: self.world_size]
            for part in range(parts):
                size = min(self.rows_per_batch, len(mine) - (parts - part - 1))  # the parts behind get a row each
                chosen, mine = mine[:size], mine[size:]
                samples = tuple(i for row in chosen for i in row)
                out.append(MicroBatch(samples, tokens, epoch, len(out) * self.world_size + rank))
        return out


def _divided(step: Sequence[Sequence[int]], wanted: int) -> list[list[int]]:
    """At least `wanted` rows: the rows with most samples are halved, as long as they have more than one."""
    rows = [list(row) for row in step]
    while len(rows) < wanted and max(map(len, rows)) > 1:
        longest = rows.pop(max(range(len(rows)), key=lambda i: len(rows[i])))
        rows += [longest[::2], longest[1::2]]
    return rows
