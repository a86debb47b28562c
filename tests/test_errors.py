"""Bad input: exit code, what the message holds, no traceback, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import FAST, reference
from safetensors.torch import load_file, save_file


def truncated(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def misshapen(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["transformer.output_layer.weight"] = tensors["transformer.output_layer.weight"][:5].clone()
    save_file(tensors, model / "model.safetensors")


def missing_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


CASES = {  # name: (damage to ./model or None, arguments, exit code, what the message holds)
    "model folder missing": (None, ["model.path=nowhere"], 2, ["model.path=nowhere", "no model folder"]),
    "hub id without network": (
        None,
        ["model.path=zai-org/chatglm3-6b", "model.source=hf"],
        2,
        ["hf download zai-org/chatglm3-6b", "modelscope download --model ZhipuAI/chatglm3-6b", "the hub said"],
    ),
    "model and data missing together": (
        None,
        ["experiment=lora_alpaca_zh"],
        2,
        ["model.path=zai-org/chatglm3-6b", "hf download", "'alpaca_zh_demo' is in no registry", "curl -L"],
    ),
    "shard missing": (missing_shard, [], 2, ["1 of 2 shards are missing: model-00002-of-00002.safetensors"]),
    "shard truncated": (truncated, [], 3, ["model.safetensors", "truncated"]),
    "tensor of the wrong shape": (misshapen, [], 2, ["transformer.output_layer.weight has shape [5, 192]"]),
    "tokenizer of another model": (
        lambda m: shutil.copyfile(__file__, m / "tokenizer.model"),
        [],
        3,
        ["tokenizer.model: not a SentencePiece model"],
    ),
    "tokenizer of another size": (
        lambda m: shutil.copyfile(reference("data/chatglm3-tokenizer") / "tokenizer.model", m / "tokenizer.model"),
        [],
        2,
        ["tokenizer.model: 64798 tokens, but the model has 1216 rows"],
    ),
    "unknown experiment": (None, ["experiment=lora_alpaca"], 2, ["experiment=lora_alpaca", "'lora_alpaca_zh'"]),
    "unknown strategy": (None, ["strategy=lorra"], 2, ["strategy=lorra", "did you mean 'lora'?"]),
    "unknown keys, all of them": (
        None,
        ["strategy.rank=8", "trainer.max_epoch=3", "sed=1"],
        2,
        ["strategy.rank: unknown key", "did you mean 'max_epochs'?", "sed: unknown key, did you mean 'seed'?"],
    ),
    "wrong types and ranges, all of them": (
        None,
        ["optimizer.lr=1e-4x", "strategy.r=0", "strategy.dropout=1.5", "data.on_too_long=cut", "data.packing=perhaps"],
        2,
        [
            "optimizer.lr=1e-4x: must be a valid number",
            "strategy.r=0: must be greater than or equal to 1",
            "strategy.dropout=1.5: must be less than 1",
            "data.on_too_long=cut: must be 'truncate', 'drop', 'split_turns' or 'error'",
            "data.packing=perhaps: must be a valid boolean",
        ],
    ),
    "learning rate of zero": (None, ["optimizer.lr=0"], 2, ["optimizer.lr=0: must be greater than 0"]),
    "target that matches nothing": (
        None,
        ["strategy.targets=[q_prog]"],
        2,
        ["no linear layer 'q_prog', did you mean 'q_proj'?"],
    ),
    "data set missing": (
        None,
        ["data.datasets=[alpaka]"],
        2,
        ["'alpaka' is in no registry", "tried dataset_info.json"],
    ),
    "max_length beyond the model": (
        None,
        ["data.max_length=4096", "data.tokens_per_step=4096", "data.tokens_per_batch=4096"],
        2,
        ["data.max_length=4096: the model reads 512 tokens at most"],
    ),
    "token budgets that do not fit": (None, ["data.tokens_per_step=64"], 2, ["does not fit data.tokens_per_step=64"]),
    "precision against dtype": (
        None,
        ["model.dtype=float32", "trainer.precision=bf16-true"],
        2,
        ["model.dtype=float32 and trainer.precision=bf16-true contradict"],
    ),
    "precision unknown": (None, ["trainer.precision=16-true"], 2, ["trainer.precision=16-true", "bf16-true"]),
    "run name with a slash": (None, ["run.name=a/b"], 2, ["run.name='a/b'", "plain folder name"]),
    "misspelt names in sections without a class": (
        None,
        ["run.nmae=x", "resume.froce=true", "resume.mode=sometimes", "paths.outputdir=x", "callbacks.recrod.x=1"],
        2,
        [
            "run.nmae: unknown key, did you mean 'name'?",
            "resume.froce: unknown key, did you mean 'force'?",
            "resume.mode=sometimes: must be 'auto' or 'never'",
            "paths.outputdir: unknown key, did you mean 'output_dir'?",
            "callbacks.recrod: there is no such entry, did you mean 'record'?",
        ],
    ),
    "a logger's setting without the logger": (
        None,
        ["logger.wandb.mode=offline"],
        2,
        ["logger.wandb: there is no such entry (choose it with logger=..."],
    ),
    "values of the trainer": (
        None,
        ["trainer.gradient_clip_val=-1", "trainer.max_epochs=three", "trainer.accumulate_grad_batches=4", "seed=-1"],
        2,
        [
            "trainer.gradient_clip_val=-1: must be greater than or equal to 0",
            "trainer.max_epochs=three: must be a valid integer",
            "trainer.accumulate_grad_batches: glmft decides this itself",
            "seed=-1: must be greater than or equal to 0",
        ],
    ),
    "no end": (None, ["trainer.max_epochs=-1"], 2, ["both without a limit"]),
    "a sweep over several devices": (None, ["-m", "strategy.r=4,8", "trainer.devices=2"], 2, ["one device"]),
    "quantised weights and PiSSA": (
        None,
        ["strategy=qlora", "strategy.init_weights=pissa"],
        2,
        ["strategy.init_weights=pissa needs weights that are not quantised"],
    ),
    "a device that is not there": (None, ["trainer.accelerator=gpu"], 2, ["No supported gpu backend found"]),
    "a rate that is no number": (None, ["optimizer.lr=nan"], 2, ["optimizer.lr=nan: must be less than inf"]),
    "a rank above the layer": (None, ["strategy.r=100000"], 2, ["strategy.r=100000: a target layer is only 64 wide"]),
    "a value that must be given": (None, ["optimizer.lr=???"], 2, ["optimizer.lr: must be given (it is ???)"]),
    "values that need each other": (None, ["seed=${seed}"], 2, ["Recursive interpolation detected", "seed"]),
    "a value of nothing": (None, ["data.max_length=${nope.x}"], 2, ["Interpolation key 'nope.x' not found"]),
    "the environment has no such name": (None, ["data.seed=${oc.env:NOPE}"], 2, ["'NOPE' not found", "data.seed"]),
    "output in a model's folder": (
        None,
        ["paths.output_dir=.", "run.name=model"],
        2,
        ["model: exists and is not a run of glmft; choose another run.name"],
    ),
    "output that cannot be written": (None, ["paths.output_dir=/proc/x"], 2, ["/proc/x/", "cannot be written"]),
    "nothing to do": (None, ["trainer.max_epochs=0"], 2, ["is 0: there is nothing to do"]),
    "validation at no time": (
        None,
        ["trainer.val_check_interval=0"],
        2,
        ["trainer.val_check_interval=0: must be greater than 0"],
    ),
    "a warm-up longer than the run": (
        None,
        ["scheduler.warmup_ratio=2"],
        2,
        ["scheduler.warmup_ratio=2: must be less"],
    ),
    "a target outside": (
        None,
        ["+callbacks.extra={_target_: os.system, command: ls}"],
        2,
        ["callbacks.extra._target_=os.system: there is no module 'os'"],
    ),
    "no budget": (
        None,
        ["data.tokens_per_batch=0"],
        2,
        ["data.tokens_per_batch=0: must be greater than or equal to 1"],
    ),
    "other notations": (
        None,
        ["strategy.r=0123", "data.packing=yes", "strategy.alpha=1_6x"],
        2,
        ["strategy.r=0123: must be a valid integer", "data.packing=yes: must be a valid boolean", "alpha=1_6x"],
    ),
    "a secret in the configuration": (
        None,
        ["logger=wandb", "+logger.wandb.api_key=abc"],
        2,
        ["logger.wandb.api_key: unknown key"],
    ),
    "quantised weights over several devices": (
        None,
        ["strategy=qlora", "+trainer.strategy=fsdp"],
        2,
        ["The strategy `fsdp` requires a GPU accelerator"],
    ),
    "run record left out": (None, ["callbacks.record=null"], 2, ["callbacks.record=null"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(train, tiny, name):
    damage, arguments, code, says = CASES[name]
    shutil.copytree(tiny, "model")
    if damage:
        damage(Path("model"))
    if not any(a.startswith(("model.path", "experiment=")) for a in arguments):
        arguments = ["model.path=model", *arguments]
    before = everything()
    result = train(*arguments)
    assert result.code == code, result.err
    for text in says:
        assert text in result.err
    assert "Traceback" not in result.err + result.out
    assert result.err.startswith("glmft: ")
    assert everything() == before, "something was written"


def everything() -> list[Path]:
    """All files here, but Hydra's own note on a multirun and whole token files of data that was in order."""
    found = (p for p in Path().rglob("*") if p.is_file() and ".multirun" not in p.parts)
    return sorted(p for p in found if not (p.parent.name == "tokens" and p.name[0] != "."))


