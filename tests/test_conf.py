"""Every YAML is a test case: it composes, it binds to the signature it is for, every experiment runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import FAST
from hydra import compose, initialize_config_dir

from glmft import config, recipes
from glmft.signatures import problems, signature
from glmft.train import TOPS

GROUPS = ("model", "strategy", "data", "optimizer", "scheduler", "trainer", "callbacks", "logger", "resume", "debug")
CHOICES = [(g, o) for g in GROUPS for o in recipes.options(g)]
EXPERIMENTS = recipes.options("experiment")


def composed(*overrides: str):
    with initialize_config_dir(str(config.conf_dir()), version_base="1.3"):
        return compose("train", overrides=["run.name=test", *overrides])


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_every_option_composes_and_binds(group, option):
    config.check(composed(f"{group}={option}"), TOPS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_sets_no_strategy(experiment):
    config.check(composed(f"experiment={experiment}"), TOPS)
    text = (config.conf_dir() / "experiment" / f"{experiment}.yaml").read_text()
    assert len(text.splitlines()) <= 30
    assert "\nstrategy:" not in text


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs(train, experiment, tiny):
    """On the tiny model and data, with two steps, one validation, one save."""
    small = ("model.path=tiny-chatglm3", "data.datasets=[tiny_identity]", "data.max_length=128")
    result = train(f"experiment={experiment}", *small, *FAST, "run.name=e")
    assert result.code == 0, result.err
    run = result.folder / "runs" / "e"
    assert (run / "checkpoints" / "step-0000002" / "manifest.json").is_file()
    assert (run / "summary.json").is_file()


def test_every_file_is_reached():
    """No YAML lies about without a test above."""
    known = {"train.yaml", "bench.yaml", "paths/default.yaml", "hydra/default.yaml"}
    known |= {f"{g}/{o}.yaml" for g, o in CHOICES} | {f"experiment/{e}.yaml" for e in EXPERIMENTS}
    root = config.conf_dir()
    assert {str(f.relative_to(root)) for f in root.rglob("*.yaml")} == known


def test_alpaca_zh_follows_the_well_known_settings():
    cfg = composed("experiment=lora_alpaca_zh")
    assert (cfg.trainer.max_epochs, cfg.data.max_length, cfg.optimizer.lr) == (3, 2048, 5e-5)
    assert (cfg.strategy.r, cfg.strategy.targets, cfg.data.tokens_per_step) == (8, "all", 2048)
    assert cfg.scheduler._target_ == "glmft.optim.cosine"


# ---- the command line


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["data.path=/数据/a b.json"], ["++data.path='/数据/a b.json'"]),
        (["data.path=~/a.json"], ["++data.path='~/a.json'"]),
        (["data.path=it's 好"], ["++data.path='it\\'s 好'"]),
        (["strategy=qlora", "strategy.r=4"], ["strategy=qlora", "++strategy.r=4"]),
        (["--cfg", "job", "+trainer.strategy=ddp", "~logger"], ["--cfg", "job", "+trainer.strategy=ddp", "~logger"]),
        (["-m", "data.path=/数据/a.json,b.json"], ["-m", "++data.path='/数据/a.json',b.json"]),
        (["hydra.job.chdir=true"], ["hydra.job.chdir=true"]),
        (["seed=1", "-m", "strategy=lora,qlora"], ["-m", "++seed=1", "strategy=lora,qlora"]),
    ],
)
def test_overrides_are_quoted_once(given, expected):
    assert config.prepare_argv(given) == expected
    assert config.prepare_argv(expected) == expected


def test_signatures_are_read_without_importing():
    sig = signature("lightning.pytorch.trainer.trainer.Trainer")
    assert "max_epochs" in sig.parameters
    assert problems("glmft.strategies.full.Full", {"r": 8}, "strategy", False) == [
        "strategy.r: unknown key (it has no options)"
    ]
    assert "defines no 'Nothing'" in problems("glmft.strategies.full.Nothing", {}, "strategy", False)[0]
    assert "no package" in problems("nowhere.Thing", {}, "x", False)[0]
    assert problems("glmft.module.FineTuner", {}, "model", False)[0] == "model.path: must be given"
    assert Path(config.conf_dir()).is_absolute()
