"""ChatGLM3 as transformers' `GlmForCausalLM`, from the published layout or transformers' own, without remote code."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import GlmForCausalLM
from transformers.utils import logging as hf_logging

from glmft.errors import DamagedError, ResourceError, UserError
from glmft.kernels import attention
from glmft.models.conversion import glm_config, published_layout
from glmft.models.hub import Source, fetch
from glmft.models.published import INV_FREQ, WeightFiles, check_folder, check_tensors, fingerprint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def as_dtype(name: str) -> torch.dtype:
    """`"bfloat16"` -> torch.bfloat16.

    Raises:
        UserError: not one of float32, bfloat16, float16.
    """
    if name not in DTYPES:
        raise UserError(f"model.dtype={name}: allowed are {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    path: str | Path,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    source: Source = "auto",
    revision: str | None = None,
    quantization: Any = None,
) -> GlmForCausalLM:
    """Loads the weights shard by shard, straight to the device and dtype, quantised on the way in where asked.

    Args:
        path: a folder, or a hub id.
        dtype: float32, bfloat16, float16, or "auto" for the dtype of the files.
        device: where the weights go; on the CPU they stay memory-mapped where the dtype is the file's.
        source: where `path` is looked for.
        revision: a commit or tag of the hub.
        quantization: a transformers quantization config (`BitsAndBytesConfig` for QLoRA).

    Raises:
        UserError: nothing to load there, or a model that glmft does not support (named).
        DamagedError: a file is broken.
        ProblemList: tensors are missing, unexpected or of another shape (all named).
        ResourceError: the device has not enough memory.
    """
    folder = fetch(str(path), source, revision)
    config, layout, weights = check_folder(folder)
    if weights.format == "bin":
        expected = config.tensors() if layout == "chatglm" else config.glm_tensors()
        check_tensors(folder, _bin_shapes(weights), expected)
    attention.register()
    published = layout == "chatglm"
    with _quiet(), published_layout() if published else nullcontext():
        try:
            model = GlmForCausalLM.from_pretrained(
                folder,
                config=glm_config(config),
                dtype=as_dtype(config.torch_dtype if dtype == "auto" else dtype),
                device_map=None if torch.device(device).type == "cpu" else {"": device},
                quantization_config=quantization,
                attn_implementation=attention.NAME,
                use_safetensors=weights.format == "safetensors",
                local_files_only=True,
                weights_only=True,
            )
        except torch.OutOfMemoryError as e:
            raise ResourceError(
                f"not enough memory on {device} for {folder.name} ({weights.num_bytes / 1e9:.1f} GB on disk): "
                f"{str(e).splitlines()[0]}; try strategy=qlora"
            ) from None
    model.published_config = config
    model.base_fingerprint, model.source_folder = fingerprint(folder), folder
    model.published_inv_freq = _read_inv_freq(weights)
    return model


def _bin_shapes(weights: WeightFiles) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weights.files:
        try:
            tensors = torch.load(file, map_location="meta", weights_only=True, mmap=True)
            shapes |= {name: tuple(t.shape) for name, t in tensors.items()}
        except Exception as e:  # torch has many for a file that is not its own, and for one that asks for code
            raise DamagedError(
                f"{file}: not a plain file of tensors ({str(e).splitlines()[0]}); fetch it again"
            ) from None
    return shapes


def _read_inv_freq(weights: WeightFiles) -> torch.Tensor | None:
    """The published file carries the rotary frequencies; kept to be written back as they came."""
    for file in weights.files:
        if weights.format == "bin":
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            if INV_FREQ in tensors:
                return tensors[INV_FREQ].clone()
        else:
            with safe_open(file, framework="pt") as f:
                if INV_FREQ in f.keys():  # noqa: SIM118 (safe_open is no dict)
                    return f.get_tensor(INV_FREQ).clone()
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports `inv_freq` as unexpected at every load; our own check has been made already."""
    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()


def glm(model: nn.Module) -> Any:
    """The GlmForCausalLM inside, with or without PEFT around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
