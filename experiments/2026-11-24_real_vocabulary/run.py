"""`experiment=lora_alpaca_zh` as it stands, on the real vocabulary and the real alpaca_zh_demo, with a small random
ChatGLM3 (65,024 rows) that two CPU cores can train.

    python experiments/2026-11-24_real_vocabulary/run.py DATA

DATA holds alpaca_zh_demo.json, dataset_info.json and tokenizer.model. Writes result.json beside this file.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import GlmForCausalLM

from glmft.models import load_tokenizer, save_model
from glmft.models.conversion import glm_config
from glmft.models.published import PublishedConfig

HERE = Path(__file__).resolve().parent


def main() -> None:
    data = Path(sys.argv[1]).resolve()
    work = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    sizes = PublishedConfig(2, 65024, 128, 192, 32, 4, 2, 2048)
    save_model(GlmForCausalLM(glm_config(sizes)), work / "model", tokenizer=load_tokenizer(data))
    arguments = ["experiment=lora_alpaca_zh", "run.name=real", "model.path=model", f"data.dir={data}"]
    began = time.time()
    subprocess.run([sys.executable, "-m", "glmft.train", *arguments, "callbacks.samples=null"], cwd=work, check=True)
    run = work / "runs" / "real"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [r["train/loss"] for r in rows if "train/loss" in r]
    third = len(losses) // 3
    first, last = losses[:third], losses[-third:]
    fall = statistics.mean(first) - statistics.mean(last)
    error = math.sqrt(statistics.variance(first) / third + statistics.variance(last) / third)
    result = {
        "question": "Does experiment=lora_alpaca_zh run its 3 epochs on the real vocabulary, and does the loss fall?",
        "command": "python -m glmft.train " + " ".join(a.replace(str(data), "DATA") for a in arguments),
        "hardware": "2 CPU cores",
        "torch": torch.__version__,
        "seconds": round(time.time() - began),
        "steps": len(losses),
        "loss_first_epoch": round(statistics.mean(first), 4),
        "loss_last_epoch": round(statistics.mean(last), 4),
        "fall": round(fall, 4),
        "standard_error": round(error, 5),
        "fall_in_standard_errors": round(fall / error, 1),
        "summary": json.loads((run / "summary.json").read_text()),
    }
    (HERE / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
