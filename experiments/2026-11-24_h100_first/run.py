"""The main job at full size: random weights of ChatGLM3-6B's shape, written once in the published layout, read back by
the real loader, and fine-tuned on alpaca_zh_demo with LoRA and with QLoRA.

    python experiments/2026-11-24_h100_first/run.py DATA OUT

DATA holds alpaca_zh_demo.json, dataset_info.json and tokenizer.model; OUT gets result.json and the metrics.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL, RUNS = Path("/tmp/chatglm3-random"), Path("/tmp/runs")
SIZES = (28, 65024, 4096, 13696, 128, 32, 2, 8192)
COMMON = ["data.tokens_per_batch=8192", "data.tokens_per_step=8192", f"model.path={MODEL}", f"paths.output_dir={RUNS}"]


def write_model(data: Path) -> dict[str, float]:
    """Random weights, straight on the GPU in bf16."""
    import torch
    from transformers import GlmForCausalLM

    from glmft.models import load_tokenizer, save_model
    from glmft.models.conversion import glm_config
    from glmft.models.published import PublishedConfig

    began = time.time()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = GlmForCausalLM(glm_config(PublishedConfig(*SIZES)))
    built = time.time()
    save_model(model, MODEL, tokenizer=load_tokenizer(data))
    size = sum(f.stat().st_size for f in MODEL.glob("*.safetensors"))
    return {"build_s": built - began, "write_s": time.time() - built, "bytes": size}


LOAD = """
import json, sys, time, torch
from pathlib import Path
from glmft.models import load_model
from glmft.strategies.qlora import QLoRA
def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 2**20
torch.zeros(1, device="cuda")
rows = []
for kind in ("bf16", "bf16", "nf4"):
    before = anonymous()
    torch.cuda.reset_peak_memory_stats()
    began = time.time()
    quantization = QLoRA().quantization(torch.bfloat16) if kind == "nf4" else None
    model = load_model(sys.argv[1], dtype="bfloat16", device="cuda", quantization=quantization)
    torch.cuda.synchronize()
    rows.append({"kind": kind, "seconds": time.time() - began,
                 "gpu_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                 "gpu_gib": torch.cuda.memory_allocated() / 2**30, "anonymous_host_gib": anonymous() - before})
    del model
    torch.cuda.empty_cache()
print(json.dumps(rows))
"""


def train(name: str, experiment: str, out: Path) -> dict[str, object]:
    command = [sys.executable, "-m", "glmft.train", f"experiment={experiment}", f"run.name={name}", *COMMON]
    command += [f"data.dir={sys.argv[1]}", "callbacks.progress.every_seconds=5"]
    began = time.time()
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    print(done.stdout[-3500:], done.stderr[-3000:], flush=True)
    run = RUNS / name
    row: dict[str, object] = {"command": " ".join(command[1:]), "code": done.returncode, "wall_s": time.time() - began}
    if (run / "summary.json").is_file():
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rates = sorted(r["tokens_per_sec"] for r in rows if r["step"] > 3 and "tokens_per_sec" in r)
        row |= {
            "summary": json.loads((run / "summary.json").read_text()),
            "median_tokens_per_sec": rates[len(rates) // 2],
            "losses": [round(r["train/loss"], 4) for r in rows if "train/loss" in r],
            "checkpoint_bytes": (run / "checkpoints" / "last.ckpt").stat().st_size,
            "adapter_bytes": (run / "adapter" / "adapter_model.safetensors").stat().st_size,
        }
        shutil.copy(run / "metrics.jsonl", out / f"{name}_metrics.jsonl")
        shutil.copy(run / "env.json", out / "env.json")
    return row


def main() -> None:
    data, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    result: dict[str, object] = {"model": write_model(data)}
    import torch

    torch.cuda.empty_cache()
    load = subprocess.run([sys.executable, "-c", LOAD, str(MODEL)], text=True, capture_output=True, check=False)
    result["load"] = json.loads(load.stdout.splitlines()[-1]) if load.returncode == 0 else load.stderr[-2000:]
    print(json.dumps(result, indent=1), flush=True)
    for name, experiment in (("lora", "lora_alpaca_zh"), ("qlora", "qlora_alpaca_zh")):
        result[name] = train(name, experiment, out)
        (out / "result.json").write_text(json.dumps(result, indent=1))
    short = {k: {m: n for m, n in result[k].items() if m != "losses"} for k in ("lora", "qlora")}  # type: ignore[attr-defined]
    print(json.dumps(short, indent=1))


if __name__ == "__main__":
    main()
