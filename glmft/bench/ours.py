"""The training step of glmft, as `python -m glmft.train` makes it, on random weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig

from glmft import config, precision
from glmft.bench.documents import GeneratedData
from glmft.bench.measured import Steps
from glmft.bench.model import random_model
from glmft.checkpoints import CheckpointFiles
from glmft.kernels.attention import has_varlen
from glmft.module import FineTuner

WATCHED = 3  # steps at the end whose host synchronisations are counted


class Clock(L.Callback):
    """Times optimizer steps; at the end, lists where the host waited for the device."""

    def __init__(self, steps: Steps, number: int) -> None:
        self.steps, self.number, self.waits = steps, number, list[list[str]]()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, FineTuner)
        self.has_varlen = has_varlen(pl_module.network.get_input_embeddings().weight)
        self.steps.begin()

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step >= self.number and torch.cuda.is_available():
            self.caught = warnings.catch_warnings(record=True)
            self.seen = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if hasattr(self, "caught"):
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(None, None, None)
            del self.caught
            self.waits.append(
                [f"{Path(w.filename).name}:{w.lineno}" for w in self.seen if "synchronizing" in str(w.message)]
            )
        elif isinstance(pl_module, FineTuner) and pl_module.step_metrics is not None:
            self.steps.done(pl_module.step_metrics["train/loss"])


def build(cfg: DictConfig) -> tuple[FineTuner, GeneratedData, str, torch.device]:
    """(tuner with random weights instead of a folder's, data, Lightning's precision, device)."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    name, dtype = precision.choose(cfg.trainer.precision, cfg.model.dtype, on_gpu)
    tuner: FineTuner = config.instantiate(cfg.model, dtype=dtype)
    quantization = tuner.tuning.quantization(getattr(torch, dtype))

    def load(device: torch.device, dtype: str) -> Any:
        model = random_model(cfg.bench.size, device, getattr(torch, dtype), quantization)
        torch.manual_seed(cfg.seed)  # of what the strategy adds
        return model

    tuner.check = lambda: None  # type: ignore[method-assign]
    tuner.load = load  # type: ignore[method-assign]
    return tuner, config.instantiate(cfg.data), name, device


def measure(cfg: DictConfig, groups: list[list[int]] | None = None) -> dict[str, Any]:
    """Trains for some steps; with `groups`, on another trainer's steps, for their losses."""
    tuner, data, name, device = build(cfg)
    if groups is not None:
        data.follow(groups)
    number = len(groups) if groups is not None else int(cfg.bench.steps)
    documents = data.steps(number)
    steps = Steps(int(cfg.bench.warmup))
    clock = Clock(steps, number)
    trainer: L.Trainer = config.instantiate(
        {k: v for k, v in cfg.trainer.items() if k not in ("precision", "max_epochs", "max_steps")},
        plugins=[precision.plugin(name), CheckpointFiles()],
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        max_steps=number + (WATCHED if groups is None and device.type == "cuda" else 0),
        max_epochs=-1,
        accumulate_grad_batches=data.schedule().accumulate,
    )
    trainer.fit(tuner, data)
    tokens = [int(data.documents.lengths[d].sum()) for d in documents]
    schedule = data.schedule()
    row = schedule.rows_per_step * schedule.row_budget
    dtype = tuner.network.get_input_embeddings().weight.dtype
    attention = "SDPA" if not data.packing else "torch varlen" if clock.has_varlen else "SDPA a document"
    return steps.result(tokens) | {
        "host_waits_of_a_step": clock.waits,
        "documents": documents,
        "settings": {
            "strategy": type(tuner.tuning).__name__,
            "dtype": str(dtype).removeprefix("torch."),
            "attention": attention,
            "packing": data.packing,
            "padding_share": round(1 - sum(tokens) / (row * number), 4) if data.packing else None,
            "tokens_per_micro_batch": data.tokens_per_batch,
            "tokens_per_step": data.tokens_per_step,
            "compiled": tuner.compiles,
            "memory_budget": tuner.memory_budget,
            "gradient_checkpointing": tuner.gradient_checkpointing,
            "optimizer": type(trainer.optimizers[0]).__name__,
        },
    }
