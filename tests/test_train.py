"""The program itself: real Hydra, Lightning, PEFT and W&B on the tiny model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FAST, Outcome, reference
from safetensors.torch import load_file

from glmft.files import read_json
from glmft.models import load_model, load_tokenizer
from glmft.runs import read_jsonl, read_status

SHORT = (
    "trainer.max_epochs=2",
    "data.max_samples=60",
    "callbacks.compare=null",
    "callbacks.verdict=null",
    "callbacks.samples.max_new_tokens=8",
)


def rows(run: Path, key: str) -> list[float]:
    return [r[key] for r in read_jsonl(run / "metrics.jsonl") if key in r]


def test_the_embedded_default_changes_the_identity_and_keeps_the_rest(train, tiny):
    result: Outcome = train("data.fill.name=小明", "data.fill.author=Ada Lovelace", "run.name=demo")
    assert result.code == 0, result.err
    run = result.folder / "runs" / "demo"
    names = {p.name for p in run.iterdir()}
    assert names >= {
        *(".hydra", "command.txt", "env.json", "run.log", "metrics.jsonl", "samples.jsonl", "status.json"),
        *("summary.json", "loss.png", "adapter", "checkpoints"),
    }
    assert {p.name for p in (run / ".hydra").iterdir()} == {"config.yaml", "overrides.yaml", "hydra.yaml"}
    summary = read_json(run / "summary.json")
    identity, other = (summary["compare"][k] for k in ("tiny_identity_test", "tiny_other"))
    assert identity["tuned_right"] >= 0.95
    assert identity["base_equal"] == 0.0
    assert other["base_equal"] >= 0.98
    assert other["kept"] >= 0.9
    assert (summary["learned"], summary["kept"]) == ("yes", "yes")
    samples = read_jsonl(run / "samples.jsonl")
    before = {r["prompt"]: r["answer"] for r in samples if r["step"] == 0}
    after = {r["prompt"]: r["answer"] for r in samples if r["step"] == summary["steps"]}
    for question in ("你是谁？", "Who are you?"):
        assert "小明" in after[question]
        assert "Ada Lovelace" in after[question]
        assert "小明" not in before[question]
    assert "我是glmft自带的微型模型。" in result.out
    first = {"step", "epoch", "time", "train/loss", "lr", "grad_norm", "tokens_per_sec", "memory_gib"}
    assert set(next(r for r in read_jsonl(run / "metrics.jsonl") if r["step"] == 1)) == first
    assert rows(run, "val/loss")[-1] < rows(run, "val/loss")[0]
    status = read_status(run)
    assert (status["state"], status["step"], status["total"]) == ("done", summary["steps"], summary["steps"])
    assert (run / "loss.png").stat().st_size > 10_000
    assert {p.name for p in (run / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "manifest.json",
    }  # fmt: skip
    command = (run / "command.txt").read_text()
    assert command == "python -m glmft.train 'data.fill.name=小明' 'data.fill.author=Ada Lovelace' run.name=demo\n"
    log = (run / "run.log").read_text()
    assert "step " in log
    assert "done: demo" in log
    # the same command again: nothing to do, the metric is returned
    again = train("data.fill.name=小明", "data.fill.author=Ada Lovelace", "run.name=demo")
    assert again.code == 0
    assert "is complete; nothing to do" in again.out


def test_a_stopped_run_goes_on_where_it_was(train):
    """Killed after a save in the middle: the same command ends with the same weights as a run never stopped."""
    options = (*SHORT, "callbacks.checkpoint.every_n_train_steps=3", "callbacks.samples=null", "strategy.dropout=0.1")
    whole = train("run.name=whole", *options)
    assert whole.code == 0, whole.err
    from glmft.callbacks.record import RunRecord

    original = RunRecord.on_train_batch_end

    def stop(self, trainer, *args):
        original(self, trainer, *args)
        if trainer.global_step == 5:
            raise KeyboardInterrupt

    RunRecord.on_train_batch_end = stop
    try:
        stopped = train("run.name=stopped", *options)
    finally:
        RunRecord.on_train_batch_end = original
    assert stopped.code == 130
    run = stopped.folder / "runs" / "stopped"
    assert read_status(run)["state"] == "stopped"
    resumed = train("run.name=stopped", *options)
    assert resumed.code == 0, resumed.err
    assert "continued from step 3" in resumed.out
    a, b = (load_file(whole.folder / "runs" / n / "adapter/adapter_model.safetensors") for n in ("whole", "stopped"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert rows(whole.folder / "runs" / "whole", "train/loss") == rows(run, "train/loss")


def test_another_configuration_under_the_same_name_is_refused(train):
    assert train("run.name=a", *FAST).code == 0
    refused = train("run.name=a", *FAST, "strategy.r=4", "optimizer.lr=1e-5")
    assert refused.code == 2
    assert "strategy.r: 8 -> 4" in refused.err
    assert "optimizer.lr: 0.003 -> 1e-05" in refused.err
    assert train("run.name=a", *FAST, "strategy.r=4", "resume.force=true").code == 2  # never safe
    grown = train("run.name=a", *FAST, "trainer.max_steps=4")
    assert grown.code == 2
    assert "the learning rate depends on the length; resume.force=true" in grown.err
    assert "trainer.max_steps: 2 -> 4" in grown.err
    assert train("run.name=a", *FAST, "trainer.max_steps=4", "resume.force=true").code == 0
    assert len(rows(grown.folder / "runs" / "a", "train/loss")) == 4
    assert "can only be made longer" in train("run.name=a", *FAST, "trainer.max_steps=3", "resume.force=true").err
    never = train("run.name=a", *FAST, "resume=never")
    assert never.code == 2
    assert "resume=auto continues it" in never.err


def test_a_sweep_makes_four_runs_in_one_wandb_group(train):
    result = train("-m", *FAST, "strategy.r=4,8", "optimizer.lr=1e-4,5e-4", "logger=wandb", "logger.wandb.mode=offline")
    assert result.code == 0, result.err
    assert len(result.runs) == 4
    groups, configs = set(), set()
    for run in result.runs:
        records = wandb_records(run)
        (told,) = (r["run"] for r in records if "run" in r)
        assert told["run_id"] == (run / "wandb_run_id.txt").read_text()
        groups.add(told["run_group"])
        config = next(r["config"]["update"] for r in records if "strategy" in r.get("config", {}).get("update", {}))
        configs.add((config["strategy"]["r"], config["optimizer"]["lr"]))
        history = [r["history"]["item"] for r in records if "history" in r]
        assert any("train/loss" in h for h in history)
        assert any("val/loss" in h for h in history)
    assert len(groups) == 1
    assert configs == {(4, 1e-4), (4, 5e-4), (8, 1e-4), (8, 5e-4)}


def wandb_records(run: Path) -> list[dict]:
    """What W&B's own reader finds in the offline run of a run directory."""
    (offline,) = (run / "wandb").glob("offline-run-*")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(offline)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in out.splitlines()]


