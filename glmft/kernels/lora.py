"""LoRA's forward without casting activations: adapters stay fp32 for the optimizer, their weights are cast for use.

PEFT casts every input of an fp32 adapter to fp32 instead, which costs a live copy of each activation
(270 against 177 kB a token and layer on ChatGLM3-6B, LoRA on all linear layers).
"""

from __future__ import annotations

import types
from typing import Any

import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn


def is_plain(layer: LoraLayer) -> bool:
    """One active, unmerged LoRA without dropout or variant: all that `_lean_forward` computes."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    return (
        name in layer.lora_A
        and not getattr(layer, "lora_variant", {}).get(name)
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and not layer.lora_bias.get(name)
    )


def _lean_forward(self: LoraLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x [..., in] -> [..., out]. Anything but plain training goes PEFT's own way."""
    if not self.training or args or kwargs or not is_plain(self):
        return type(self).forward(self, x, *args, **kwargs)
    name = self.active_adapters[0]
    out = self.base_layer(x)
    low = F.linear(x, self.lora_A[name].weight.to(x.dtype))
    return out + F.linear(low, self.lora_B[name].weight.to(x.dtype)) * self.scaling[name]


def use_lean_forward(model: nn.Module) -> int:
    """Gives every LoRA layer of the model the lean forward; returns how many there are."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        layer.forward = types.MethodType(_lean_forward, layer)
    return len(layers)
