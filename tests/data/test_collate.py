from __future__ import annotations

import numpy as np
import torch

from glmft.data.collate import Batch, pack, pad

A = (np.array([5, 6, 7, 8]), np.array([False, False, True, True]))
B = (np.array([9, 10, 11]), np.array([True, False, True]))
WHERE = {"step_tokens": 3}


def test_pack():
    batch = Batch(**pack([A, B], row_length=10, **WHERE))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 10]
    assert batch.max_seqlen == 4
    # 7 and 8 follow 6 and 7; 11 follows 10; 9 is supervised but begins its sample, so nothing predicts it
    assert batch.loss_index.tolist() == [1, 2, 5]
    assert batch.targets.tolist() == [7, 8, 11]
    assert batch.num_tokens == 7


def test_padding_is_no_longer_than_the_longest_sample():
    batch = Batch(**pack([A], row_length=14, max_seqlen=4, **WHERE))
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 12, 14]
    assert batch.max_seqlen == 4


def test_pad():
    batch = Batch(**pad([A, B], **WHERE))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 11, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch.cu_seqlens is None
    assert batch.input_ids.flatten()[batch.loss_index + 1].tolist() == batch.targets.tolist() == [7, 8, 11]


def test_a_rank_without_a_row_gets_an_empty_batch():
    for batch in (Batch(**pack([], **WHERE)), Batch(**pad([], **WHERE))):
        assert batch.num_tokens == 0
        assert batch.targets.numel() == 0
        assert batch.input_ids.numel() == 1


def test_to_moves_every_tensor():
    batch = Batch(**pack([A, B], **WHERE)).to("meta")
    assert all(v.is_meta for v in vars(batch).values() if isinstance(v, torch.Tensor))