def test_all_strategies_in_one_sweep(train):
    result = train("-m", *FAST, "strategy=lora,qlora,full,freeze")
    assert result.code == 0, result.err
    assert len(result.runs) == 4
    outputs = [("adapter" if (r / "adapter").is_dir() else "model") for r in result.runs]
    assert outputs == ["adapter", "adapter", "model", "model"]
    for run in result.runs[2:]:
        load_model(run / "model")
        load_tokenizer(run / "model")


def test_loggers_and_8_bit_adamw(train):
    result = train(*FAST, "logger=all", "optimizer=adamw_8bit", "run.name=l")
    assert result.code == 0, result.err
    run = result.folder / "runs" / "l"
    assert list((run / "tensorboard").glob("events.*"))
    assert "train/loss" in (run / "csv" / "version_0" / "metrics.csv").read_text()
    assert list((run / "wandb").glob("offline-run-*"))


def test_loader_processes_change_nothing(train):
    for workers in (0, 2):
        assert train("run.name=w" + str(workers), *FAST, f"data.num_workers={workers}").code == 0
    assert rows(Path("runs/w0"), "train/loss") == rows(Path("runs/w2"), "train/loss")


@pytest.mark.parametrize("scheduler", ["linear", "constant"])
def test_schedules(train, scheduler):
    result = train(*FAST, "trainer.max_steps=6", f"scheduler={scheduler}", "scheduler.warmup_steps=2", "run.name=s")
    assert result.code == 0, result.err
    lr = rows(result.folder / "runs" / "s", "lr")
    assert lr[:3] == pytest.approx([0.0, 0.0015, 0.003])
    assert lr[-1] == pytest.approx(0.00075 if scheduler == "linear" else 0.003)


def test_values_with_chinese_spaces_and_tilde_need_no_quotes(train):
    folder = Path("数据 集")
    folder.mkdir()
    (folder / "我的.json").write_text(json.dumps([{"instruction": "你好", "output": "你好"}] * 12), encoding="utf-8")
    result = train(*FAST, "data.path=数据 集/我的.json", "data.datasets=[]", "data.val_datasets=[]", "run.name=中文")
    assert result.code == 0, result.err
    assert read_status(result.folder / "runs" / "中文")["state"] == "done"


