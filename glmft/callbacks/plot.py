"""The loss curve as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TRAIN, SMOOTH = "#b9cbe4", "#1f5fae"
VALIDATION = ("#d2691e", "#2e8b57", "#8b5a9f", "#b8860b", "#c0504d", "#4f6d7a")  # of one set after the other


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the pull of its start (Kingma and Ba 2015, section 3)."""
    out, average = [], 0.0
    for i, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**i))
    return out


def plot_losses(rows: list[dict[str, Any]], file: Path) -> None:
    """Training loss raw and smoothed, the loss of each validation set as points, over optimizer steps."""
    train = [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r]
    names = dict.fromkeys(k for r in rows for k in r if k.startswith("val/"))
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=TRAIN, linewidth=1, label="train")
        axes.plot(steps, smooth(list(losses)), color=SMOOTH, linewidth=2, label="train, smoothed")
    for i, name in enumerate(names):
        label = name.removeprefix("val/").removesuffix("loss").rstrip("/")
        val = zip(*[(r["step"], r[name]) for r in rows if name in r], strict=True)
        color = VALIDATION[i % len(VALIDATION)]
        axes.plot(*val, color=color, marker="o", linewidth=1.5, label=f"validation {label}".rstrip())
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per supervised token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if train or names:
        axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(str(file))
