"""dataset_info.json, as LLaMA-Factory has it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import reference

from glmft.data.registry import describe, direct_file, entry_of, find_dataset
from glmft.errors import UserError

pytestmark = pytest.mark.share("data")
GOOD = {"instruction": "1+1", "output": "2"}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text(json.dumps([GOOD]))
    Path("in").mkdir()


def entry(value: dict) -> object:
    return entry_of(Path("dataset_info.json"), "mine", value)


def test_registry_is_looked_for_where_users_keep_it():
    Path("data").mkdir()
    shutil.copy("a.json", "data/a.json")
    Path("data/dataset_info.json").write_text(json.dumps({"mine": {"file_name": "a.json"}}))
    assert find_dataset("mine").files == (Path("data/a.json"),)
    assert find_dataset("tiny").files[0].is_file()  # packaged
    Path("a.json").unlink()
    assert direct_file("a.json").files == (Path("data/a.json"),)
    with pytest.raises(UserError, match=r"'mime' is in no registry, did you mean 'mine'.*data/dataset_info.json"):
        find_dataset("mime")


def test_columns_and_tags_override_only_what_they_list():
    found = entry({"file_name": "a.json", "columns": {"response": "answer"}, "tags": {"role_tag": "role"}})
    assert (found.columns, found.tags) == ({"response": "answer"}, {"role_tag": "role"})


WRONG = {  # entry -> what the message holds
    "an unknown key": ({"file_name": "a.json", "format": "alpaca"}, "unknown key 'format', did you mean 'formatting'?"),
    "an unknown column": (
        {"file_name": "a.json", "columns": {"promt": "q"}},
        "unknown key 'promt', did you mean 'prompt'?",
    ),
    "an unknown tag": ({"file_name": "a.json", "tags": {"user": "q"}}, "tags: unknown key 'user'"),
    "an unknown formatting": (
        {"file_name": "a.json", "formatting": "sharegtp"},
        "formatting 'sharegtp' is unknown, did you mean 'sharegpt'?",
    ),
    "a path outside": ({"file_name": "../a.json"}, "lies outside the registry's folder"),
    "an absolute path": ({"file_name": "/etc/passwd"}, "lies outside the registry's folder"),
    "a missing file": ({"file_name": "b.json"}, "b.json: no such file"),
    "no file": ({}, "file_name is missing"),
    "a hub": ({"hf_hub_url": "x/y"}, "hf download x/y --repo-type dataset --local-dir data/mine"),
    "ModelScope": ({"ms_hub_url": "x/y"}, "modelscope download --dataset x/y --local_dir data/mine"),
    "a script": ({"script_url": "x"}, "foreign code and is not run"),
    "a cloud": ({"cloud_file_name": "s3://x"}, "cloud storage is not read"),
    "ranked answers": ({"file_name": "a.json", "ranking": True}, "preference tuning"),
    "pictures": ({"file_name": "a.json", "columns": {"images": "i"}}, "ChatGLM3 reads text only"),
    "a number of samples": ({"file_name": "a.json", "num_samples": 0}, "num_samples is 0, expected a number of 1"),
    "a formatting that is no text": ({"file_name": "a.json", "formatting": ["x"]}, "formatting '['x']' is unknown"),
    "a folder out of its folder": ({"file_name": "in", "folder": "../.."}, "folder '../..' lies outside in"),
    "a split that is no text": ({"file_name": "in", "split": 3}, "split is 3, expected a name"),
    "no object": ("a.json", "must be an object with file_name"),
}


@pytest.mark.parametrize("name", WRONG)
def test_entries_that_cannot_be_used_say_why(name):
    value, says = WRONG[name]
    with pytest.raises(UserError) as caught:
        entry(value)
    assert says in str(caught.value)
    assert "dataset_info.json: 'mine'" in str(caught.value)


def test_a_file_beside_a_hub_is_used():
    assert entry({"file_name": "a.json", "hf_hub_url": "x/y"}).files == (Path("a.json"),)


def test_a_downloaded_repository_is_a_folder():
    for name in ("en/train-00000.jsonl", "en/test.jsonl", "zh/train-00000.jsonl", "zh/train-00001.jsonl", "README.md"):
        Path("repo", name).parent.mkdir(parents=True, exist_ok=True)
        Path("repo", name).write_text(json.dumps(GOOD))
    value = {"file_name": "repo", "subset": "zh", "split": "train"}
    assert [f.name for f in entry(value).files] == ["train-00000.jsonl", "train-00001.jsonl"]
    assert [f.as_posix() for f in entry({"file_name": "repo", "split": "test"}).files] == ["repo/en/test.jsonl"]
    assert len(entry({"file_name": "repo", "folder": "en"}).files) == 2
    with pytest.raises(UserError, match=r"split 'validation': no file of that name .*en/test\.jsonl"):
        entry({"file_name": "repo", "split": "validation"})
    Path("repo/en/.hidden").mkdir()
    Path("repo/en/.hidden/train.jsonl").write_text("{}")
    Path("repo/en/train-00000.jsonl").rename("repo/en/TRAIN.JSONL")
    assert [f.name for f in entry({"file_name": "repo", "folder": "en"}).files] == ["TRAIN.JSONL", "test.jsonl"]
    Path("repo/en/more.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"several types: \.csv, \.jsonl"):
        entry({"file_name": "repo"})
    Path("empty").mkdir()
    with pytest.raises(UserError, match="no data file"):
        entry({"file_name": "empty"})


def test_every_entry_of_llama_factorys_registry_is_classified():
    found = describe(reference("data/dataset_info.json"))
    assert len(found) == 104
    assert "wrong" not in Counter(status for status, _ in found.values())
    assert {n for n, (status, _) in found.items() if status == "usable"} == {"identity", "alpaca_zh_demo"}
    assert found["alpaca_en"][0] == "needs network"
    assert found["dpo_zh_demo"] == ("unsupported", found["dpo_en_demo"][1])
    assert found["mllm_demo"][1] == "column 'images': ChatGLM3 reads text only"
    assert found["c4_demo"][0] == "unsupported"
    assert all(why for _, why in found.values())
