"""How likely given answers are under a model, in one forward pass a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glmft.models.generation import evaluating
from glmft.models.loading import glm

Pair = tuple[Sequence[int], Sequence[int]]
"""(prompt ids, answer ids)."""


@dataclass(frozen=True)
class Scores:
    """Of N answers; their tokens one behind the other, T in all.

    `loss` [T] is -log p of each token in nats, `choice` [T] the model's own first choice there, `target` [T] the
    token, `lengths` [N] tokens of each answer.
    """

    loss: np.ndarray
    choice: np.ndarray
    target: np.ndarray
    lengths: np.ndarray

    def per_answer(self, values: np.ndarray) -> np.ndarray:
        """Sums of `values` [T] over each answer, [N]."""
        ends = np.cumsum(self.lengths)
        sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        return sums[ends] - sums[ends - self.lengths]

    @property
    def chosen(self) -> np.ndarray:
        """[N], true where the greedy answer is the given one: each token is the first choice after those before."""
        return self.per_answer(self.choice == self.target) == self.lengths


@torch.inference_mode()
def score_answers(model: Any, pairs: Sequence[Pair], pad_id: int, tokens_per_batch: int = 8192) -> Scores:
    """Teacher-forced losses of the answers, those of similar length sharing a batch (padded on the right)."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]), reverse=True)
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    with evaluating(model):
        while order:
            longest = len(pairs[order[0]][0]) + len(pairs[order[0]][1])
            size = max(1, tokens_per_batch // longest)
            batch, order = order[:size], order[size:]
            for i, result in zip(batch, _score(model, [pairs[i] for i in batch], pad_id), strict=True):
                found[i] = result
    results = [found[i] for i in range(len(pairs))]
    none = np.zeros(0)
    return Scores(
        np.concatenate([none, *(loss for loss, _ in results)]),
        np.concatenate([none, *(choice for _, choice in results)]),
        np.concatenate([none, *(np.asarray(answer) for _, answer in pairs)]),
        np.array([len(answer) for _, answer in pairs], dtype=np.int64),
    )


def _score(model: Any, pairs: Sequence[Pair], pad_id: int) -> list[tuple[np.ndarray, np.ndarray]]:
    device = next(model.parameters()).device
    rows = [[*prompt, *answer] for prompt, answer in pairs]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    inner = glm(model)
    hidden: Tensor = inner.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    results = []
    for row, (prompt, answer) in enumerate(pairs):
        span = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))
        losses, choices = [], []
        for h, t in zip(hidden[row, span].split(1024), torch.tensor(answer, device=device).split(1024), strict=True):
            logits = F.linear(h, inner.lm_head.weight).float()
            losses.append(F.cross_entropy(logits, t, reduction="none"))
            choices.append(logits.argmax(-1))
        results.append((torch.cat(losses).cpu().numpy(), torch.cat(choices).cpu().numpy()))
    return results
