"""Types of knobs, used in constructor signatures: the signature is the schema that a configuration is checked with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval, Len

Positive = Annotated[int, Ge(1)]
"""1, 2, 3, ..."""
Count = Annotated[int, Ge(0)]
"""0, 1, 2, ..."""
Share = Annotated[float, Interval(ge=0, lt=1)]
"""At least 0, less than 1."""
ReplayShare = Annotated[float, Interval(gt=0, le=0.9)]
"""Above 0, at most 0.9."""
Budget = Annotated[float, Interval(gt=0, le=1)]
"""Above 0, at most 1."""
Rate = Annotated[float, Interval(gt=0, lt=float("inf"))]
"""Above 0, finite."""
NonNegative = Annotated[float, Interval(ge=0, lt=float("inf"))]
"""0 or above, finite."""
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]
"""What NumPy takes as a seed."""
Name = Annotated[str, Len(1)]
"""Text that is not empty."""

PrecisionName = Literal["auto", "bf16-true", "32-true", "bf16-mixed"]
"""Lightning's names, meaning the dtype that weights are loaded in. No fp16: it underflows to a loss of 0."""
DtypeName = Literal["auto", "float32", "bfloat16"]
"""Of the weights in training; "auto" follows trainer.precision."""


# ---- sections of the configuration that no class is built from


def run(name: Name | None = None, dir: Name = "") -> None:
    """`run`: the name fixes the directory."""


def resume(mode: Literal["auto", "never"] = "auto", force: bool = False) -> None:
    """`resume`: whether a run of the same name goes on; `force` allows a longer run with a schedule that depends on
    the length."""


def paths(output_dir: Name = "runs") -> None:
    """`paths`: where run directories lie."""


def bench(
    size: Literal["6b", "tiny"] = "6b",
    steps: Positive = 30,
    warmup: Count = 8,
    bounds: bool = True,
    baselines: list[Literal["default", "tuned"]] | None = None,
    baseline_steps: Positive = 20,
    out: Name | None = None,
    part: Name | None = None,
    file: Name | None = None,
) -> None:
    """`bench`: what is measured beside the training step."""


def top(seed: Seed = 42, metric: Literal["auto", "val/loss", "train/loss"] = "auto") -> None:
    """Single values: the seed of everything, and what a sweep optimises."""


def trainer(
    max_epochs: Annotated[int, Ge(-1)] | None = None,
    max_steps: Annotated[int, Ge(-1)] = -1,
    precision: PrecisionName = "auto",
    gradient_clip_val: NonNegative | None = None,
    devices: Positive | list[int] | Literal["auto"] = 1,
    val_check_interval: Rate | None = None,
    num_sanity_val_steps: Count = 0,
    log_every_n_steps: Positive = 1,
    **others: Any,
) -> None:
    """`trainer`: the values of Lightning's Trainer whose range matters here."""
