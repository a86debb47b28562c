"""The table of bad data: exit code, message, nothing written, no traceback."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from bad_input import BAD

pytestmark = pytest.mark.share("data")
messages: dict[str, str] = {}  # kind -> its message without places and numbers


@pytest.mark.parametrize("kind", BAD)
def test_bad_data(train, kind):
    bad = BAD[kind]
    if callable(bad.content):
        bad.content()
    else:
        content = bad.content
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        Path(bad.file).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = everything()
    result = train(f"data.path={bad.file or 'null'}", "data.datasets=[]", "data.val_datasets=[]", *bad.overrides)
    assert result.code == bad.code, result.err
    for text in bad.says:
        assert text in result.err
    assert result.err.startswith("glmft: ")
    assert "Traceback" not in result.err + result.out
    assert everything() == before, "something was written"
    messages[kind] = re.sub(r"(message|record|byte|line) \d+|:\d+|\d+ tokens|'[^']*'", "", result.err)


def everything() -> dict[str, bytes]:
    """All files, but the whole token files of sets that were themselves in order."""
    files = (p for p in Path().rglob("*") if p.is_file())
    return {str(p): p.read_bytes() for p in files if not (p.parent.name == "tokens" and p.name[0] != ".")}


def test_no_two_kinds_share_a_message():
    if len(messages) < len(BAD):
        pytest.skip("needs the messages of the whole table")
    shared = [(a, b) for a in messages for b in messages if a < b and messages[a] == messages[b]]
    assert not shared


def test_all_problems_of_a_file_in_one_report(train):
    records = [{"instruction": "a", "output": "b"}, *({"instruction": "a"} for _ in range(30)), *([1] * 5)]
    Path("a.json").write_text(json.dumps(records))
    result = train("data.path=a.json", "data.datasets=[]", "data.val_datasets=[]")
    assert result.code == 2
    assert "35 of 36 records cannot be used (data.on_bad_record=drop leaves them out)" in result.err
    assert result.err.count("'output' is missing") == 20
    assert "... and 15 more; in all: 30 missing key, 5 record not an object" in result.err


def test_problems_of_several_sets_together(train):
    Path("a.json").write_text("[")
    Path("b.json").write_text(json.dumps([{"instruction": "a"}]))
    names = {n: {"file_name": f"{n}.json"} for n in "ab"}
    Path("dataset_info.json").write_text(json.dumps(names))
    result = train("data.datasets=[a,b]", "data.val_datasets=[]")
    assert "a.json:1:2: not valid JSON" in result.err
    assert "b.json: record 1: 'output' is missing" in result.err
