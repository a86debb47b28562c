from __future__ import annotations

import numpy as np
import pytest
import torch

from glmft import optim
from glmft.data.collate import Batch, pack
from glmft.kernels import compiling
from glmft.kernels.attention import packed_attention, packed_attention_reference
from glmft.kernels.layer import join_qkv, packed_layer
from glmft.kernels.loss import (
    cross_entropy_sum,
    cross_entropy_sum_reference,
    loss_and_gradient,
    loss_and_gradient_reference,
)
from glmft.kernels.swiglu import swiglu, swiglu_reference
from glmft.models import load_model
from glmft.models.loading import glm
from glmft.module import FineTuner
from glmft.strategies.lora import LoRA


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


@pytest.mark.parametrize("function", ["swiglu", "loss"])
def test_triton_kernels_equal_their_references(function):
    """On a GPU; the interpreter of Triton runs them on a CPU where it is installed (TRITON_INTERPRET=1)."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.3  # noqa: E731
    if function == "loss":
        logits, targets = make(300, 65024), torch.randint(0, 65024, (300,), device="cuda")
        expected, found = loss_and_gradient_reference(logits, targets), loss_and_gradient(logits.clone(), targets)
    else:
        for r, q in ((8, 8), (0, 8), (64, 0), (3, 17)):
            inputs = [make(*s).requires_grad_() for s in ((200, 2 * 320), (200, r), (2 * 320, r), (q, 320))]
            weights = make(200, 320), make(200, q)
            expected, found = (_with_gradients(f, inputs, weights) for f in (swiglu_reference, swiglu))
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b.float()).norm() <= 0.01 * b.float().norm()


def _with_gradients(f, inputs, weights):
    out = f(*inputs)
    total = sum((o.float() * w.float()).sum() for o, w in zip(out, weights, strict=True))
    return [*out, *torch.autograd.grad(total, inputs)]


def test_the_loss_and_its_gradient_with_respect_to_logits():
    torch.manual_seed(0)
    logits, targets = torch.randn(9, 20, requires_grad=True), torch.randint(0, 20, (9,))
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    losses, gradient = loss_and_gradient(logits.detach().clone(), targets)
    assert torch.allclose(losses.sum(), expected)
    assert torch.allclose(gradient, torch.autograd.grad(expected, logits)[0], atol=1e-6)


@pytest.mark.share("speed")
@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"use_dora": True}, {"targets": "attention", "dropout": 0.3}])
def test_what_the_compiled_layer_cannot_join_goes_its_own_way(tiny, options):
    """Dropout and DoRA: nothing is left out, whatever lies joined."""
    model = load_model(tiny, dtype="float32").requires_grad_(False)
    tuned = LoRA(r=4, **options).apply(model).train()
    torch.manual_seed(0)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    layer = model.model.layers[1]
    hidden = torch.randn(1, 9, 192)
    cos, sin = model.model.rotary_emb(hidden, torch.arange(9)[None])
    bounds = torch.tensor([0, 9], dtype=torch.int32)
    found = []
    for join in (False, True):
        if join:
            join_qkv(layer)
        torch.manual_seed(1)  # of dropout
        kwargs = {"position_embeddings": (cos, sin), "cu_seq_lens_q": bounds, "max_length_q": 9}
        out = packed_layer(layer, hidden, cos, sin, bounds, 9) if join else layer(hidden, **kwargs)
        learned = [p for p in layer.parameters() if p.requires_grad]
        found.append([out, *torch.autograd.grad(out.square().sum(), learned)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "targets", ["all", "attention", ["q_proj", "down_proj"], ["gate_up_proj", "o_proj"], ["v_proj"]]
)
def test_the_layer_for_the_compiler_is_transformers_own(tiny, targets):
    """Whichever linear layers have an adapter: the same output, and the same gradients of all that learns."""
    model = load_model(tiny, dtype="float32").requires_grad_(False)
    tuned = LoRA(r=4, targets=targets).apply(model).train()
    torch.manual_seed(0)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    layer, config = model.model.layers[1], model.config
    hidden = torch.randn(1, 23, config.hidden_size, requires_grad=True)
    cos, sin = model.model.rotary_emb(hidden, torch.cat([torch.arange(14), torch.arange(9)])[None])
    bounds = torch.tensor([0, 14, 23], dtype=torch.int32)
    learned = [hidden, *(p for p in layer.parameters() if p.requires_grad)]
    plain = layer(hidden, position_embeddings=(cos, sin), cu_seq_lens_q=bounds, max_length_q=14)
    weight = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * weight).sum(), learned)
    join_qkv(layer)
    assert hasattr(layer.self_attn, "joined_qkv")
    found = packed_layer(layer, hidden, cos, sin, bounds, 14)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), learned), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    again = layer(hidden, position_embeddings=(cos, sin), cu_seq_lens_q=bounds, max_length_q=14)
    torch.testing.assert_close(again, plain)  # the joined weights are the layers' own


@pytest.mark.share("speed")
def test_compiled_layers_give_the_same_loss_and_gradients(tiny, monkeypatch):
    """Packed training goes through the compiler (its tracing and autograd; no code is generated here), validation and
    generation do not."""
    samples = [(np.arange(3, 3 + n), np.arange(n) > 2) for n in (9, 14, 6)]
    batch = Batch(**pack(samples, step_tokens=1))
    calls: list[int] = []
    real = torch.compile

    def counting(f):
        traced = real(f, backend="aot_eager")

        def call(*args, **kwargs):
            calls.append(1)
            return traced(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", counting)
    results = []
    for budget in (None, 1.0, 0.3):
        module = FineTuner(str(tiny), LoRA(r=4), optim.adamw, optim.constant)
        torch.manual_seed(0)
        module.network = module.tuning.apply(load_model(tiny, dtype="float32").requires_grad_(False)).train()
        for name, p in module.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
        glm(module.network).enable_input_require_grads()
        calls.clear()
        if budget:
            torch.compiler.reset()
            compiling.compile_layers(glm(module.network).model.layers, budget)
        loss = module.loss_sum(batch)
        loss.backward()
        with torch.no_grad():
            module.loss_sum(batch)
        assert len(calls) == (4 if budget else 0)
        grads = torch.cat([p.grad.flatten() for p in module.trained_parameters.values()])
        results.append((loss.detach(), grads))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-5, atol=1e-6)
