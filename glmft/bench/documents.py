"""What the bench trains on: one list of token ids, the same for every side."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Literal

import lightning as L
import numpy as np

from glmft.bench.model import SIZES, Size
from glmft.data.datamodule import EpochPlan, InstructionData
from glmft.errors import UserError
from glmft.schema import Count, Positive

SKEW = 4  # some ids are far more frequent than others, so that there is something to learn
PROMPT_SHARE = 0.25  # of documents of one length

# Tokens of (prompt, answer) in ChatGLM3's vocabulary and layout: every tenth of the 1,000 records of LLaMA-Factory's
# alpaca_zh_demo, in order of length. Their mean is 134.8, as that of all records (134.9); 85 % are supervised.
ALPACA_ZH = (
    *((13, 12), (14, 14), (15, 15), (21, 10), (20, 12), (22, 11), (12, 23), (12, 24), (18, 20), (19, 20)),
    *((24, 16), (30, 11), (11, 31), (29, 14), (26, 18), (23, 22), (28, 19), (16, 32), (27, 22), (13, 39)),
    *((13, 40), (21, 34), (19, 37), (15, 43), (26, 34), (18, 43), (41, 22), (14, 51), (16, 51), (14, 54)),
    *((14, 56), (16, 56), (14, 60), (17, 61), (21, 59), (27, 55), (16, 68), (22, 64), (23, 65), (17, 74)),
    *((18, 76), (43, 53), (22, 77), (28, 74), (19, 85), (14, 92), (17, 92), (22, 90), (15, 99), (12, 105)),
    *((18, 100), (72, 50), (14, 113), (15, 116), (18, 115), (28, 108), (28, 111), (33, 109), (17, 128), (18, 132)),
    *((15, 139), (15, 141), (15, 145), (15, 148), (20, 146), (12, 157), (13, 160), (20, 156), (16, 163), (12, 172)),
    *((15, 172), (14, 176), (14, 181), (18, 180), (28, 174), (14, 191), (20, 188), (18, 193), (14, 202), (18, 201)),
    *((38, 182), (24, 200), (14, 214), (13, 217), (13, 219), (17, 217), (18, 221), (18, 224), (16, 229), (10, 237)),
    *((14, 237), (40, 216), (13, 248), (29, 236), (15, 255), (20, 256), (17, 271), (18, 279), (39, 273), (12, 356)),
)


@dataclass(frozen=True)
class Documents:
    """Documents of random ids: ids int32 [T], supervised bool [T] each. Stands where token files do in training."""

    samples: list[tuple[np.ndarray, np.ndarray]]

    @classmethod
    def make(cls, lengths: Literal["alpaca_zh"] | int, count: int, seed: int, vocabulary: int) -> Documents:
        """`count` documents with lengths like alpaca_zh's, or all of one length."""
        rng = np.random.default_rng(seed)
        prompt_of_all = 0 if lengths == "alpaca_zh" else int(lengths * PROMPT_SHARE)
        pairs = ALPACA_ZH if lengths == "alpaca_zh" else [(prompt_of_all, lengths - prompt_of_all)]
        samples = []
        for i in rng.integers(0, len(pairs), count):
            prompt, size = pairs[i][0], sum(pairs[i])
            ids = (1 + (vocabulary - 1) * rng.random(size) ** SKEW).astype(np.int32)  # 0 has no embedding of its own
            samples.append((ids, np.arange(size) >= prompt))
        return cls(samples)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.array([len(ids) for ids, _ in self.samples])

    @cached_property
    def num_supervised(self) -> np.ndarray:
        """Supervised tokens of each document."""
        return np.array([int(mask.sum()) for _, mask in self.samples])

    @cached_property
    def sha256(self) -> str:
        """Of all ids and masks, in order."""
        digest = hashlib.sha256()
        for ids, mask in self.samples:
            digest.update(ids.tobytes() + mask.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.samples[i]


class InOrder(EpochPlan):
    """A plan whose optimizer steps are given: documents of each step, in one row."""

    groups: list[list[int]]

    def _rows(self, epoch: int) -> list[list[int]]:
        return self.groups


class GeneratedData(InstructionData):
    """Training data of the bench.

    Args:
        lengths: "alpaca_zh", or the tokens of every document.
        documents: how many there are.
        size: of the model; ids are below its vocabulary.
        packing: false pads the documents of the same optimizer steps instead.
        max_length, tokens_per_batch, tokens_per_step, num_workers, seed: as in `InstructionData`.
    """

    def __init__(
        self,
        lengths: Literal["alpaca_zh"] | Positive,
        documents: Positive,
        size: Size,
        max_length: Positive = 2048,
        packing: bool = True,
        tokens_per_batch: Positive = 8192,
        tokens_per_step: Positive = 8192,
        num_workers: Count = 0,
        seed: Count = 0,
    ) -> None:
        L.LightningDataModule.__init__(self)
        self.documents = Documents.make(lengths, documents, seed, SIZES[size].padded_vocab_size)
        self.corpus: Any = SimpleNamespace(train=self.documents, validation={}, sources=lambda _, chosen: chosen)
        self.max_length, self.packing, self.num_workers, self.seed = max_length, packing, num_workers, seed
        self.tokens_per_batch, self.tokens_per_step, self.pad_id = tokens_per_batch, tokens_per_step, 0
        self.groups: list[list[int]] | None = None
        if not packing:
            self.packing = True
            rows = len(self.plan(self.documents).rows(0)) // self.schedule().rows_per_step
            packed = self.steps(rows)
            self.packing = False
            self.follow(packed)

    def follow(self, groups: list[list[int]]) -> None:
        """Makes the optimizer steps those of another trainer: the same documents in each."""
        self.groups = groups
        row = max(int(self.documents.lengths[group].sum()) for group in groups)
        self.max_length = self.tokens_per_batch = self.tokens_per_step = -(-row // 64) * 64

    def plan(self, store: Any, world_size: int = 1, rank: int = 0) -> EpochPlan:
        if self.groups is None:
            return super().plan(store, world_size, rank)
        plan = InOrder(store, self.schedule(world_size), self.packing, self.seed, rank)
        plan.groups = self.groups
        return plan

    def steps(self, number: int) -> list[list[int]]:
        """The documents of the first optimizer steps.

        Raises:
            UserError: there are not enough.
        """
        rows, size = self.plan(self.documents).rows(0), self.schedule().rows_per_step
        return enough([[i for row in rows[k * size : (k + 1) * size] for i in row] for k in range(number)])


def enough(steps: list[list[int]]) -> list[list[int]]:
    """The documents of optimizer steps, as given.

    Raises:
        UserError: a step has none.
    """
    if not all(steps):
        raise UserError(f"data.documents: too few for {len(steps)} optimizer steps; give more")
    return steps
