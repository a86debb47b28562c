"""Token files: made once, found again by content, the same from any number of processes."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from glmft.data import preparation, tokens
from glmft.data.encoding import Policies
from glmft.data.preparation import prepare_set
from glmft.data.registry import DatasetEntry
from glmft.errors import ProblemList, ResourceError, UserError

pytestmark = pytest.mark.share("data")


@pytest.fixture
def entry(tmp_path, monkeypatch):
    monkeypatch.setenv("GLMFT_CACHE", str(tmp_path / "cache"))
    return lambda records=None: written(tmp_path / "mine.json", records or numbered(50))


def numbered(n: int) -> list[dict]:
    return [{"instruction": f"问{i}", "output": f"答{i % 7}" * (i % 5 + 1)} for i in range(n)]


def written(file: Path, records: list) -> DatasetEntry:
    file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return DatasetEntry("mine", (file,))


def prepared(entry, tiny, policies=None, **options):
    return prepare_set(entry, tiny / "tokenizer.model", policies or Policies(), **options)


def test_the_second_time_is_from_the_cache(entry, tiny):
    first, second = (prepared(entry(), tiny) for _ in range(2))
    assert (first.from_cache, second.from_cache) == (False, True)
    assert [c.name for c in tokens.cached()] == ["mine"]
    assert np.array_equal(first.store.ids, second.store.ids)
    assert second.report == first.report


def test_what_decides_the_ids_decides_the_file(entry, tiny, tmp_path, monkeypatch):
    base = entry()
    names = {prepared(base, tiny).store.file.name}
    for policies in (Policies(max_length=64), Policies(mask_history=True), Policies(fill=(("a", "b"),))):
        names.add(prepared(base, tiny, policies).store.file.name)
    names.add(prepared(written(tmp_path / "b.json", numbered(51)), tiny).store.file.name)
    other = tmp_path / "tokenizer.model"
    other.write_bytes((tiny / "tokenizer.model").read_bytes())
    assert prepare_set(base, other, Policies()).from_cache  # the same content elsewhere
    moved = written(tmp_path / "c.json", numbered(50))
    assert prepared(moved, tiny).from_cache
    changed = DatasetEntry("mine", base.files, "alpaca", {"system": "s"})
    names.add(prepared(changed, tiny).store.file.name)
    hashed = preparation.content_hash
    monkeypatch.setattr(preparation, "content_hash", lambda f: hashed(f) + "x" * (f.suffix == ".py"))
    names.add(prepared(base, tiny).store.file.name)  # the code changed
    assert len(names) == 7


def test_the_file_is_safetensors_and_mapped(entry, tiny):
    found = prepared(entry(), tiny)
    arrays = load_file(found.store.file)
    assert np.array_equal(arrays["ids"], found.store.ids)
    assert int(arrays["num_supervised"].sum()) == sum(int(found.store[i][1][1:].sum()) for i in range(len(found.store)))
    again = pickle.loads(pickle.dumps(found.store))
    assert np.array_equal(again[7][0], found.store[7][0])
    assert len(pickle.dumps(found.store)) < 500


def test_several_processes_give_the_same_file(entry, tiny):
    records = [*numbered(2000), {"instruction": "a"}, *numbered(500)]
    policies = Policies(on_bad_record="drop", max_length=20)
    one = prepared(entry(records), tiny, policies, processes=1)
    content = one.store.file.read_bytes()
    tokens.clear()
    two = prepared(entry(records), tiny, policies, processes=2)
    assert not two.from_cache
    assert two.store.file.read_bytes() == content
    assert two.report["problems"] == {"missing key": 1}
    assert two.report["numbers"]["missing key"] == [[0, 2001]]


def test_what_another_process_cannot_read_is_said_here(entry, tiny, tmp_path):
    found = entry()
    found.files[0].write_text(found.files[0].read_text(encoding="utf-8")[:-9], encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.json:1:\d+: not valid JSON"):
        prepared(found, tiny, processes=2)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_killed_process_ends_it(entry, tiny, monkeypatch):
    class Dead:
        exitcode = -9

        def is_alive(self) -> bool:
            return False

    import queue

    with pytest.raises(ResourceError, match=r"was killed \(exit code -9\)"):
        preparation._next(queue.Queue(), Dead())


def test_bad_records_leave_nothing(entry, tiny, tmp_path):
    with pytest.raises(ProblemList):
        prepared(entry([{"instruction": "a"}]), tiny)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_damaged_file_is_made_again(entry, tiny, capsys):
    file = prepared(entry(), tiny).store.file
    whole = file.read_bytes()
    for damaged in (whole[:-5], b"", b"no", whole + b"x"):
        file.write_bytes(damaged)
        assert not prepared(entry(), tiny).from_cache
        assert "not a whole token file; it is made again" in capsys.readouterr().out
        assert file.read_bytes() == whole


def test_without_cache_nothing_stays(entry, tiny, tmp_path):
    found = prepared(entry(), tiny, cache=False)
    assert len(found.store) == 50
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_no_obstacle(entry, tiny, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(prepared(entry(), tiny).store) == 50
    assert "token files are kept in" in capsys.readouterr().out


def test_listing_and_clearing(entry, tiny):
    prepared(entry(), tiny)
    os.utime(tokens.cached()[0].file, (0, 0))
    prepared(entry(), tiny)
    (found,) = tokens.cached()
    assert time.time() - found.used < 60  # used again
    assert found.samples == 50
    assert tokens.clear() == found.num_bytes
    assert tokens.cached() == []


def test_conversations_of_samples(entry, tiny):
    found = prepared(entry(), tiny)
    assert [c.prompt[0].content for c in found.conversations([3, 1, 3])] == ["问3", "问1", "问3"]
    assert found.conversations([]) == []
