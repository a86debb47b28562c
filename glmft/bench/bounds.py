"""What the machine could do at most: matrix products, memory, the frozen base without anything that learns."""

from __future__ import annotations

import time
from typing import Any

import torch
from omegaconf import DictConfig

from glmft.bench.measured import Steps, synchronize
from glmft.bench.model import SIZES, random_model
from glmft.bench.ours import build
from glmft.data.datamodule import PlannedDataset
from glmft.kernels.compiling import compile_layers
from glmft.models.published import linear_shapes

TIMES = 20


def measure(cfg: DictConfig) -> dict[str, Any]:
    """All of them, in one process."""
    tuner, data, _, device = build(cfg)
    dtype = getattr(torch, tuner.dtype_name)
    model = random_model(cfg.bench.size, device, dtype)
    model.enable_input_require_grads()
    if cfg.model.compile_layers is True:  # auto decides by the length of a run
        compile_layers(model.model.layers)
    tuner.network = model.train()
    steps, plan = Steps(int(cfg.bench.warmup)), data.plan(data.documents)
    batches = PlannedDataset(plan, 0)
    accumulate = plan.schedule.accumulate
    steps.begin()
    for step in range(int(cfg.bench.steps)):
        for k in range(accumulate):
            batch = batches[(0, step * accumulate + k)].to(device)
            (tuner.loss_sum(batch) / batch.step_tokens).backward()  # type: ignore[no-untyped-call]
        steps.done()
    tokens = [int(data.documents.lengths[d].sum()) for d in data.steps(int(cfg.bench.steps))]
    frozen = steps.result(tokens)
    tuner.network = model = None
    supervised = data.documents.num_supervised.sum() / data.documents.lengths.sum()
    return {
        "frozen_base": frozen,
        "matmul": matmuls(cfg, device, dtype, data.tokens_per_batch, float(supervised)),
        "copy_gb_per_sec": copy(device),
    }


def matmuls(cfg: DictConfig, device: torch.device, dtype: torch.dtype, rows: int, supervised: float) -> dict[str, Any]:
    """Forward product and input gradient of every linear layer, and of the head on supervised rows."""
    config = SIZES[cfg.bench.size]
    shapes = [(shape, rows, config.num_layers) for shape in linear_shapes(config).values()]
    shapes.append(((config.padded_vocab_size, config.hidden_size), int(rows * supervised), 1))
    seconds, done = 0.0, 0.0
    for (out, into), n, times in shapes:
        x, w = (torch.randn(shape, device=device, dtype=dtype) for shape in ((n, into), (out, into)))
        y = torch.empty(n, out, device=device, dtype=dtype)

        def both(x: Any = x, w: Any = w, y: Any = y) -> None:
            torch.mm(x, w.T, out=y)
            torch.mm(y, w, out=x)

        seconds += times * _seconds(both)
        done += times * 4.0 * n * out * into
    return {"tokens_per_sec": round(rows / seconds, 1), "tflops": round(done / seconds / 1e12, 1)}


def copy(device: torch.device) -> float:
    """Bytes read and written a second by a copy, in GB."""
    size = 2**30 if device.type == "cuda" else 2**26
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return round(2 * size / _seconds(lambda: b.copy_(a)) / 1e9, 1)


def _seconds(f: Any) -> float:
    for _ in range(3):
        f()
    synchronize()
    began = time.perf_counter()
    for _ in range(TIMES):
        f()
    synchronize()
    return (time.perf_counter() - began) / TIMES
