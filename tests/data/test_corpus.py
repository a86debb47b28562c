"""From names to the samples of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import reference

from glmft.data.corpus import CorpusSpec, prepare, split_validation
from glmft.data.mixing import interleave
from glmft.errors import UserError
from glmft.messages import Message

pytestmark = pytest.mark.share("data")
GOOD = {"instruction": "1+1", "input": "", "output": "2"}


@pytest.fixture
def spec(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLMFT_CACHE", str(tmp_path / "cache"))

    def make(content, **options) -> CorpusSpec:
        text = content if isinstance(content, bytes) else json.dumps(content, ensure_ascii=False).encode()
        file = tmp_path / "mine.json"
        file.write_bytes(text)
        return CorpusSpec.of(tiny, path=str(file), **options)

    return make


def registry(sets: dict[str, list[dict]]) -> None:
    for name, records in sets.items():
        Path(f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    Path("dataset_info.json").write_text(json.dumps({n: {"file_name": f"{n}.json"} for n in sets}))


def numbered(n: int, tag: str = "") -> list[dict]:
    return [GOOD | {"instruction": f"{tag}{i}"} for i in range(n)]


def asked(corpus, samples=None) -> list[str]:
    samples = corpus.own if samples is None else samples
    return [c.prompt[-1].content for c in corpus.conversations(samples, range(len(samples)))]


def test_records_become_conversations_again(spec):
    record = {"instruction": "问", "input": "补充", "output": "答", "system": "你是助手", "history": [["早", "早上好"]]}
    corpus = prepare(spec([record, GOOD]))
    found = corpus.conversations(corpus.own, [1, 0])
    assert found[0].messages == (Message("user", "1+1"), Message("assistant", "2"))
    assert found[1].messages[0] == Message("system", "你是助手")
    assert found[1].source.endswith("mine.json: record 1")


def test_blanks_are_filled_in_tokens_and_in_text(spec, tiny):
    corpus = prepare(spec([GOOD | {"output": "我是{{name}}，{{other}}"}], fill={"name": "小明"}))
    assert corpus.conversations(corpus.own, [0])[0].answer == "我是小明，{{other}}"
    from glmft.models import load_tokenizer

    assert "我是小明，{{other}}" in load_tokenizer(tiny).decode(corpus.own[0][0].tolist())


def test_byte_order_mark_is_accepted(spec):
    assert len(prepare(spec(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())).train) == 1


def test_every_record_dropped(spec):
    with pytest.raises(UserError, match=r"no record is left to train on .*1 longer than max_length"):
        prepare(spec([GOOD], max_length=2, on_too_long="drop"))


def test_validation_split_follows_the_seed(spec):
    one = prepare(spec(numbered(20), val_fraction=0.2, seed=1))
    assert (len(one.train), len(one.validation["held_out"])) == (16, 4)
    held = asked(one, one.validation["held_out"])
    assert not set(held) & set(asked(one))
    two = prepare(spec(numbered(20), val_fraction=0.2, seed=1))
    assert held == asked(two, two.validation["held_out"])
    assert split_validation(20, 0.2, 1) != split_validation(20, 0.2, 2)


def test_duplicates_and_overlap_are_counted(spec):
    registry({"v": numbered(3)})
    report = prepare(spec([*numbered(5), *numbered(2)], val_datasets=["v"])).report()
    assert (report["duplicates"], report["overlap"]) == (2, 3)


def chats(n: int) -> list[dict]:
    """Records of four rounds, each with a text of its own."""
    rounds = [[("human", f"{i}问{k}"), ("gpt", "好" * 12)] for i in range(n) for k in range(4)]
    return [
        {"conversations": [{"from": r, "value": t} for pair in rounds[4 * i : 4 * i + 4] for r, t in pair]}
        for i in range(n)
    ]


def test_parts_of_a_record_stay_together(spec):
    options = {"max_length": 64, "on_too_long": "split_turns", "val_fraction": 0.4, "max_samples": 8}
    corpus = prepare(spec(chats(12), **options))
    store = corpus.own.stores[0]
    train, held = (set(store.records[s.index].tolist()) for s in (corpus.own, corpus.validation["held_out"]))
    assert (len(train), len(held)) == (5, 3)
    assert not train & held
    assert len(corpus.own) >= 2 * len(train)


def test_what_the_record_says_is_learned_is_known_to_who_reads_it_again(spec):
    record = {"instruction": "你好", "output": "谢谢", "history": [["早", "早"]]}
    corpus = prepare(spec([record], mask_history=True))
    (found,) = corpus.conversations(corpus.own, [0])
    assert [m.learns for m in found.messages] == [False, False, False, True]


# ---- several sets


def test_concat_takes_every_record_once(spec):
    registry({"a": numbered(30, "a"), "b": numbered(10, "b")})
    spec([GOOD])
    corpus = prepare(CorpusSpec.of(_tiny(), datasets=["a", "b"]))
    assert sorted(asked(corpus)) == sorted([f"a{i}" for i in range(30)] + [f"b{i}" for i in range(10)])
    assert corpus.report()["sets"]["a"]["samples"] == 30


def _tiny() -> Path:
    return Path(__file__).parents[2] / "glmft" / "assets" / "tiny-chatglm3"


def mixed(spec, **options):
    registry({"a": numbered(300, "a"), "b": numbered(40, "b")})
    spec([GOOD])
    return prepare(CorpusSpec.of(_tiny(), datasets=["a", "b"], mix="interleave", **options))


def test_interleave_until_the_first_is_used_up(spec):
    corpus = mixed(spec, mix_weights=[0.5, 0.5])
    names = asked(corpus)
    assert sum(n.startswith("b") for n in names) == 40
    assert 20 < sum(n.startswith("a") for n in names) < 70
    assert len(set(names)) == len(names)


def test_interleave_until_all_are_used_up_repeats_the_smaller(spec):
    corpus = mixed(spec, mix_weights={"b": 0.5, "a": 0.5}, mix_until="all_exhausted")
    names = asked(corpus)
    assert {n for n in names if n.startswith("a")} == {f"a{i}" for i in range(300)}
    copies = [names.count(f"b{i}") for i in range(40)]
    assert min(copies) >= 1
    assert max(copies) - min(copies) <= 1
    assert corpus.report()["duplicates"] == 0  # drawn twice is no duplicate record


def test_interleaved_shares_follow_the_weights():
    drawn = interleave([100_000, 100_000], [0.8, 0.2], "first_exhausted", seed=3)
    assert len(drawn[0]) == 100_000
    assert abs(len(drawn[1]) / sum(map(len, drawn)) - 0.2) < 0.01
    again = interleave([100_000, 100_000], [0.8, 0.2], "first_exhausted", seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert not np.array_equal(drawn[0], interleave([100_000, 100_000], [0.8, 0.2], "first_exhausted", 4)[0])


def test_max_samples_are_of_each_set_and_by_seed(spec):
    registry({"a": numbered(30, "a"), "b": numbered(10, "b")})
    spec([GOOD])
    one = asked(prepare(CorpusSpec.of(_tiny(), datasets=["a", "b"], max_samples=5, seed=1)))
    assert (sum(n.startswith("a") for n in one), sum(n.startswith("b") for n in one)) == (5, 5)
    two = asked(prepare(CorpusSpec.of(_tiny(), datasets=["a", "b"], max_samples=5, seed=2)))
    assert one != two
    by_name = asked(prepare(CorpusSpec.of(_tiny(), datasets=["a", "b"], max_samples={"a": 7})))
    assert (sum(n.startswith("a") for n in by_name), sum(n.startswith("b") for n in by_name)) == (7, 10)


def test_num_samples_of_the_registry(spec):
    registry({"a": numbered(30, "a")})
    Path("dataset_info.json").write_text(json.dumps({"a": {"file_name": "a.json", "num_samples": 4}}))
    spec([GOOD])
    assert len(prepare(CorpusSpec.of(_tiny(), datasets=["a"])).train) == 4


def test_the_real_set():
    tokenizer = reference("data/chatglm3-tokenizer")
    spec = CorpusSpec.of(tokenizer, datasets=["alpaca_zh_demo"], dir=str(reference("data")))
    report = prepare(spec).report()
    assert (report["train"], report["longest"], report["truncated"]) == (1000, 580, 0)
    assert 134 < report["tokens"] / 1000 < 136


def test_the_identity_set_with_its_blanks_filled():
    tokenizer = reference("data/chatglm3-tokenizer")
    fill = {"name": "小明", "author": "小红"}
    spec = CorpusSpec.of(tokenizer, datasets=["identity"], dir=str(reference("data")), fill=fill)
    corpus = prepare(spec)
    texts = [m.content for c in corpus.conversations(corpus.own, range(91)) for m in c.messages]
    assert not any("{{" in t for t in texts)
    assert sum("小明" in t for t in texts) > 50
