"""The language-model loss on supervised rows only, with its gradient computed in the forward pass.

Shapes: N supervised tokens, H hidden, V rows of the vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

triton: Any = None
with contextlib.suppress(ImportError):
    import triton  # type: ignore[no-redef]
    import triton.language as tl

CHUNK = 1024  # rows whose logits exist at a time: 1024 x 65,024 x 4 bytes = 254 MiB in fp32


def cross_entropy_sum_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p(target). hidden [N, H], weight [V, H], targets [N] -> scalar fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """As the reference, but logits live for `chunk` rows only and are computed once: their gradient follows at once."""
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, chunk)  # type: ignore[no-untyped-call]
        return loss
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.stack([cross_entropy_sum_reference(h, weight, t) for h, t in parts]).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            losses[rows], d_logits = loss_and_gradient(F.linear(hidden[rows], weight), targets[rows])
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ weight
            if d_weight is not None:
                d_weight += d_logits.T @ hidden[rows]
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_hidden, d_weight = (None if d is None else d * grads[0] for d in ctx.saved_tensors)
        return d_hidden, d_weight, None, None


def loss_and_gradient_reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(target) [N] fp32 and its gradient with respect to the logits [N, V], in their dtype."""
    log_p = logits.float().log_softmax(-1)
    losses = -log_p.gather(1, targets[:, None])[:, 0]
    gradient = log_p.exp_()
    gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
    return losses, gradient.to(logits.dtype)


def loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference; on a GPU in one kernel that writes the gradient over the logits."""
    if triton is None or not logits.is_cuda:
        return loss_and_gradient_reference(logits, targets)
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    _softmax_kernel[(logits.shape[0],)](logits, targets, losses, logits.shape[1], BLOCK=8192, num_warps=16)
    return losses, logits


if triton is not None:

    @triton.jit
    def _softmax_kernel(logits, targets, losses, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """One row: maximum and sum in one reading, the gradient in a second."""
        row = tl.program_id(0)
        logits += row.to(tl.int64) * V
        target = tl.load(targets + row)
        at_target = tl.load(logits + target).to(tl.float32)
        highest = float("-inf")
        total = 0.0
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            values = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, tl.max(values))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(values - higher))
            highest = higher
        tl.store(losses + row, tl.log(total) + highest - at_target)
        tl.debug_barrier()  # every thread has read the target's logit
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            values = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(values - highest) / total - tl.where(v == target, 1.0, 0.0)
            tl.store(logits + v, gradient.to(logits.dtype.element_ty), mask=v < V)
