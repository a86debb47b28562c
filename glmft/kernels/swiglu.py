"""SwiGLU between the two linear layers of the MLP, with the wide sides of both adapters computed in the same pass.

An adapter on the first layer adds to 2 F outputs, one on the second reads F inputs: done as matrix products of their
own, each is another pass over the widest activations of the model. Here they are small products on the tiles that the
activation function has at hand.

Shapes: T tokens, F width of the MLP, r and q ranks of the first and the second layer's adapter (0: it has none).
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

triton: Any = None
with contextlib.suppress(ImportError):
    import triton  # type: ignore[no-redef]
    import triton.language as tl

MAX_RANK = 64  # of the kernel's tiles


def swiglu_reference(gate_up: Tensor, low: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The activations of the MLP and what the second layer's adapter makes of them.

    gate_up [T, 2 F] is the first layer's output without its adapter, low [T, r] that adapter's narrow side, up
    [2 F, r] and down [q, F] weights of the two adapters -> [T, F], [T, q].
    """
    gate, linear = (gate_up + F.linear(low, up)).chunk(2, dim=-1)
    hidden = F.silu(gate) * linear
    return hidden, F.linear(hidden, down)


def has_kernel(tensor: Tensor) -> bool:
    """Triton, a GPU, and half precision."""
    return triton is not None and tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)


