"""Several data sets as one: which samples an epoch has, and in how many copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from glmft.data.tokens import TokenStore
from glmft.errors import UserError, nearest

Mix = Literal["concat", "interleave"]
Until = Literal["first_exhausted", "all_exhausted"]


class Samples:
    """Chosen samples of token stores. `part` [n] says of which store, `index` [n] which of its samples."""

    def __init__(self, stores: Sequence[TokenStore], part: np.ndarray, index: np.ndarray) -> None:
        self.stores, self.part, self.index = list(stores), part, index
        self.lengths = self._of("lengths")
        self.num_supervised = self._of("num_supervised")

    @classmethod
    def of(cls, stores: Sequence[TokenStore], chosen: Sequence[np.ndarray]) -> Samples:
        """The chosen samples of each store, one store after the other."""
        part = np.repeat(np.arange(len(stores)), [len(c) for c in chosen])
        index = np.concatenate(chosen) if chosen else np.empty(0, np.int64)
        return cls(stores, part, index.astype(np.int64))

    def _of(self, name: str) -> np.ndarray:
        values = np.empty(len(self.index), np.int64)
        for i, store in enumerate(self.stores):
            mine = self.part == i
            values[mine] = getattr(store, name)[self.index[mine]]
        return values

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [T] int32, supervised [T] bool) of sample i."""
        return self.stores[self.part[i]][self.index[i]]

    def hashes(self, of_prompts: bool = False) -> np.ndarray:
        """A hash uint64 [n] of each sample's ids, or of its prompt's."""
        values = np.empty(len(self.index), np.uint64)
        for i, store in enumerate(self.stores):
            mine = self.part == i
            values[mine] = store.hashes[self.index[mine], int(of_prompts)]
        return values

    def distinct(self) -> Samples:
        """Each sample once, however often it was drawn."""
        pairs = np.stack([self.part, self.index], axis=1)
        return self.take(np.sort(np.unique(pairs, axis=0, return_index=True)[1]))

    def take(self, chosen: np.ndarray) -> Samples:
        """Some of the samples, by position [m]."""
        return Samples(self.stores, self.part[chosen], self.index[chosen])


def choose(n: int, wanted: int | None, name: str, seed: int) -> np.ndarray:
    """`wanted` of n samples by seed, in their order; all of them where there are no more."""
    if wanted is None or wanted >= n:
        return np.arange(n)
    return np.sort(_rng(f"choose {name}", seed).choice(n, wanted, replace=False))


def interleave(sizes: Sequence[int], weights: Sequence[float], until: Until, seed: int) -> list[np.ndarray]:
    """Samples of each set, drawn set by set with the given probabilities until one set is used up, or every set.

    A set that is used up before the others begins anew, in another order.
    """
    share = np.asarray(weights, float) / np.sum(weights)
    rng = _rng("interleave", seed)
    taken = np.zeros(len(sizes), np.int64)
    size = np.asarray(sizes)
    rest = np.zeros(len(sizes), bool)  # used up
    while not (rest.any() if until == "first_exhausted" else rest.all()):
        draws = rng.choice(len(sizes), size=1 << 14, p=share)
        counts = taken + np.cumsum(draws[:, None] == np.arange(len(sizes)), axis=0)  # [draws, sets]
        full = counts >= size
        done = full.any(axis=1) if until == "first_exhausted" else full.all(axis=1)
        end = int(np.argmax(done)) if done.any() else len(draws) - 1
        taken, rest = counts[end], full[end]
    return [
        _rounds(int(n), int(k), _rng(f"interleave {i}", seed))
        for i, (n, k) in enumerate(zip(sizes, taken, strict=True))
    ]


def _rounds(n: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """`wanted` of n samples: whole rounds through all, then a part of one more."""
    rounds = [rng.permutation(n) for _ in range(-(-wanted // n))]
    return np.concatenate(rounds)[:wanted] if rounds else np.empty(0, np.int64)


def weights_of(names: Sequence[str], weights: tuple[tuple[str, str], ...] | tuple[float, ...] | None) -> list[float]:
    """The probability of each set; equal where none are given.

    Raises:
        UserError: not one for each set, negative, or a sum other than 1.
    """
    if weights is None:
        return [1 / len(names)] * len(names)
    if weights and isinstance(weights[0], tuple):
        by_name = {str(k): float(v) for k, v in weights}  # type: ignore[misc]
        if unknown := [k for k in by_name if k not in names]:
            raise UserError(f"data.mix_weights: '{unknown[0]}' is none of data.datasets{nearest(unknown[0], names)}")
        values = [by_name.get(name, 0.0) for name in names]
    else:
        values = [float(w) for w in weights]  # type: ignore[arg-type]
    if len(values) != len(names):
        raise UserError(f"data.mix_weights: {len(values)} weights for {len(names)} data sets")
    if min(values) <= 0:
        raise UserError("data.mix_weights: every data set needs a weight above 0; leave out the others")
    if abs(sum(values) - 1) > 1e-6:
        raise UserError(f"data.mix_weights: the weights sum to {sum(values):g}, expected 1")
    return values


def _rng(what: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, *what.encode()])
