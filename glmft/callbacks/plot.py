"""The loss curve as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TRAIN, SMOOTH, VALIDATION = "#b9cbe4", "#1f5fae", "#d2691e"


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the pull of its start (Kingma and Ba 2015, section 3)."""
    out, average = [], 0.0
    for i, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**i))
    return out


def plot_losses(rows: list[dict[str, Any]], file: Path) -> None:
    """Training loss raw and smoothed, validation loss as points, over optimizer steps."""
    train = [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r]
    val = [(r["step"], r["val/loss"]) for r in rows if "val/loss" in r]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=TRAIN, linewidth=1, label="train")
        axes.plot(steps, smooth(list(losses)), color=SMOOTH, linewidth=2, label="train, smoothed")
    if val:
        axes.plot(*zip(*val, strict=True), color=VALIDATION, marker="o", linewidth=1.5, label="validation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per supervised token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if train or val:
        axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(str(file))
