"""Lightning's precision names, meaning the dtype that weights are loaded in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from torch import nn

from glmft.errors import ResourceError, UserError

DTYPE_OF = {"bf16-true": "bfloat16", "32-true": "float32", "bf16-mixed": "float32"}
NAME_OF = {"bfloat16": "bf16-true", "float32": "32-true"}


class LoadedPrecision(HalfPrecision):
    """Weights come in their dtype from the loader, and nothing is cast afterwards.

    Lightning's own plugin casts the whole module, rotary frequencies included, which moves cos by up to 1.4 at
    position 8191; it also changes torch's default dtype inside the steps.
    """

    def __init__(self, name: Literal["bf16-true", "32-true"]) -> None:
        super().__init__("bf16-true")
        self.precision = name  # type: ignore[assignment]

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        yield


def real_bf16() -> bool:
    """True where the first CUDA device computes bf16 itself: torch counts emulation unless told not to."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def choose(precision: str, dtype: str, on_gpu: bool) -> tuple[str, str]:
    """(precision, dtype) from what was asked; "auto" is bf16 on a GPU that has it, else fp32.

    Raises:
        UserError: the two contradict each other, or the device cannot do it.
    """
    if precision == "auto":
        precision = NAME_OF.get(dtype, "bf16-true" if on_gpu and real_bf16() else "32-true")
    if dtype not in ("auto", DTYPE_OF[precision]):
        raise UserError(
            f"model.dtype={dtype} and trainer.precision={precision} contradict each other; "
            f"{precision} loads {DTYPE_OF[precision]}"
        )
    if on_gpu and precision.startswith("bf16") and not real_bf16():
        raise UserError(
            f"trainer.precision={precision}: this GPU has no bf16 of its own (V100 and T4 emulate it); "
            "use trainer.precision=32-true"
        )
    return precision, DTYPE_OF[precision]


def check_fp32_fits(num_parameters: int, total_bytes: int) -> None:
    """For a GPU without bf16 of its own, whose weights are therefore fp32.

    Raises:
        ResourceError: the weights alone do not fit.
    """
    if (needed := num_parameters * 4) > total_bytes:
        raise ResourceError(
            f"this GPU has no bf16 of its own (V100, T4), and in fp32 the weights alone need {needed / 2**30:.0f} GiB "
            f"of its {total_bytes / 2**30:.0f} GiB (fp16 underflows to a loss of 0). "
            "strategy=qlora keeps the base in 4 bit and trains in fp32"
        )


def plugin(precision: str) -> Precision:
    """The plugin of a precision that `choose` returned."""
    if precision == "bf16-mixed":
        return MixedPrecision("bf16-mixed", "cuda" if torch.cuda.is_available() else "cpu")
    return LoadedPrecision(precision)  # type: ignore[arg-type]
