"""Causal attention that keeps packed documents apart, registered with transformers as "glmft".

Shapes: B batch, S tokens of a row, T tokens of a packed row, H query heads, K key/value heads, D head width.
`cu_seq_lens_q` [docs + 1] int32 holds the first token of each document and T at the end.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

varlen_attn: Any = None
with contextlib.suppress(ImportError):
    from torch.nn.attention.varlen import varlen_attn  # type: ignore[no-redef]
_OPTIONS = {"enable_gqa": True} if varlen_attn and "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

NAME = "glmft"


def has_varlen(tensor: Tensor) -> bool:
    """torch's variable-length attention is flash attention: CUDA, half precision, compute capability 8.0 and above."""
    return (
        varlen_attn is not None
        and tensor.is_cuda
        and tensor.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
    )


def packed_attention_reference(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """One SDPA call a document. query [T, H, D], key and value [T, K, D] -> [T, H, D]."""
    out = []
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        if end > start:
            q, k, v = (t[start:end].transpose(0, 1)[None] for t in (query, key, value))
            doc = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            out.append(doc[0].transpose(0, 1))
    return torch.cat(out)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    """As the reference, with torch's variable-length kernel where the device has it."""
    if not has_varlen(query):
        return packed_attention_reference(query, key, value, cu_seqlens, scale)
    out: Tensor = varlen_attn(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scale,
        window_size=(-1, 0),  # causal
        **_OPTIONS,
    )
    return out


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, S, D], key and value [B, K, S, D] -> [B, S, H, D]."""
    if attention_mask is not None and attention_mask.numel() == 0:  # `no_mask`
        attention_mask = None
    if cu_seq_lens_q is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    assert attention_mask is None and query.shape[0] == 1 and max_length_q is not None, "packed rows have no mask"
    q, k, v = (t.transpose(1, 2)[0] for t in (query, key, value))
    return packed_attention(q, k, v, cu_seq_lens_q, max_length_q, scaling)[None], None


def no_mask(like: Tensor) -> Tensor:
    """An empty mask [1, 1, 0, 0]: whole causal rows. transformers hands a 4-D mask through, where it would otherwise
    read the positions from the device, in every forward, to find out whether they are packed."""
    return like.new_empty((1, 1, 0, 0))


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """SDPA's mask for padded batches and for generation; none for whole causal rows, packed or not, whose
    positions would otherwise be taken for a second description of the packing."""
    if attention_mask is None and kwargs.get("q_length") == kwargs.get("kv_length"):
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def register() -> None:
    """Makes `attn_implementation="glmft"` known to transformers."""
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, _mask)
