"""What one would use else: transformers' Trainer with PEFT, at the settings LLaMA-Factory starts with, and tuned.

Settings "default": batches of 2 padded samples, 8 of them a step, gradient checkpointing, SDPA, bf16 autocast with fp32
adapters; a full run has bf16 weights. "tuned": rows packed to 2,048 tokens with a block mask, no checkpointing, bf16
adapters, as many rows as fit.
"""

from __future__ import annotations

import tempfile
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import DictConfig
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from glmft import config
from glmft.bench.documents import GeneratedData, enough
from glmft.bench.measured import Steps
from glmft.bench.model import random_model

Kind = Literal["default", "tuned"]
BATCH, ACCUMULATE = 2, 8
ROW = 2048
ROWS = (8, 6, 4, 3, 2, 1)  # tried in this order
Sample = dict[str, Any]


def measure(cfg: DictConfig, kind: Kind) -> dict[str, Any]:
    """Trains for `bench.baseline_steps` steps."""
    data: GeneratedData = config.instantiate(cfg.data)
    number = int(cfg.bench.baseline_steps)
    if kind == "default":
        size = BATCH * ACCUMULATE
        groups = [list(range(k * size, (k + 1) * size)) for k in range(number)]
        enough([[i for i in group if i < len(data.documents)] for group in groups])
        return _train(cfg, data, kind, BATCH, ACCUMULATE, groups)
    for rows in ROWS:
        groups, per_row = _packed_groups(data, rows, number)
        try:
            return _train(cfg, data, kind, rows, 1, groups, per_row)
        except torch.OutOfMemoryError:
            pass  # outside of this block, so that the failed attempt's tensors are gone
        torch.cuda.empty_cache()
    raise torch.OutOfMemoryError("not even one packed row fits")


def _packed_groups(data: GeneratedData, rows: int, number: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Documents in order, into rows of ROW tokens: (documents of each step, the same by row)."""
    filled: list[list[int]] = [[]]
    used = 0
    for i, length in enumerate(data.documents.lengths):
        if used + length > ROW:
            filled.append([])
            used = 0
        filled[-1].append(i)
        used += int(length)
    by_row = [filled[k * rows : (k + 1) * rows] for k in range(number)]
    return enough([[i for row in step for i in row] for step in by_row]), by_row


def _train(
    cfg: DictConfig,
    data: GeneratedData,
    kind: Kind,
    batch: int,
    accumulate: int,
    groups: list[list[int]],
    by_row: list[list[list[int]]] | None = None,
) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    strategy = config.instantiate(cfg.strategy)
    full = strategy.output == "model"
    model = _model(cfg, strategy, torch.device("cuda" if on_gpu else "cpu"), dtype, fp32_adapters=kind == "default")
    items = _rows(data, by_row) if by_row else [_sample(data, i) for group in groups for i in group]
    steps = Steps(min(int(cfg.bench.warmup), len(groups) // 2))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=len(groups),
            learning_rate=float(cfg.optimizer.lr),
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            bf16=on_gpu and kind == "default" and not full,
            gradient_checkpointing=kind == "default",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not on_gpu,
            remove_unused_columns=False,
            dataloader_pin_memory=on_gpu,
        )
        clock = _Clock(steps)
        trainer = _InOrder(model, arguments, train_dataset=items, data_collator=_pad if by_row is None else _stack)
        trainer.add_callback(clock)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps.losses = losses
    tokens = [int(data.documents.lengths[group].sum()) for group in groups]
    if by_row:
        padded = len(groups) * batch * ROW
    else:
        batches = [group[k : k + batch] for group in groups for k in range(0, len(group), batch)]
        padded = sum(len(b) * int(max(data.documents.lengths[b])) for b in batches)
    return steps.result(tokens) | {
        "documents": groups,
        "settings": {
            "strategy": type(strategy).__name__,
            "trainer": "transformers Trainer, PEFT" if not full else "transformers Trainer",
            "dtype": str(dtype).removeprefix("torch.")
            + (", fp32 adapters under autocast" if on_gpu and kind == "default" and not full else ""),
            "attention": "SDPA" + (" with a block mask" if by_row else ""),
            "packing": by_row is not None,
            "padding_share": round(1 - sum(tokens) / padded, 4),
            "batch": batch,
            "accumulation": accumulate,
            "gradient_checkpointing": kind == "default",
            "optimizer": type(trainer.optimizer).__name__,
        },
    }


def _model(cfg: DictConfig, strategy: Any, device: torch.device, dtype: torch.dtype, fp32_adapters: bool) -> Any:
    """The same random weights as ours, all of which learn, or with PEFT's adapters."""
    quantization = strategy.quantization(dtype)
    model: Any = random_model(cfg.bench.size, device, dtype, quantization, "sdpa")
    torch.manual_seed(cfg.seed)
    if strategy.output == "model":
        model.requires_grad_(True)
    else:
        options = strategy.config.to_dict()
        kept = {k: options[k] for k in ("r", "lora_alpha", "lora_dropout", "target_modules")}
        model = get_peft_model(model, LoraConfig(**kept, task_type="CAUSAL_LM"), autocast_adapter_dtype=fp32_adapters)
        if not fp32_adapters:
            model.to(dtype=dtype) if quantization is None else _cast_adapters(model, dtype)
    model.config.use_cache = False
    return model


def _cast_adapters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


class _InOrder(Trainer):
    """The documents as they come: the list is in random order already."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class _Clock(TrainerCallback):
    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.steps.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.done()


def _sample(data: GeneratedData, i: int) -> Sample:
    ids, mask = data.documents[i]
    return {"ids": ids, "labels": np.where(mask, ids, -100)}


def _pad(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Padded on the right to a multiple of 8, as LLaMA-Factory's collator does."""
    longest = -(-max(len(s["ids"]) for s in samples) // 8) * 8
    out = {name: np.full((len(samples), longest), fill) for name, fill in (("input_ids", 0), ("labels", -100))}
    seen = np.zeros((len(samples), longest), np.int64)
    for row, s in enumerate(samples):
        n = len(s["ids"])
        out["input_ids"][row, :n], out["labels"][row, :n], seen[row, :n] = s["ids"], s["labels"], 1
    return {k: torch.from_numpy(v) for k, v in (out | {"attention_mask": seen}).items()}


def _rows(data: GeneratedData, by_row: list[list[list[int]]]) -> list[Sample]:
    """One item a packed row: ids, labels that do not cross documents, positions, and the number of each document."""
    items = []
    for row in (r for step in by_row for r in step):
        ids, labels, positions, numbers = (np.full(ROW, v, np.int64) for v in (0, -100, 0, len(row)))
        at = 0
        for number, i in enumerate(row):
            tokens, mask = data.documents[i]
            end = at + len(tokens)
            ids[at:end], positions[at:end], numbers[at:end] = tokens, np.arange(len(tokens)), number
            labels[at:end] = np.where(mask, tokens, -100)
            labels[at] = -100  # not predicted from the document before
            at = end
        items.append({"input_ids": ids, "labels": labels, "position_ids": positions, "numbers": numbers})
    return items


def _stack(rows: list[Sample]) -> dict[str, torch.Tensor]:
    """Packed rows with their block mask [B, 1, ROW, ROW]."""
    out = {k: torch.from_numpy(np.stack([r[k] for r in rows])) for k in ("input_ids", "labels", "position_ids")}
    numbers = torch.from_numpy(np.stack([r["numbers"] for r in rows]))
    same = numbers[:, None, :, None] == numbers[:, None, None, :]
    return out | {"attention_mask": same & torch.ones(ROW, ROW, dtype=torch.bool).tril()}
