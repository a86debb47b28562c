from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from glmft import cli

SCRIPT = [sys.executable, "-m", "glmft.cli"]


def shell(*command: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def test_the_console_script_becomes_the_module(tmp_path):
    listed = shell(*SCRIPT)
    assert listed.returncode == 0
    assert "train" in listed.stdout
    unknown = shell(*SCRIPT, "trian")
    assert unknown.returncode == 2
    assert "usage: glmft COMMAND" in unknown.stderr
    refused = shell(*SCRIPT, "train", "strategy=lorra", cwd=tmp_path)
    assert refused.returncode == 2
    assert "did you mean 'lora'?" in refused.stderr


def test_completion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glmft_conf" / "experiment").mkdir(parents=True)
    (tmp_path / "glmft_conf" / "experiment" / "mine.yaml").touch()
    assert cli.complete(["tr"]) == ["train"]
    assert "strategy=" in cli.complete(["train", "str"])
    assert cli.complete(["train", "strategy", "=", "q"]) == ["qlora"]
    assert {"mine", "lora_alpaca_zh"} <= set(cli.complete(["train", "experiment", "="]))


def test_completion_in_bash_is_quick():
    """What bash does on TAB, with the real function."""
    completion = shell(*SCRIPT, "--completion").stdout
    script = f'{completion}\nCOMP_WORDS=(glmft train strategy = q); COMP_CWORD=4; _glmft; echo "${{COMPREPLY[@]}}"'
    began = time.time()
    done = shell("bash", "-c", script)
    assert done.stdout.strip() == "qlora", done.stderr
    assert time.time() - began < 0.5


def test_configuration_is_shown_quickly(tmp_path):
    began = time.time()
    shown = shell(sys.executable, "-m", "glmft.train", "--cfg", "job", cwd=tmp_path)
    assert time.time() - began < 1.5
    assert "strategy:" in shown.stdout
    assert not list(tmp_path.iterdir())
    helped = shell(sys.executable, "-m", "glmft.train", "--help", cwd=tmp_path)
    from glmft.config import conf_dir

    for group in conf_dir().iterdir():
        if group.is_dir() and group.name not in ("hydra", "paths"):
            assert f"\n{group.name} " in helped.stdout, group.name


def test_refusals_come_before_torch(tmp_path):
    code = (
        "import sys; sys.argv = ['x', 'strategy.rank=8', 'experiment=lora_alpaca_zh'];"
        "from glmft import config, train; code = config.run('train', train.main)"
    )
    done = shell(sys.executable, "-c", code + "", cwd=tmp_path)
    assert "unknown key" in done.stderr
    done = shell(sys.executable, "-X", "importtime", "-c", code, cwd=tmp_path)
    assert "| torch\n" not in done.stderr


@pytest.mark.slow
def test_the_wheel_trains_elsewhere(tmp_path):
    """Built, installed without its dependencies into a new environment that sees ours, with a user's own recipe."""
    wheel = shell(sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT))
    assert wheel.returncode == 0, wheel.stderr
    (file,) = tmp_path.glob("*.whl")
    import zipfile

    names = zipfile.ZipFile(file).namelist()
    assert "glmft/conf/train.yaml" in names
    assert "glmft/data/packing.py" in names
    assert "glmft/assets/tiny-chatglm3/model.safetensors" in names
    assert not [n for n in names if n.startswith(("tests", "experiments", "notebooks"))]
    shell(sys.executable, "-m", "venv", str(tmp_path / "env"))
    python = str(tmp_path / "env" / "bin" / "python")
    installed = shell(python, "-m", "pip", "install", "-q", "--no-deps", str(file))
    assert installed.returncode == 0, installed.stderr
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    ours = [p for p in sys.path if p.endswith("site-packages")]
    (site / "ours.pth").write_text("\n".join(ours))
    for editable in (Path(p) for p in ours):
        assert editable.is_dir()
    work = tmp_path / "work"
    (work / "glmft_conf" / "experiment").mkdir(parents=True)
    recipe = "# @package _global_\ndefaults:\n  - default\n\noptimizer:\n  lr: 1e-3\n"
    (work / "glmft_conf" / "experiment" / "mine.yaml").write_text(recipe)
    glmft = str(tmp_path / "env" / "bin" / "glmft")
    fast = ("debug=fast", "callbacks.samples=null", "run.name=w")
    done = subprocess.run(
        [glmft, "train", "experiment=mine", *fast], cwd=work, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (work / "runs" / "w" / "summary.json").is_file()
    where = shell(python, "-c", "import glmft; print(glmft.__file__)", cwd=str(work))
    assert str(site) in where.stdout
