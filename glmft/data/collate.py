"""Samples -> Batch: tensors that the model takes, packed into one row or padded to the longest.

Shapes: T tokens of a packed row, B samples x L tokens padded, N supervised tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

Arrays = tuple[np.ndarray, np.ndarray]


@dataclass
class Batch:
    """One micro-batch.

    input_ids, position_ids [1, T] or [B, L]; cu_seqlens [documents + 1] int32, or None where padded;
    loss_index [N] positions (in the flattened batch) whose next token is supervised, targets [N] those tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    loss_index: Tensor
    targets: Tensor
    step_tokens: int
    num_tokens: int  # without padding
    epoch: int = 0
    index: int = 0

    def _map(self, f: Any) -> Batch:
        values = {f_.name: getattr(self, f_.name) for f_ in fields(self)}
        return Batch(**{k: f(v) if isinstance(v, Tensor) else v for k, v in values.items()})

    def to(self, device: Any, non_blocking: bool = True) -> Batch:
        """Copies to the device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """For asynchronous copies to a GPU."""
        return self._map(lambda t: t.pin_memory())


def pack(
    samples: Sequence[Arrays], row_length: int = 0, pad_id: int = 0, max_seqlen: int = 0, **where: int
) -> dict[str, Any]:
    """Samples one after the other in one row of at least `row_length` tokens; positions restart with each.

    Labels are shifted inside each sample, so the last token of one never predicts the first of the next. Padding is a
    document of its own at the end. `max_seqlen` is the largest document of the run, if known, so that it is constant.
    """
    lengths = [len(ids) for ids, _ in samples]
    padding = max(0, row_length - sum(lengths)) or int(not samples)
    lengths += _split_padding(padding, max_seqlen)
    ids = np.concatenate([*(i for i, _ in samples), np.full(padding, pad_id, np.int32)]).astype(np.int64)
    positions = np.concatenate([np.arange(n) for n in lengths])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    supervised = np.zeros(len(ids), bool)  # of the next token
    for (_, mask), start in zip(samples, starts, strict=False):
        supervised[start : start + len(mask) - 1] = mask[1:]
    loss_index = np.flatnonzero(supervised)
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seqlens": torch.from_numpy(starts),
        "max_seqlen": max(max_seqlen, *lengths),
        "loss_index": torch.from_numpy(loss_index),
        "targets": torch.from_numpy(ids[loss_index + 1]),
        "num_tokens": len(ids) - padding,
        **where,
    }


def _split_padding(padding: int, max_seqlen: int) -> list[int]:
    """Padding as documents no longer than the longest real one."""
    if not padding:
        return []
    size = max_seqlen or padding
    return [size] * (padding // size) + ([padding % size] if padding % size else [])


def pad(samples: Sequence[Arrays], pad_id: int = 0, **where: int) -> dict[str, Any]:
    """Samples as rows, filled on the right. Causal attention never looks right, so no mask is needed."""
    longest = max((len(ids) for ids, _ in samples), default=1)
    ids = np.full((max(1, len(samples)), longest), pad_id, np.int64)
    supervised = np.zeros_like(ids, bool)
    for row, (tokens, mask) in enumerate(samples):
        ids[row, : len(tokens)] = tokens
        supervised[row, : len(mask) - 1] = mask[1:]
    loss_index = np.flatnonzero(supervised)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.arange(longest).expand(len(ids), -1),
        "cu_seqlens": None,
        "max_seqlen": longest,
        "loss_index": torch.from_numpy(loss_index),
        "targets": torch.from_numpy(ids.ravel()[loss_index + 1]),
        "num_tokens": sum(len(t) for t, _ in samples),
        **where,
    }


def split(batch: Batch, parts: int) -> list[Batch]:
    """The documents (or rows) of a batch in up to so many batches of about equal size; together they are the same."""
    if batch.cu_seqlens is None:
        rows, length = batch.input_ids.shape
        cuts = [round(i * rows / min(parts, rows)) for i in range(min(parts, rows) + 1)]
        pieces = [(slice(a, b), slice(None), None, a * length, b * length) for a, b in pairwise(cuts)]
    else:
        starts = batch.cu_seqlens.tolist()
        even = np.linspace(0, starts[-1], parts + 1)
        cuts = sorted({int(np.abs(np.asarray(starts) - at).argmin()) for at in even})  # documents at about even tokens
        pieces = [
            (slice(None), slice(starts[a], starts[b]), batch.cu_seqlens[a : b + 1] - starts[a], starts[a], starts[b])
            for a, b in pairwise(cuts)
        ]
    out = []
    for rows_of, tokens_of, cu_seqlens, start, end in pieces:
        mine = (batch.loss_index >= start) & (batch.loss_index < end)
        out.append(
            replace(
                batch,
                input_ids=batch.input_ids[rows_of, tokens_of],
                position_ids=batch.position_ids[rows_of, tokens_of],
                cu_seqlens=cu_seqlens,
                loss_index=batch.loss_index[mine] - start,
                targets=batch.targets[mine],
            )
        )
    return out
