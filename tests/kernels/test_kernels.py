from __future__ import annotations

import torch

from glmft.kernels.attention import packed_attention, packed_attention_reference
from glmft.kernels.loss import cross_entropy_sum, cross_entropy_sum_reference
from glmft.models import load_model


def test_documents_do_not_see_each_other():
    """Each document of a packed row gives what it gives alone; the mask of a whole row would not."""
    torch.manual_seed(0)
    query, key, value = torch.randn(12, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    bounds = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    packed = packed_attention(query, key, value, bounds, 7, 0.3)
    assert packed.shape == query.shape
    for start, end in ((0, 5), (5, 12)):
        alone = torch.tensor([0, end - start], dtype=torch.int32)
        part = packed_attention_reference(*(t[start:end] for t in (query, key, value)), alone, 0.3)
        assert torch.allclose(packed[start:end], part, atol=1e-6)
    whole = packed_attention_reference(query, key, value, torch.tensor([0, 12]), 0.3)
    assert (packed[5:] - whole[5:]).abs().max() > 0.01
    assert torch.allclose(packed[:5], whole[:5], atol=1e-6)


def test_attention_with_left_padding_equals_sdpa(tiny):
    """The attention of packed training meets padded batches in generation: it must use their mask."""
    model = load_model(tiny, dtype="float32")
    torch.manual_seed(0)
    ids = torch.randint(3, 1000, (3, 16))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    mask[2, :4] = 0
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation("sdpa")
        theirs = model(input_ids=ids, attention_mask=mask).logits
    assert (ours - theirs)[mask == 1].abs().max() < 1e-5


def test_chunked_loss_equals_its_reference():
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (37,))
    expected = cross_entropy_sum_reference(hidden, weight, targets)
    grads = torch.autograd.grad(expected, (hidden, weight))
    got = cross_entropy_sum(hidden, weight, targets, chunk=10)
    assert torch.allclose(got, expected)
    for a, b in zip(torch.autograd.grad(got, (hidden, weight)), grads, strict=True):
        assert torch.allclose(a, b, atol=1e-6)  # the reference computes log p in fp32
    with torch.no_grad():
        assert torch.allclose(cross_entropy_sum(hidden, weight, targets, chunk=10), expected)
    assert cross_entropy_sum(hidden[:0], weight, targets[:0]) == 0
