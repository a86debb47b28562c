"""Are vLLM's tokens ours? 12 greedy tokens on the packaged tiny ChatGLM3, both layouts, with and without an adapter.

    python run.py make MODEL OUT      in glmft's environment: exports, adapters, expected tokens
    python run.py serve OUT                     in vLLM's (constraints-serve.txt): compares

Settings of vLLM on a CPU: VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_OMP_THREADS_BIND=nobind.
"""

import json
import sys
from pathlib import Path

PROMPTS = [[1202, 1203, 1206, 5, 9, 77, 400, 1207], list(range(100, 130)), [1202, 1203, 5, 9, 77, 1000]]
NEW, RANK = 12, 4


def make(model: str, out: Path) -> None:
    import shutil

    import torch

    from glmft.artefacts import write_folder
    from glmft.export import main as export
    from glmft.models import load_model
    from glmft.strategies.adapter import load_adapter, save_adapter
    from glmft.strategies.lora import LoRA

    base = out / "base"
    shutil.copytree(model, base)
    torch.manual_seed(0)
    tuned = LoRA(r=RANK).apply(load_model(base, dtype="float32"))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    write_folder(out / "adapter", lambda part: save_adapter(tuned, part, "card"), {})
    options = ["--dtype", "float32", "--device", "cpu", "--layout"]
    for layout in ("glm_hf", "chatglm"):
        assert export([str(base), str(out / layout), *options, layout]) == 0
        adapter = ["--adapter", "--model", str(base), "--device", "cpu", "--layout", layout]
        assert export([str(out / "adapter"), str(out / f"adapter-{layout}"), *adapter]) == 0
    expected = {}
    plain = load_model(base, dtype="float32").eval()
    for name, network in (("base", plain), ("adapter", None)):
        network = network or load_adapter(load_model(base, dtype="float32").eval(), out / "adapter")
        for i, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            found = network.generate(
                input_ids=ids, attention_mask=ids * 0 + 1, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
            )
            expected[f"{name} {i}"] = found[0, len(prompt) :].tolist()
    (out / "expected.json").write_text(json.dumps(expected))


def serve(out: Path) -> None:
    import torch
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    expected = json.loads((out / "expected.json").read_text())
    rows = {}
    for layout in ("glm_hf", "chatglm"):
        folder = out / f"adapter-{layout}"
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        llm = LLM(
            str(out / layout), dtype="float32", enforce_eager=True, max_model_len=128, enable_lora=True,
            max_lora_rank=max(8, 1 << (rank - 1).bit_length()), seed=0,
        )  # fmt: skip
        how = SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW, ignore_eos=True)
        for name, lora in (("base", None), ("adapter", LoRARequest("tuned", 1, str(folder)))):
            for i, prompt in enumerate(PROMPTS):
                (found,) = llm.generate({"prompt_token_ids": prompt}, how, lora_request=lora, use_tqdm=False)
                rows[f"{layout} {name} {i}"] = list(found.outputs[0].token_ids) == expected[f"{name} {i}"]
        del llm
    result = {
        "question": "Are vLLM's greedy tokens those of transformers and PEFT?",
        "equal": rows,
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
    }
    (out / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    role, *rest = sys.argv[1:]
    make(rest[0], Path(rest[1])) if role == "make" else serve(Path(rest[0]))
