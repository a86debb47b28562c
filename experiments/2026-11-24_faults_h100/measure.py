"""Kills a full-size LoRA run five times; measures what the guards cost. Usage: kills|guards OUT MODEL DATA_DIR"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

OUT, MODEL, DATA = Path(sys.argv[2]), sys.argv[3], sys.argv[4]
STEPS = 60
RUN = [
    *("experiment=lora_alpaca_zh", f"model.path={MODEL}", f"data.dir={DATA}", f"trainer.max_steps={STEPS}"),
    *("callbacks.samples=null", "callbacks.verdict=null", "callbacks.checkpoint.every_n_train_steps=10"),
    *("model.compile_layers=false", "strategy.dropout=0.1"),
]


def start(name: str) -> subprocess.Popen:
    log = (OUT / f"{name}.log").open("a")
    command = [sys.executable, __file__, "train", str(OUT), MODEL, DATA, *RUN, f"run.name={name}"]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def status(name: str) -> dict:
    file = Path("runs") / name / "status.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def rows(name: str) -> dict[int, dict]:
    lines = (Path("runs") / name / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r for r in map(json.loads, lines) if "train/loss" in r}


def kills() -> dict:
    began = time.time()
    assert start("whole").wait() == 0
    whole = {"seconds": time.time() - began}
    rng = random.Random(3)
    starts = []
    for kill in range(6):
        began = time.time()
        process = start("killed")
        before = max(rows("killed"), default=0) if kill else 0
        if kill < 5:
            target = before + rng.randint(6, 13)
            while process.poll() is None and not (
                status("killed").get("step", 0) >= target and status("killed")["pid"] == process.pid
            ):
                time.sleep(0.02)
            time.sleep(rng.random())
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        log = (OUT / "killed.log").read_text()
        resumed = [
            int(line.split("from step ")[1].split(" ")[0].split("\u2502")[0])
            for line in log.splitlines()
            if "continued from step" in line
        ]
        starts.append(
            {
                "seconds": time.time() - began,
                "code": code,
                "died_at": status("killed").get("step"),
                "continued": resumed,
            }
        )
    a, b = rows("whole"), rows("killed")
    differences = [abs(a[s]["train/loss"] - b[s]["train/loss"]) / a[s]["train/loss"] for s in a]
    manifests = sorted((Path("runs") / "whole" / "checkpoints").glob("*/manifest.json"))
    saves = [json.loads(line) for line in (OUT / "saves.jsonl").read_text().splitlines()]
    return {
        "whole": whole,
        "starts": starts,
        "steps": len(b),
        "loss": {s: [a[s]["train/loss"], b[s]["train/loss"]] for s in a},
        "largest_relative_difference": max(differences),
        "bit_identical": all(a[s]["train/loss"] == b[s]["train/loss"] for s in a),
        "checkpoint_bytes": json.loads(manifests[-1].read_text())["files"]["trainer.ckpt"]["bytes"],
        "save_seconds_median": float(np.median([s["seconds"] for s in saves])),
    }


def train() -> int:
    """python -m glmft.train, with the time of each save noted."""
    from glmft import config
    from glmft.callbacks.checkpoint import Checkpoints
    from glmft.train import main

    original = Checkpoints.save

    def timed(self, trainer):
        began = time.perf_counter()
        original(self, trainer)
        with (OUT / "saves.jsonl").open("a") as f:
            f.write(json.dumps({"step": trainer.global_step, "seconds": time.perf_counter() - began}) + "\n")

    Checkpoints.save = timed
    sys.argv = ["glmft.train", *sys.argv[5:]]
    return config.run("train", main)


def guards() -> int:
    """Alternating steps with and without the guards, and the host synchronisations of a step."""
    import lightning as L
    import torch

    from glmft import config
    from glmft.callbacks.record import RunRecord
    from glmft.module import FineTuner
    from glmft.train import main

    times: dict[str, list[float]] = {"with": [], "without": []}
    syncs: list[int] = []
    guarded = FineTuner.configure_gradient_clipping

    def alternating(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if self.trainer.global_step % 2 == 0:
            return guarded(self, optimizer, gradient_clip_val, gradient_clip_algorithm)
        torch.nn.utils.clip_grad_norm_(
            [p for p in self.parameters() if p.grad is not None], gradient_clip_val, foreach=True
        )
        self._step_loss = 0.0
        self._window.clear()
        return None

    class Clock(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            torch.cuda.synchronize()
            self.counted = 50 <= trainer.global_step < 54
            self.guarded = trainer.global_step % 2 == 0
            if self.counted:
                self.caught = warnings.catch_warnings(record=True)
                self.seen = self.caught.__enter__()
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
            self.began = time.perf_counter()

        def on_train_batch_end(self, trainer, *args):
            if self.counted:
                torch.cuda.set_sync_debug_mode("default")
                self.caught.__exit__(None, None, None)
                where = [f"{w.filename}:{w.lineno}" for w in self.seen if "synchronizing" in str(w.message)]
                syncs.append([self.guarded, where])
            torch.cuda.synchronize()
            if trainer.global_step > 60 and not self.counted:
                times["with" if self.guarded else "without"].append(time.perf_counter() - self.began)

    FineTuner.configure_gradient_clipping = alternating
    made = config.instantiate_all
    config.instantiate_all = lambda nodes: (
        lambda found: [Clock(), *found] if any(isinstance(c, RunRecord) for c in found) else found
    )(made(nodes))
    options = [o for o in RUN if not o.startswith(("trainer.max_steps", "callbacks.checkpoint", "model.compile"))]
    sys.argv = [
        "glmft.train",
        *options,
        "trainer.max_steps=640",
        "trainer.max_epochs=20",
        "model.compile_layers=true",
        "run.name=guards",
        "callbacks.checkpoint=null",
        "callbacks.tuned=null",
    ]
    code = config.run("train", main)
    with_guards, without = (np.array(times[k]) for k in ("with", "without"))
    n = min(len(with_guards), len(without))
    pairs = (with_guards[:n] - without[:n]) / np.median(without)
    rng = np.random.default_rng(0)
    boots = [np.median(rng.choice(pairs, n)) for _ in range(2000)]
    result = {
        "pairs": n,
        "median_ms_with": 1e3 * float(np.median(with_guards)),
        "median_ms_without": 1e3 * float(np.median(without)),
    }
    result |= {
        "median_difference_percent": 100 * float(np.median(pairs)),
        "interval_percent": [100 * float(q) for q in np.quantile(boots, [0.025, 0.975])],
    }
    (OUT / "guards.json").write_text(json.dumps(result | {"syncs": syncs}))
    return code


if __name__ == "__main__":
    if sys.argv[1] == "kills":
        (OUT / "kills.json").write_text(json.dumps(kills(), indent=1))
    else:
        sys.exit({"train": train, "guards": guards}[sys.argv[1]]())
