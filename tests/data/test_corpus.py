from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import reference

from glmft.data.corpus import CorpusSpec, limit_length, prepare, split_validation
from glmft.data.registry import direct_file, find_dataset
from glmft.errors import ProblemList, UserError
from glmft.messages import Message
from glmft.models import load_tokenizer

GOOD = {"instruction": "1+1", "input": "", "output": "2"}


@pytest.fixture
def spec(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(content, **options) -> CorpusSpec:
        text = content if isinstance(content, (str, bytes)) else json.dumps(content, ensure_ascii=False)
        file = tmp_path / "mine.json"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        prepare.cache_clear()
        return CorpusSpec.of(tiny, path=str(file), **options)

    return make


def test_alpaca_records_become_conversations(spec):
    record = {
        "instruction": "问",
        "input": "补充",
        "output": "答",
        "system": "你是助手",
        "history": [["早", "早上好"]],
    }
    corpus = prepare(spec([record]))
    assert corpus.conversations[0].messages == (
        Message("system", "你是助手"),
        Message("user", "早"),
        Message("assistant", "早上好"),
        Message("user", "问\n补充"),
        Message("assistant", "答"),
    )
    assert corpus.conversations[0].source.endswith("mine.json record 1")


def test_blanks_are_filled(spec):
    corpus = prepare(spec([GOOD | {"output": "我是{{name}}，{{other}}"}], fill={"name": "小明"}))
    assert corpus.conversations[0].answer == "我是小明，{{other}}"


def test_byte_order_mark_is_accepted(spec):
    assert len(prepare(spec(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())).train) == 1


BAD_FILES = [  # content, what the message must hold
    ("", "empty; expected a JSON list"),
    ("[]", "an empty list"),
    ('[{"instruction": "a"', ":1:21: not valid JSON"),
    ('{"instruction": "a"}', "holds an object, expected a list"),
    ("null", "holds null, expected a list"),
    ('[{"instruction": "a", "output": "b"}]\n{}', "is JSONL"),
    ('[1, {"instruction": "a"}]', "record 1 is a number, expected an object"),
    ("问".encode("gbk"), "not UTF-8 (byte 0)"),
    ("[" * 100_000, "nested too deeply"),
]
BAD_RECORDS = [
    ({"instruction": "a", "ouput": "b"}, "'output' is missing, did you mean 'ouput'?"),
    ({"instruction": "a", "output": None}, "'output' is NoneType ('None'), expected text"),
    ({"instruction": 3, "output": "b"}, "'instruction' is int ('3'), expected text"),
    ({"instruction": "a", "output": " "}, "'output' is empty"),
    ({"instruction": "", "input": "", "output": "b"}, "'instruction' and 'input' are both empty"),
    (
        {"instruction": "a", "output": "b", "history": [["only one"]]},
        "'history' must be a list of [question, answer] pairs",
    ),
]


@pytest.mark.parametrize(("content", "says"), BAD_FILES)
def test_bad_files(spec, content, says):
    with pytest.raises(UserError) as caught:
        prepare(spec(content))
    assert says in str(caught.value)
    assert "mine.json" in str(caught.value)


def test_all_bad_records_are_reported_with_their_numbers(spec):
    content = [GOOD, *(record for record, _ in BAD_RECORDS)]
    with pytest.raises(ProblemList) as caught:
        prepare(spec(content))
    for number, (_, says) in enumerate(BAD_RECORDS, start=2):
        assert f"record {number}: {says}" in str(caught.value)
    assert f"{len(BAD_RECORDS)} of {len(content)} records" in str(caught.value)
    corpus = prepare(spec(content, on_bad_record="drop"))
    assert len(corpus.train) == 1
    assert corpus.report()["dropped"] == {"bad record": len(BAD_RECORDS)}


def test_length_policies(tiny):
    tokenizer = load_tokenizer(tiny)
    sample = tokenizer.encode_conversation([Message("user", "你好"), Message("assistant", "谢谢" * 20)])
    prompt = len(tokenizer.encode_prompt([Message("user", "你好")]))
    counts: Counter[str] = Counter()
    cut = limit_length(sample, prompt + 5, "truncate", counts)
    assert len(cut) == prompt + 5
    assert cut.num_supervised == 5
    assert tokenizer.eos_id not in cut.labels  # a cut answer does not teach the end
    assert limit_length(sample, prompt, "truncate", counts) is None
    assert limit_length(sample, 10, "drop", counts) is None
    with pytest.raises(UserError, match=r"data\.max_length=10"):
        limit_length(sample, 10, "error", counts)
    assert counts == {"truncated": 1, "dropped: too long": 1, "dropped: nothing left to learn within max_length": 1}


def test_every_record_dropped(spec):
    with pytest.raises(UserError, match=r"no record is left to train on .*1 too long"):
        prepare(spec([GOOD], max_length=2, on_too_long="drop"))


def test_validation_split_follows_the_seed(spec):
    content = [GOOD | {"instruction": str(i)} for i in range(20)]
    one = prepare(spec(content, val_fraction=0.2, seed=1))
    assert (len(one.train), len(one.validation)) == (16, 4)
    held = {c.prompt[-1].content for c in one.val_conversations}
    assert not held & {c.prompt[-1].content for c in one.conversations}
    assert held == {c.prompt[-1].content for c in prepare(spec(content, val_fraction=0.2, seed=1)).val_conversations}
    assert split_validation(20, 0.2, 1) != split_validation(20, 0.2, 2)


# ---- the registry


def test_registry_is_looked_for_where_users_keep_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_text(json.dumps([GOOD]))
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "a.json"}}))
    assert find_dataset("mine").file == Path("data/a.json")
    assert find_dataset("tiny").file.is_file()  # packaged
    assert direct_file("a.json").file == Path("data/a.json")
    with pytest.raises(UserError, match=r"'mime' is in no registry, did you mean 'mine'.*data/dataset_info.json"):
        find_dataset("mime")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"file_name": "a.json", "format": "alpaca"}, "unknown key 'format', did you mean 'formatting'?"),
        ({"file_name": "../a.json"}, "outside the registry's folder"),
        ({"file_name": "b.json"}, "no such file"),
        ({}, "file_name is missing"),
        ({"hf_hub_url": "x/y"}, "'hf_hub_url' is not read by this version"),
        ({"file_name": "a.json", "formatting": "sharegpt"}, "formatting 'sharegpt'"),
    ],
)
def test_bad_registry_entries(tmp_path, entry, says):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    with pytest.raises(UserError) as caught:
        find_dataset("mine", str(tmp_path))
    assert says in str(caught.value)


def test_the_real_set():
    tokenizer = reference("data/chatglm3-tokenizer")
    spec = CorpusSpec.of(tokenizer, datasets=["alpaca_zh_demo"], dir=str(reference("data")))
    report = prepare(spec).report()
    assert (report["train"], report["longest"], report["truncated"]) == (1000, 580, 0)
    assert 134 < report["tokens"] / 1000 < 136
