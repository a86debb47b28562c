"""glmft data add: the registry entry is written after the check, never by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmft.data_cli import main

pytestmark = pytest.mark.share("fifteen minutes")
GOOD = [{"instruction": "你好", "output": "你好！"}]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text(json.dumps(GOOD), encoding="utf-8")


def registry() -> dict:
    return json.loads(Path("data/dataset_info.json").read_text(encoding="utf-8"))


def test_a_file_gets_a_name_and_can_be_trained_on(train, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["add", "mine.json", "--name", "我的数据"]) == 0
    assert "data.datasets=[我的数据]" in capsys.readouterr().out
    assert registry() == {"我的数据": {"file_name": "mine.json"}}
    quiet = ("callbacks.samples=null", "callbacks.compare=null", "callbacks.verdict=null")
    result = train("data.datasets=[我的数据]", "data.val_datasets=[]", "trainer.max_steps=1", *quiet)
    assert result.code == 0
    assert "'data.datasets=[我的数据]'" in next(Path("runs").glob("*/command.txt")).read_text(encoding="utf-8")


def test_other_entries_stay_and_a_taken_name_is_refused(capsys):
    assert main(["add", "mine.json", "--name", "a"]) == 0
    assert main(["add", "mine.json", "--name", "b"]) == 0
    assert set(registry()) == {"a", "b"}
    Path("other.json").write_text(json.dumps(GOOD * 2), encoding="utf-8")
    assert main(["add", "other.json", "--name", "a"]) == 2
    assert "--replace" in capsys.readouterr().err
    assert main(["add", "other.json", "--name", "a", "--replace"]) == 0
    assert registry()["a"] == {"file_name": "other.json"}


def test_a_bad_record_is_named_and_nothing_is_written(capsys):
    Path("mine.json").write_text(json.dumps([*GOOD, {"instruction": "x"}]), encoding="utf-8")
    assert main(["add", "mine.json"]) == 2
    assert "record 2: 'output' is missing" in capsys.readouterr().err
    assert not Path("data").exists()


def test_a_file_of_the_same_name_is_not_overwritten(capsys):
    Path("data").mkdir()
    Path("data/mine.json").write_text("[]")
    assert main(["add", "mine.json"]) == 2
    assert "exists with other content" in capsys.readouterr().err
    assert Path("data/mine.json").read_text() == "[]"


def test_names_from_llama_factory_are_told_apart(train):
    result = train("learning_rate=1e-4", "num_train_epochs=3", "lora_rank=8")
    assert result.code == 2
    assert "learning_rate: unknown key; here it is called optimizer.lr" in result.err
    assert "num_train_epochs: unknown key; here it is called trainer.max_epochs" in result.err
    assert "lora_rank: unknown key; here it is called strategy.r" in result.err
