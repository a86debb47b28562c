"""Compiled decoder layers for packed training; everything else goes through the layers as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from glmft.kernels.layer import join_qkv, packed_layer

PAYS_FROM = 2_000_000
"""Tokens of a run from which compiling is worth its start: about 30 s against 25 microseconds a token on an H100."""


def compile_layers(layers: Iterable[nn.Module], memory_budget: float = 1.0) -> None:
    """`packed_layer` is compiled for each layer and used where it is called with packed rows and gradients; validation,
    generation and padded batches, whose shapes change from call to call, keep the layer's own forward.

    `memory_budget` is the share of a layer's activations that may be kept for the backward pass; what costs least is
    computed again there (torch's min-cut partitioner, `torch._functorch.config.activation_memory_budget`).
    """
    import torch._functorch.config  # heavy, and only needed here

    torch._functorch.config.activation_memory_budget = memory_budget
    for layer in layers:
        join_qkv(layer)
        layer.forward = _Switch(layer, layer.forward)


class _Switch:
    """One layer's forward: compiled for packed rows with gradients, else plain."""

    def __init__(self, layer: nn.Module, plain: Any) -> None:
        self.layer, self.plain, self.compiled = layer, plain, torch.compile(packed_layer)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        if cu_seqlens is None or not torch.is_grad_enabled():
            return self.plain(hidden_states, *args, **kwargs)
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)  # type: ignore[attr-defined]  # one graph for any number
        cos, sin = kwargs["position_embeddings"]
        return self.compiled(self.layer, hidden_states, cos, sin, cu_seqlens, kwargs["max_length_q"])