def test_a_users_own_recipe_comes_first(train):
    own = Path("glmft_conf/experiment")
    own.mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - default\n\nstrategy:\n  r: 2\n"
    (own / "mine.yaml").write_text(text)
    result = train("experiment=mine", *FAST, "run.name=m")
    assert result.code == 0, result.err
    assert read_json(result.folder / "runs/m/adapter/adapter_config.json")["r"] == 2


def test_the_metric_is_returned(train):
    from glmft.train import metric_of

    assert train(*FAST, "run.name=a").code == 0
    summary = read_json(Path("runs/a/summary.json"))
    assert metric_of(summary, "auto") == metric_of(summary, "val/loss") == summary["val/loss best"]
    assert metric_of(summary, "train/loss") == summary["train/loss last"]
    assert math.isfinite(summary["train/loss last"])


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    """DDP over gloo: the same order and data, losses within 1e-5."""
    losses = []
    for devices in (1, 2):
        command = [
            *(sys.executable, "-m", "glmft.train", f"run.name=d{devices}", f"trainer.devices={devices}"),
            *("+trainer.strategy=ddp", "trainer.accelerator=cpu", "trainer.max_steps=8", "data.tokens_per_step=1024"),
            *("callbacks.compare=null", "callbacks.samples=null"),
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        losses.append(rows(tmp_path / "runs" / f"d{devices}", "train/loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_one_rank_that_is_not_finite_stops_all(tmp_path):
    """Only rank 1 has a gradient that is not finite: no rank changes its weights, both end, the records are named."""
    (tmp_path / "poison.py").write_text(
        "import lightning as L, torch\n"
        "class Poison(L.Callback):\n"
        "    def on_before_optimizer_step(self, trainer, module, optimizer):\n"
        "        if trainer.global_rank == 1 and trainer.global_step == 2:\n"
        "            module._step_loss = module._step_loss * torch.nan\n"
    )
    command = [
        *(sys.executable, "-m", "glmft.train", "run.name=a", "trainer.devices=2", "+trainer.strategy=ddp"),
        *("trainer.accelerator=cpu", "trainer.max_steps=8", "data.tokens_per_step=1024", "callbacks.compare=null"),
        *("callbacks.samples=null", "callbacks.verdict=null", "+callbacks.poison={_target_: poison.Poison}"),
    ]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "step 3: loss nan" in done.stderr
    assert "It learned from " in done.stderr and ".json: record " in done.stderr
    assert len(rows(tmp_path / "runs" / "a", "train/loss")) == 2
    assert time.monotonic() - began < 90


@pytest.mark.slow
def test_real_vocabulary(train):
    """The real tokenizer and data through the whole program, two steps."""
    from transformers import GlmForCausalLM

    from glmft.models import save_model
    from glmft.models.conversion import glm_config
    from glmft.models.published import PublishedConfig

    tokenizer = load_tokenizer(reference("data/chatglm3-tokenizer"))
    save_model(GlmForCausalLM(glm_config(PublishedConfig(1, 65024, 64, 64, 32, 2, 2, 2048))), "m", tokenizer=tokenizer)
    result = train("experiment=lora_alpaca_zh", *FAST, "model.path=m", f"data.dir={reference('data')}")
    assert result.code == 0, result.err


@pytest.mark.share("data")
def test_each_validation_set_has_a_loss_of_its_own(train):
    sets = ("data.val_datasets=[tiny_identity_rephrased,tiny_other]", "data.max_samples=40", "data.val_fraction=0.2")
    result = train("run.name=a", *FAST, *sets, "data.mix=interleave", "data.mix_weights=[0.75,0.25]")
    assert result.code == 0, result.err
    assert "sets" in result.out
    rows = [json.loads(line) for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    counts = {k: v for k, v in rows[0].items() if k.endswith("/samples")}
    assert set(counts) == {"data/tiny_identity/samples", "data/tiny_keep/samples"}
    assert 0.6 < counts["data/tiny_identity/samples"] / sum(counts.values()) < 0.9
    losses = next(r for r in rows if "val/loss" in r)
    names = {"val/held_out/loss", "val/tiny_identity_rephrased/loss", "val/tiny_other/loss"}
    assert {k for k in losses if k.startswith("val/")} == {"val/loss", *names}
    single = sorted(losses[n] for n in names)
    assert single[0] < losses["val/loss"] < single[-1]
