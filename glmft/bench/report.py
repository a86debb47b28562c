"""Ratios, validity and the table of what the sides of a bench measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from glmft.bench.documents import GeneratedData
from glmft.bench.model import Size, flops

PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "4090": 165.2, "3090": 71.0}
"""Dense bf16 products, from the vendors' data sheets; H100 and H200 as SXM."""
DRIFT, LOSSES_APART = 0.03, 0.02  # beyond which a comparison is void
COMPARED = 20  # step whose losses must agree


def judge(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ratios of ours to everything else, and why a comparison is void."""
    first, last = parts["ours"], parts.get("ours_last")
    rates = [p["tokens_per_sec"] for p in (first, last) if p]
    ours = float(np.mean(rates))
    void = []
    if last and abs(rates[1] / rates[0] - 1) > DRIFT:
        void.append(f"ours went from {rates[0]:,.0f} to {rates[1]:,.0f} tokens/s between its first and its last run")
    ratios: dict[str, float] = {}
    for name in ("frozen_base", "matmul"):
        if "bounds" in parts:
            ratios[name] = ours / parts["bounds"][name]["tokens_per_sec"]
    apart: dict[str, float] = {}
    for name, part in parts.items():
        if not name.startswith("baseline_"):
            continue
        ratios[name] = ours / part["tokens_per_sec"]
        theirs, same = np.array(part["losses"]), np.array(parts[f"as_{name}"]["losses"])
        at = min(COMPARED, len(theirs)) - 1
        apart[name] = float(abs(same[at] / theirs[at] - 1))
        if apart[name] > LOSSES_APART:
            void.append(f"{name}: losses at step {at + 1} are {apart[name]:.1%} apart on the same documents")
    return {
        "tokens_per_sec": round(ours, 1),
        "ratios": {k: round(v, 4) for k, v in ratios.items()},
        "losses_apart": {k: round(v, 6) for k, v in apart.items()},
        "void": void,
    }


def utilisation(size: Size, part: dict[str, Any], data: GeneratedData, full: bool, warmup: int) -> dict[str, Any]:
    """TFLOP/s of the model's own operations, and their share of the card's peak (MFU) where that is known."""
    chosen = [i for group in part["documents"][warmup:] for i in group]
    work = flops(size, data.documents.lengths[chosen], int(data.documents.num_supervised[chosen].sum()), full)
    tflops = work / sum(part["seconds"][warmup:]) / 1e12
    peak = next((v for k, v in PEAK_TFLOPS.items() if k in device_name()), None)
    return {"tflops": round(tflops, 1), "mfu": round(tflops / peak, 4) if peak else None}


def device_name() -> str:
    """The GPU's, or "CPU"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    parts, verdict = result["parts"], result["verdict"]
    lines = [f"{'':16} {'tokens/s':>10} {'ours x':>8} {'step ms':>9} {'GiB':>6}  settings"]

    def line(name: str, part: dict[str, Any], ratio: float | None = None) -> None:
        settings = part.get("settings", {})
        shown = [str(settings[k]) for k in ("strategy", "dtype", "attention") if k in settings]
        shown += [k.replace("_", " ") for k in ("compiled", "gradient_checkpointing") if settings.get(k)]
        if settings.get("padding_share") is not None:
            shown.append(f"{settings['padding_share']:.1%} padding")
        ratio_of = f"{ratio:8.2f}" if ratio is not None else " " * 8
        memory = f"{part['reserved_gib']:6.1f}" if "reserved_gib" in part else " " * 6
        rate, step = part["tokens_per_sec"], part.get("step_ms")
        time_of = f"{step:9.1f}" if step else " " * 9
        lines.append(f"{name:16} {rate:10,.0f} {ratio_of} {time_of} {memory}  {', '.join(shown)}")

    line("ours", parts["ours"])
    if "ours_last" in parts:
        line("ours, last", parts["ours_last"])
    for name in ("frozen_base", "matmul"):
        if name in verdict["ratios"]:
            line(name.replace("_", " "), parts["bounds"][name], verdict["ratios"][name])
    for name in (n for n in parts if n.startswith("baseline_")):
        line(name.removeprefix("baseline_"), parts[name], verdict["ratios"][name])
    used = result["utilisation"]
    mfu = f", {used['mfu']:.1%} of the card's peak" if used["mfu"] else ""
    lines.append(f"{used['tflops']:.0f} TFLOP/s of the model's own operations{mfu}")
    lines += [f"losses at step {COMPARED}, {k}: {v:.2%} apart" for k, v in verdict["losses_apart"].items()]
    lines += [f"VOID: {reason}" for reason in verdict["void"]]
    return "\n".join(lines)
