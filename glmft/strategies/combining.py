"""Adapters out of adapters, and out of a fully tuned model: sums by concatenation, smaller ranks by SVD."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glmft.errors import UserError
from glmft.models.published import tensor_differences

MOVE_THE_BASE = ("pissa", "olora", "corda")
"""Initialisations that take their start out of the base weights: with the adapter off, what is left is no base."""

State = dict[str, Tensor]
Pair = tuple[Tensor, Tensor]
"""(down A [r, in], up B [out, r]): the change of a layer's weight is B A."""


def check_plain(raw: Mapping[str, Any], doing: str) -> None:
    """Raises:
    UserError: settings by layer name, or a start out of the base's weights: neither survives what is being done.
    """
    if raw.get("rank_pattern") or raw.get("alpha_pattern"):
        raise UserError(f"ranks or alphas that differ by layer are not {doing}")
    if str(raw.get("init_lora_weights")).startswith(MOVE_THE_BASE):
        raise UserError(f"init_lora_weights={raw['init_lora_weights']} moves the base's weights, which is not {doing}")


def pairs_of(raw: Mapping[str, Any], state: State) -> dict[str, Pair]:
    """Layer -> its change, with the adapter's scaling inside B.

    Raises:
        UserError: DoRA, whose change is not a product, or ranks that differ by layer.
    """
    if raw.get("use_dora"):
        raise UserError("a DoRA adapter is no sum of low rank; export it merged instead")
    check_plain(raw, "combined; export it merged")
    if raw.get("lora_bias"):
        raise UserError("an adapter with biases is not combined; export it merged")
    rank = raw["r"]
    scaling = raw["lora_alpha"] / (math.sqrt(rank) if raw.get("use_rslora") else rank)
    end = ".lora_A.weight"
    layers = [name.removesuffix(end) for name in state if name.endswith(end)]
    return {n: (state[n + end].float(), scaling * state[f"{n}.lora_B.weight"].float()) for n in layers}


def weighted_sum(adapters: Sequence[Mapping[str, Pair]], weights: Sequence[float]) -> dict[str, Pair]:
    """The weighted sum of changes, exactly: their A and B one behind the other. A layer that an adapter leaves alone
    adds nothing."""
    out: dict[str, Pair] = {}
    for name in dict.fromkeys(n for a in adapters for n in a):
        parts = [(a[name][0], w * a[name][1]) for a, w in zip(adapters, weights, strict=True) if name in a]
        out[name] = torch.cat([down for down, _ in parts]), torch.cat([up for _, up in parts], dim=1)
    return out


def truncated(pair: Pair, rank: int) -> tuple[Pair, float]:
    """The best approximation of a change with a smaller rank, and its relative error in the Frobenius norm."""
    down, up = pair
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T)
    kept = s[:rank].sqrt()
    lost = float(s[rank:].norm() / s.norm()) if float(s.norm()) else 0.0
    return ((q_down @ (v[:rank].T * kept)).T, q_up @ (u[:, :rank] * kept)), lost


def extracted(change: Tensor, rank: int) -> tuple[Pair, dict[int, float]]:
    """A change [out, in] as a product of rank `rank`: its leading singular vectors; the relative error that this rank,
    half and a quarter of it would leave. Large matrices take a randomised SVD with four power iterations."""
    if min(change.shape) <= 1024:
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        v = v.T
    else:
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(change, q=rank + 16, niter=4)
    total = float(change.norm()) ** 2
    ranks = sorted({max(1, rank // 4), max(1, rank // 2), rank})
    errors = {r: math.sqrt(max(0.0, 1 - float(s[:r].square().sum()) / total)) if total else 0.0 for r in ranks}
    kept = s[:rank].sqrt()
    return ((v[:, :rank] * kept).T.contiguous(), (u[:, :rank] * kept).contiguous()), errors


def changes(base: nn.Module, tuned: nn.Module) -> Iterator[tuple[str, Tensor, float]]:
    """(name, change in fp32, its norm beside the base's) of every tensor.

    Raises:
        UserError: the two have other tensors.
    """
    own = dict(base.named_parameters())
    shapes = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (tuned, base))
    if different := tensor_differences(*shapes):
        raise UserError(f"not models of one shape: {different[0]}")
    for name, parameter in tuned.named_parameters():
        before = own[name].detach().float()
        change = parameter.detach().float() - before
        yield name, change, float(change.norm() / before.norm().clamp(min=1e-30))


def padded(pair: Pair, rank: int) -> Pair:
    """The same change at a larger rank: filled up with zeros."""
    down, up = pair
    missing = rank - down.shape[0]
    return nn.functional.pad(down, (0, 0, 0, missing)).contiguous(), nn.functional.pad(up, (0, missing)).contiguous()


def as_state(pairs: Mapping[str, Pair]) -> tuple[int, State]:
    """(rank, tensors) in PEFT's names; where a layer's rank is smaller it is filled up with zeros."""
    rank = max(down.shape[0] for down, _ in pairs.values())
    state = {}
    for name, pair in pairs.items():
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = padded(pair, rank)
    return rank, state