def test_a_broken_recipe_names_its_file(train):
    folder = Path("glmft_conf/experiment")
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("a: [1\nb: 2")
    result = train("experiment=mine")
    assert result.code == 2
    assert "not valid YAML" in result.err
    assert "mine.yaml" in result.err
    assert "Traceback" not in result.err


def test_qlora_without_bitsandbytes(train, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a))
    result = train("strategy=qlora")
    assert result.code == 2
    assert "needs bitsandbytes: pip install bitsandbytes" in result.err
    assert not Path("runs").exists()


def test_bf16_on_a_gpu_without_it(train, monkeypatch):
    from glmft import precision

    monkeypatch.setattr(precision, "real_bf16", lambda: False)
    with pytest.raises(Exception, match="no bf16 of its own"):
        precision.choose("bf16-true", "auto", on_gpu=True)
    assert precision.choose("auto", "auto", on_gpu=True) == ("32-true", "float32")


def test_debug_shows_the_traceback(train):
    result = train("debug=default", "model.path=nowhere")
    assert result.code == 2
    assert "Traceback" in result.err


def test_a_folder_that_is_no_run_is_left_alone(train):
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/thesis.txt").write_text("precious")
    result = train("run.name=mine")
    assert result.code == 2
    assert "is not a run of glmft" in result.err
    assert [p.name for p in Path("runs/mine").iterdir()] == ["thesis.txt"]


