"""Types of knobs, used in constructor signatures: the signature is the schema that a configuration is checked with."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, Len

Positive = Annotated[int, Ge(1)]
"""1, 2, 3, ..."""
Count = Annotated[int, Ge(0)]
"""0, 1, 2, ..."""
Share = Annotated[float, Interval(ge=0, lt=1)]
"""At least 0, less than 1."""
Rate = Annotated[float, Gt(0)]
"""Above 0."""
NonNegative = Annotated[float, Ge(0)]
"""0 or above."""
Name = Annotated[str, Len(1)]
"""Text that is not empty."""

PrecisionName = Literal["auto", "bf16-true", "32-true", "bf16-mixed"]
"""Lightning's names, meaning the dtype that weights are loaded in. No fp16: it underflows to a loss of 0."""
