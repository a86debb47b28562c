"""LoRA and QLoRA on the full-size ChatGLM3, layers compiled or not: speed, memory, and are the losses the same?

    python experiments/2026-11-24_compiled_layers/run.py MODEL DATA_DIR OUT

MODEL holds random weights in the published layout. Prediction before the run: LoRA 13,000 -> 19,000 tokens/s.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

VARIANTS = {
    "lora compiled": ("experiment=lora_alpaca_zh", "model.compile_layers=true"),
    "lora eager": ("experiment=lora_alpaca_zh", "model.compile_layers=false"),
    "qlora compiled": ("experiment=qlora_alpaca_zh", "model.compile_layers=true"),
    "lora compiled, second start": ("experiment=lora_alpaca_zh", "model.compile_layers=true", "trainer.max_steps=12"),
}
COMMON = (
    *("trainer.max_steps=48", "data.tokens_per_step=8192", "data.val_fraction=0", "scheduler=constant"),
    *("callbacks.samples=null", "callbacks.verdict=null", "callbacks.checkpoint=null", "callbacks.tuned=null"),
)


def measure(name: str, arguments: tuple[str, ...], model: str, data: str) -> dict[str, object]:
    run = name.replace(" ", "-").replace(",", "")
    places = (f"model.path={model}", f"data.dir={data}", f"run.name={run}")
    command = [sys.executable, "-m", "glmft.train", *COMMON, *arguments, *places]
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"command": command[1:], "error": (done.stdout + done.stderr)[-3000:]}
    rows = [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]
    steady = [r["tokens_per_sec"] for r in rows[8:]]
    return {
        "command": command[1:],
        "wall_s": round(time.time() - began, 1),
        "tokens_per_sec_median": statistics.median(steady) if steady else None,
        "first_step_s": rows[0]["time"],
        "memory_gib": rows[-1]["memory_gib"],
        "losses": [r["train/loss"] for r in rows],
        "tokens_per_sec": [r["tokens_per_sec"] for r in rows],
        "times": [r["time"] for r in rows],
    }


def main() -> None:
    model, data, out = sys.argv[1:4]
    results = {}
    for name, arguments in VARIANTS.items():
        results[name] = measure(name, arguments, model, data)
        print(name, {k: v for k, v in results[name].items() if not isinstance(v, list) or k == "times"}, flush=True)
        Path(out, "raw.json").write_text(json.dumps(results, indent=1))
    eager, compiled = results["lora eager"].get("losses"), results["lora compiled"].get("losses")
    if eager and compiled:
        print(
            "largest relative difference of the losses:",
            max(abs(a / b - 1) for a, b in zip(eager, compiled, strict=False)),
        )


if __name__ == "__main__":
    main()
