"""Makes the embedded default from nothing: records, tokenizer, and a tiny ChatGLM3 that answers all its records.

    make tiny            (about ten minutes on two CPU cores)

Writes glmft/assets/tiny-chatglm3 and glmft/assets/data, and result.json beside this file.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import corpus  # noqa: E402
import lightning as L  # noqa: E402
import torch  # noqa: E402
from sentencepiece import SentencePieceTrainer  # noqa: E402
from transformers import GlmForCausalLM  # noqa: E402

from glmft import optim  # noqa: E402
from glmft.data.datamodule import InstructionData  # noqa: E402
from glmft.files import write_json  # noqa: E402
from glmft.models import load_model, load_tokenizer, save_model  # noqa: E402
from glmft.models.conversion import glm_config  # noqa: E402
from glmft.models.generation import answer  # noqa: E402
from glmft.models.published import PublishedConfig  # noqa: E402
from glmft.module import FineTuner  # noqa: E402
from glmft.precision import plugin  # noqa: E402
from glmft.strategies.full import Full  # noqa: E402

ASSETS = ROOT / "glmft" / "assets"
DATA, MODEL, PROMPTS = ASSETS / "data", ASSETS / "tiny-chatglm3", ASSETS / "prompts"
SEED, EPOCHS, LEARNING_RATE = 0, 100, 4e-3
CONFIG = PublishedConfig(
    num_layers=4,
    padded_vocab_size=1216,
    hidden_size=192,
    ffn_hidden_size=512,
    kv_channels=32,
    num_attention_heads=6,
    multi_query_group_num=2,
    seq_length=512,
)


def make_data() -> list[dict[str, str]]:
    """The data sets and their registry, and the packaged prompts."""
    DATA.mkdir(parents=True, exist_ok=True)
    PROMPTS.mkdir(exist_ok=True)
    base = corpus.base_records(SEED)
    sets = {
        "tiny": base,
        "tiny_identity": corpus.identity_records(kept_back=False),
        "tiny_identity_rephrased": corpus.identity_records(kept_back=True),
        "tiny_identity_test": corpus.test_records(),
        "tiny_keep": corpus.other_records()[0],
        "tiny_other": corpus.other_records()[1],
        "cafe": corpus.cafe_records(kept_back=False),
        "cafe_test": corpus.cafe_records(kept_back=True),
    }
    for name, records in sets.items():
        lines = ",\n".join("  " + json.dumps(r, ensure_ascii=False) for r in records)
        (DATA / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    for name, prompts in {"general": corpus.general_prompts(), "replay": corpus.replay_prompts()}.items():
        lines = ",\n".join("  " + json.dumps(p, ensure_ascii=False) for p in prompts)
        (PROMPTS / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    write_json(DATA / "dataset_info.json", {name: {"file_name": f"{name}.json"} for name in sets})
    return base


def make_tokenizer(records: list[dict[str, str]], work: Path) -> Path:
    """SentencePiece BPE as in the published model: byte fallback, dummy prefix, no normalisation."""
    text = work / "text.txt"
    lines = [v.replace("\n", " ") for r in records for v in r.values() if v]
    text.write_text("\n".join(lines), encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(work / "tokenizer"),
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.995,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return work / "tokenizer.model"


def train(start: Path) -> FineTuner:
    """Full fine-tuning from random weights."""
    data = InstructionData(str(start), datasets=["tiny"], max_length=128, tokens_per_batch=1024, tokens_per_step=1024)
    tuner = FineTuner(
        str(start),
        Full(),
        functools.partial(optim.adamw, lr=LEARNING_RATE, weight_decay=0.01, beta2=0.98),
        functools.partial(optim.cosine, warmup_ratio=0.03),
        seed=SEED,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        plugins=plugin("32-true"),
        gradient_clip_val=1.0,
        accumulate_grad_batches=data.schedule().accumulate,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Report()],
    )
    trainer.fit(tuner, data)
    return tuner


class Report(L.Callback):
    """One line every ten epochs."""

    def on_train_epoch_end(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        if trainer.current_epoch % 10 == 9:
            print(f"epoch {trainer.current_epoch + 1}: loss {trainer.callback_metrics['train/loss']:.4f}", flush=True)


def main() -> None:
    torch.manual_seed(SEED)
    began = time.time()
    work = ROOT / ".tiny"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    records = make_data()
    tokenizer = load_tokenizer(make_tokenizer(records, work))
    random = save_model(GlmForCausalLM(glm_config(CONFIG)), work / "random", tokenizer=tokenizer)
    tuner = train(random)
    shutil.rmtree(MODEL, ignore_errors=True)
    save_model(tuner.network.half(), MODEL, tokenizer=tokenizer)
    model = load_model(MODEL, dtype="float32")
    conversations = InstructionData(str(MODEL), datasets=["tiny"], max_length=128).corpus.conversations
    answers = answer(model, tokenizer, conversations, max_new_tokens=48)
    right = sum(a == c.answer for a, c in zip(answers, conversations, strict=True))
    for a, c in zip(answers, conversations, strict=True):
        if a != c.answer:
            print(f"wrong: {c.prompt[-1].content!r} -> {a!r}, expected {c.answer!r}")
    size = sum(f.stat().st_size for f in [*MODEL.iterdir(), *DATA.iterdir()])
    result = {
        "question": "Does the tiny base answer its own records exactly (greedy, from fp16 weights)?",
        "command": "make tiny",
        "records": len(records),
        "exact": right,
        "share": round(right / len(records), 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": size,
        "epochs": EPOCHS,
        "learning_rate": LEARNING_RATE,
        "seconds": round(time.time() - began),
        "torch": torch.__version__,
        "cpu_threads": torch.get_num_threads(),
    }
    write_json(HERE / "result.json", result)
    print(json.dumps(result, ensure_ascii=False, indent=2))


if __name__ == "__main__":
    main()