def swiglu(gate_up: Tensor, low: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference, in one kernel where the device has it."""
    if not has_kernel(gate_up) or max(low.shape[1], down.shape[0]) > MAX_RANK:
        return swiglu_reference(gate_up, low, up, down)
    hidden, parts = _forward_op(gate_up, low, up, down)
    return hidden, parts.sum(0).to(hidden.dtype)


if triton is not None:

    @triton.jit
    def _forward_kernel(  # type: ignore[no-untyped-def]
        gate_up, low, up, down, hidden, parts, T, F,
        r: tl.constexpr, q: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
    ):  # fmt: skip
        """One tile [BT, BF] of the activations, and its share of `hidden @ down^T`: parts [F / BF, T, q]."""
        t = tl.program_id(1) * BT + tl.arange(0, BT)
        f = tl.program_id(0) * BF + tl.arange(0, BF)
        tile = (t < T)[:, None] & (f < F)[None, :]
        at = t.to(tl.int64)[:, None] * (2 * F) + f[None, :]
        gate = tl.load(gate_up + at, mask=tile, other=0.0).to(tl.float32)
        linear = tl.load(gate_up + at + F, mask=tile, other=0.0).to(tl.float32)
        if r > 0:
            i = tl.arange(0, R)
            narrow = tl.load(low + t[:, None] * r + i[None, :], mask=(t < T)[:, None] & (i < r)[None, :], other=0.0)
            wide = up + f[None, :] * r + i[:, None]  # [R, BF]
            seen = (i < r)[:, None] & (f < F)[None, :]
            gate += tl.dot(narrow, tl.load(wide, mask=seen, other=0.0))
            linear += tl.dot(narrow, tl.load(wide + F * r, mask=seen, other=0.0))
        out = (gate * tl.sigmoid(gate) * linear).to(hidden.dtype.element_ty)
        tl.store(hidden + t.to(tl.int64)[:, None] * F + f[None, :], out, mask=tile)
        if q > 0:
            j = tl.arange(0, Q)
            weight = tl.load(down + j[None, :] * F + f[:, None], mask=(j < q)[None, :] & (f < F)[:, None], other=0.0)
            share = tl.dot(out, weight)  # [BT, Q]
            where = (tl.program_id(0) * T + t).to(tl.int64)[:, None] * q + j[None, :]
            tl.store(parts + where, share, mask=(t < T)[:, None] & (j < q)[None, :])

    @triton.jit
    def _backward_kernel(  # type: ignore[no-untyped-def]
        d_hidden, d_narrow, gate_up, low, up, down, d_gate_up, low_parts, d_up, d_down, T, F, span: tl.constexpr,
        r: tl.constexpr, q: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
    ):  # fmt: skip
        """Columns [BF] of `span` tokens: the gradient of gate_up, shares of the narrow gradient [F / BF, T, r], and
        sums over these tokens for both weights, d_up [T / span, 2 F, r] and d_down [T / span, q, F]."""
        f = tl.program_id(0) * BF + tl.arange(0, BF)
        i = tl.arange(0, R)
        j = tl.arange(0, Q)
        in_f = f < F
        dtype: tl.constexpr = d_gate_up.dtype.element_ty
        if r > 0:
            seen = in_f[:, None] & (i < r)[None, :]
            up_gate = tl.load(up + f[:, None] * r + i[None, :], mask=seen, other=0.0)  # [BF, R]
            up_linear = tl.load(up + (F + f)[:, None] * r + i[None, :], mask=seen, other=0.0)
            sum_gate = tl.zeros([BF, R], tl.float32)
            sum_linear = tl.zeros([BF, R], tl.float32)
        if q > 0:
            weight = tl.load(down + j[:, None] * F + f[None, :], mask=(j < q)[:, None] & in_f[None, :], other=0.0)
            sum_down = tl.zeros([Q, BF], tl.float32)
        begin = tl.program_id(1) * span
        for start in range(0, span, BT):
            t = begin + start + tl.arange(0, BT)
            in_t = t < T
            tile = in_t[:, None] & in_f[None, :]
            row = t.to(tl.int64)[:, None]
            grad = tl.load(d_hidden + row * F + f[None, :], mask=tile, other=0.0).to(tl.float32)
            gate = tl.load(gate_up + row * (2 * F) + f[None, :], mask=tile, other=0.0).to(tl.float32)
            linear = tl.load(gate_up + row * (2 * F) + F + f[None, :], mask=tile, other=0.0).to(tl.float32)
            if r > 0:
                narrow = tl.load(low + row * r + i[None, :], mask=in_t[:, None] & (i < r)[None, :], other=0.0)
                gate += tl.dot(narrow, tl.trans(up_gate))
                linear += tl.dot(narrow, tl.trans(up_linear))
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            if q > 0:
                d_low = tl.load(d_narrow + row * q + j[None, :], mask=in_t[:, None] & (j < q)[None, :], other=0.0)
                grad += tl.dot(d_low, weight)
                sum_down += tl.dot(tl.trans(d_low), (silu * linear).to(dtype))
            d_gate = (grad * linear * (sigmoid + silu * (1 - sigmoid))).to(dtype)
            d_linear = (grad * silu).to(dtype)
            tl.store(d_gate_up + row * (2 * F) + f[None, :], d_gate, mask=tile)
            tl.store(d_gate_up + row * (2 * F) + F + f[None, :], d_linear, mask=tile)
            if r > 0:
                share = tl.dot(d_gate, up_gate)
                share += tl.dot(d_linear, up_linear)
                where = (tl.program_id(0) * T + t).to(tl.int64)[:, None] * r + i[None, :]
                tl.store(low_parts + where, share, mask=in_t[:, None] & (i < r)[None, :])
                sum_gate += tl.dot(tl.trans(d_gate), narrow)
                sum_linear += tl.dot(tl.trans(d_linear), narrow)
        part = tl.program_id(1)
        if r > 0:
            at = part * 2 * F * r + f[:, None] * r + i[None, :]
            tl.store(d_up + at, sum_gate, mask=seen)
            tl.store(d_up + at + F * r, sum_linear, mask=seen)
        if q > 0:
            at = part * q * F + j[:, None] * F + f[None, :]
            tl.store(d_down + at, sum_down, mask=(j < q)[:, None] & in_f[None, :])


FORWARD = {"BT": 64, "BF": 64, "num_warps": 4}  # the fastest of twelve on an H100, at r = q = 8
BACKWARD = {"BT": 64, "BF": 64, "num_warps": 4}  # of thirty-two
SPANS = 16  # parts of the tokens that the backward kernel sums by themselves


def _padded(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length()) if rank else 16


def _spans(T: int) -> tuple[int, int]:
    """(tokens of a span, spans)."""
    span = math.ceil(T / SPANS / 64) * 64
    return span, math.ceil(T / span)


@torch.library.custom_op("glmft::swiglu", mutates_args=())
def _forward_op(gate_up: Tensor, low: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    T, width, r, q = gate_up.shape[0], gate_up.shape[1] // 2, low.shape[1], down.shape[0]
    blocks = math.ceil(width / FORWARD["BF"])
    hidden = gate_up.new_empty(T, width)
    parts = gate_up.new_empty(blocks, T, q, dtype=torch.float32)
    _forward_kernel[(blocks, math.ceil(T / FORWARD["BT"]))](
        gate_up, low, up, down, hidden, parts, T, width, r=r, q=q, R=_padded(r), Q=_padded(q), **FORWARD
    )
    return hidden, parts


@torch.library.custom_op("glmft::swiglu_backward", mutates_args=())
def _backward_op(
    d_hidden: Tensor, d_narrow: Tensor, gate_up: Tensor, low: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, width, r, q = gate_up.shape[0], gate_up.shape[1] // 2, low.shape[1], down.shape[0]
    blocks, (span, spans) = math.ceil(width / BACKWARD["BF"]), _spans(T)
    d_gate_up = torch.empty_like(gate_up)
    low_parts = gate_up.new_empty(blocks, T, r, dtype=torch.float32)
    d_up = gate_up.new_empty(spans, 2 * width, r, dtype=torch.float32)
    d_down = gate_up.new_empty(spans, q, width, dtype=torch.float32)
    _backward_kernel[(blocks, spans)](
        d_hidden, d_narrow, gate_up, low, up, down, d_gate_up, low_parts, d_up, d_down, T, width,
        span=span, r=r, q=q, R=_padded(r), Q=_padded(q), **BACKWARD,
    )  # fmt: skip
    return d_gate_up, low_parts, d_up, d_down


@_forward_op.register_fake
def _(gate_up: Tensor, low: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    T, width = gate_up.shape[0], gate_up.shape[1] // 2
    parts = gate_up.new_empty(math.ceil(width / FORWARD["BF"]), T, down.shape[0], dtype=torch.float32)
    return gate_up.new_empty(T, width), parts


@_backward_op.register_fake
def _(
    d_hidden: Tensor, d_narrow: Tensor, gate_up: Tensor, low: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, width, r, q = gate_up.shape[0], gate_up.shape[1] // 2, low.shape[1], down.shape[0]
    spans = _spans(T)[1]
    return (
        torch.empty_like(gate_up),
        gate_up.new_empty(math.ceil(width / BACKWARD["BF"]), T, r, dtype=torch.float32),
        gate_up.new_empty(spans, 2 * width, r, dtype=torch.float32),
        gate_up.new_empty(spans, q, width, dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_hidden: Tensor, d_parts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate_up, low, up, down = ctx.saved_tensors
    d_narrow = d_parts[0].to(gate_up.dtype)  # the parts are summed, so each has the same gradient
    d_gate_up, low_parts, d_up, d_down = _backward_op(
        d_hidden.contiguous(), d_narrow.contiguous(), gate_up, low, up, down
    )
    dtype = gate_up.dtype
    return d_gate_up, low_parts.sum(0).to(dtype), d_up.sum(0).to(dtype), d_down.sum(0).to(dtype)


_forward_op.register_autograd(_backward, setup_context=_save)