def test_a_loss_that_is_not_finite_says_so(train):
    result = train("run.name=a", *FAST, "optimizer.lr=1e30", "trainer.max_steps=6", "trainer.gradient_clip_val=null")
    assert result.code == 1
    assert "not finite" in result.err
    assert json.loads(Path("runs/a/status.json").read_text())["state"] == "failed"
    assert "not finite" in Path("runs/a/run.log").read_text()


def test_out_of_memory_names_what_helps(train, monkeypatch):
    import torch

    from glmft.module import FineTuner

    def full(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(FineTuner, "loss_sum", full)
    result = train("run.name=a", *FAST)
    assert result.code == 4
    assert "model.gradient_checkpointing=true" in result.err
    assert "Traceback" not in result.err


def test_a_run_stopped_after_its_last_step_is_finished_by_the_same_command(train, monkeypatch):
    from glmft.callbacks.export import SaveTuned

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(SaveTuned, "on_train_end", killed)
        assert train("run.name=a", *FAST).code == 130
    assert not Path("runs/a/adapter").exists()
    assert train("run.name=a", *FAST).code == 0
    assert Path("runs/a/adapter/adapter_model.safetensors").is_file()
    assert json.loads(Path("runs/a/status.json").read_text())["state"] == "done"
    summary = json.loads(Path("runs/a/summary.json").read_text())
    assert summary["val/loss best"] > 0
    assert summary["tokens_per_sec"] > 0
