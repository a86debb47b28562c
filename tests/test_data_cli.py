"""glmft data: adding, checking, showing, converting, the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmft.data_cli import main

share = pytest.mark.share
GOOD = [{"instruction": "你好", "output": "你好！"}]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text(json.dumps(GOOD), encoding="utf-8")


def registry() -> dict:
    return json.loads(Path("data/dataset_info.json").read_text(encoding="utf-8"))


@share("fifteen minutes")
def test_a_file_gets_a_name_and_can_be_trained_on(train, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["add", "mine.json", "--name", "我的数据"]) == 0
    assert "data.datasets=[我的数据]" in capsys.readouterr().out
    assert registry() == {"我的数据": {"file_name": "mine.json"}}
    quiet = ("callbacks.samples=null", "callbacks.compare=null", "callbacks.verdict=null")
    result = train("data.datasets=[我的数据]", "data.val_datasets=[]", "trainer.max_steps=1", *quiet)
    assert result.code == 0
    assert "'data.datasets=[我的数据]'" in next(Path("runs").glob("*/command.txt")).read_text(encoding="utf-8")


@share("fifteen minutes")
def test_other_entries_stay_and_a_taken_name_is_refused(capsys):
    assert main(["add", "mine.json", "--name", "a"]) == 0
    assert main(["add", "mine.json", "--name", "b"]) == 0
    assert set(registry()) == {"a", "b"}
    Path("other.json").write_text(json.dumps(GOOD * 2), encoding="utf-8")
    assert main(["add", "other.json", "--name", "a"]) == 2
    assert "--replace" in capsys.readouterr().err
    assert main(["add", "other.json", "--name", "a", "--replace"]) == 0
    assert registry()["a"] == {"file_name": "other.json"}


@share("fifteen minutes")
def test_a_bad_record_is_named_and_nothing_is_written(capsys):
    Path("mine.json").write_text(json.dumps([*GOOD, {"instruction": "x"}]), encoding="utf-8")
    assert main(["add", "mine.json"]) == 2
    assert "record 2: 'output' is missing" in capsys.readouterr().err
    assert not Path("data").exists()


@share("fifteen minutes")
def test_a_file_of_the_same_name_is_not_overwritten(capsys):
    Path("data").mkdir()
    Path("data/mine.json").write_text("[]")
    assert main(["add", "mine.json"]) == 2
    assert "exists with other content" in capsys.readouterr().err
    assert Path("data/mine.json").read_text() == "[]"


@share("fifteen minutes")
def test_names_from_llama_factory_are_told_apart(train):
    result = train("learning_rate=1e-4", "num_train_epochs=3", "lora_rank=8")
    assert result.code == 2
    assert "learning_rate: unknown key; here it is called optimizer.lr" in result.err
    assert "num_train_epochs: unknown key; here it is called trainer.max_epochs" in result.err
    assert "lora_rank: unknown key; here it is called strategy.r" in result.err


# ---- looking at data


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write(name: str, records: list) -> None:
    Path(name).write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")


MIXED = [
    {"instruction": "你好", "output": "你好！"},
    {"instruction": "早", "output": ""},
    {"instruction": "你好", "output": "你好！"},
    {"instruction": "你好", "output": "再见。"},
    {"instruction": "你是谁", "output": "我是\ufffd"},
    {"instruction": "你好" * 80, "output": "谢谢"},
    {"instruction": "你好", "output": "谢谢" * 80},
]


@share("data")
def test_check_counts_what_training_would_do(capsys):
    write("m.json", MIXED)
    code, out, err = run(capsys, "check", "m.json", "--max-length", "64", "--tokens-per-step", "64")
    assert code == 1
    assert "packaged tiny model" in err
    for text in (
        "m: alpaca records in m.json",
        "records     7, 5 samples; cut: 1",
        "dropped     1 bad record: nothing to learn: record 2",
        "m.json: record 2: 'output' is empty: there is no answer to learn",
        "dropped     1 no answer token left within max_length: record 6",
        "damaged     1 with replacement character U+FFFD: record 5",
        "duplicates  1 word for word: record 3",
        "ambiguous   1 prompts with several answers: record 1, 4, 7",
        "steps of 64 tokens",
    ):
        assert text in out


@share("data")
def test_check_as_json_and_its_exit_codes(capsys):
    write("m.json", MIXED)
    code, out, _ = run(capsys, "check", "m.json", "--json", "--strict")
    found = json.loads(out)
    assert code == 2
    assert (found["records"], found["dropped"]) == (7, {"bad record: nothing to learn": 1})
    assert sum(n for _, _, n in found["histogram"]) == found["samples"] == 6
    assert 0 < found["supervised_share"] < 1
    assert run(capsys, "check", "mine.json")[0] == 0
    code, _, err = run(capsys, "check", "none.json")
    assert (code, "none.json: no such file" in err) == (2, True)


@share("data")
def test_show_is_what_the_model_sees(capsys):
    write("m.json", MIXED)
    code, out, _ = run(capsys, "show", "m.json", "4")
    assert code == 0
    assert "m.json: record 4" in out
    assert "[gMASK]sop<|user|>▁<0x0A>▁你好<|assistant|>«▁<0x0A>▁再见。</s>»" in out
    assert "\x1b[32m" in run(capsys, "show", "m.json", "--color", "always")[1]
    assert "m.json: record 2: 'output' is empty" in run(capsys, "show", "m.json", "2")[2]
    assert "there is no record 9; 7 are there" in run(capsys, "show", "m.json", "9")[2]
    assert "我是你好" in run(capsys, "show", "tiny_identity", "1", "--fill", "name=你好")[1].replace("▁", "")


@share("data")
def test_convert_writes_what_can_be_read_again(capsys):
    for to, name in (("sharegpt", "s.jsonl"), ("openai", "o.json"), ("alpaca", "a.json")):
        assert run(capsys, "convert", "tiny_keep", "--to", to, "--output", name)[0] == 0
        assert run(capsys, "convert", name, "--to", "alpaca", "--output", f"{to}.json")[0] == 0
    assert Path("sharegpt.json").read_bytes() == Path("openai.json").read_bytes() == Path("alpaca.json").read_bytes()
    assert (
        "exists; --replace overwrites it" in run(capsys, "convert", "tiny", "--to", "openai", "--output", "o.json")[2]
    )
    write("bad.json", MIXED)
    before = sorted(Path().iterdir())
    code, _, err = run(capsys, "convert", "bad.json", "--to", "openai", "--output", "new.json")
    assert (code, "1 of 7 records cannot be used" in err) == (2, True)
    assert sorted(Path().iterdir()) == before


@share("data")
def test_every_named_set_is_listed(capsys):
    names = {"mine": {"file_name": "mine.json"}, "far": {"hf_hub_url": "x/y"}, "gone": {"file_name": "gone.json"}}
    Path("dataset_info.json").write_text(json.dumps(names))
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert "1 usable, 1 needs network, 1 missing" in out
    assert "tiny_identity" in out


@share("data")
def test_the_cache_is_listed_and_cleared(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GLMFT_CACHE", str(tmp_path / "cache"))
    run(capsys, "check", "mine.json")
    run(capsys, "check", "tiny_keep")
    assert "2 token files" in run(capsys, "cache", "list")[1]
    assert "1 token files removed" in run(capsys, "cache", "clear", "tiny_keep")[1]
    assert "mine " in run(capsys, "cache", "list")[1]
    assert "1 token files removed" in run(capsys, "cache", "clear")[1]


@share("data")
def test_a_file_of_another_format_is_named_with_it(capsys):
    write("chat.json", [{"messages": [{"role": "user", "content": "早"}, {"role": "assistant", "content": "早"}]}])
    assert run(capsys, "add", "chat.json")[0] == 0
    assert registry() == {"chat": {"file_name": "chat.json", "formatting": "openai"}}
    assert run(capsys, "check", "chat", "--dir", "data")[0] == 0


@share("data")
def test_the_benchmark_runs_every_stage(capsys, tiny):
    code, out, _ = run(capsys, "bench", "--records", "300", "--read-gb", "0.0001", "--model", str(tiny))
    found = json.loads(out)
    assert code == 0
    assert found["prepare"]["samples"] == found["again"]["samples"] == 300
    assert (found["prepare"]["from_cache"], found["again"]["from_cache"]) == (False, True)
    assert found["loader"]["tokens"] == found["prepare"]["tokens"]
    assert found["read"]["records"] > 0


@share("data")
@pytest.mark.slow
def test_this_machine_is_fast_enough(capsys):
    from conftest import reference

    model = str(reference("data/chatglm3-tokenizer"))
    found = json.loads(run(capsys, "bench", "--records", "300000", "--read-gb", "0.5", "--model", model)[1])
    assert found["again"]["seconds"] < 3
    assert found["loader"]["tokens_per_sec"] > 20 * 20_000
    assert found["read"]["memory_mb"] < 350
    assert found["prepare"]["memory_mb"] + 2 * found["prepare"]["memory_mb_largest_worker"] < 1500


@share("data")
def test_adding_never_overwrites_by_itself(capsys):
    Path("data").mkdir()
    known = {"far": {"hf_hub_url": "x/y"}, "mine": {"file_name": "mine.json", "num_samples": 1}}
    Path("data/dataset_info.json").write_text(json.dumps(known))
    assert "'far' is there already" in run(capsys, "add", "mine.json", "--name", "far")[2]
    assert run(capsys, "add", "mine.json", "--name", "mine")[0] == 0
    assert registry()["mine"] == {"file_name": "mine.json", "num_samples": 1}
    Path("mine.json").unlink()  # found in ./data, like everywhere
    assert run(capsys, "add", "mine.json", "--name", "again")[0] == 0
    Path("folder").mkdir()
    write("folder/a.json", GOOD)
    assert "a folder is not copied" in run(capsys, "add", "folder")[2]
    code, _, err = run(capsys, "add", "data/mine.json", "--name", "x", "--dir", "data/dataset_info.json")
    assert (code, "Traceback" in err) == (2, False)


@share("data")
def test_the_report_names_the_file_that_was_asked_for(capsys):
    write("old.json", MIXED)
    run(capsys, "check", "old.json")
    Path("old.json").rename("new.json")
    out = run(capsys, "check", "new.json")[1]
    assert "new.json: record 2: 'output' is empty" in out
    assert "old.json" not in out
