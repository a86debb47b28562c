"""Files of every kind hold the same records."""

from __future__ import annotations

import csv
import json
import resource
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from glmft.data.reading import PIECE, read_records
from glmft.data.registry import direct_file

pytestmark = pytest.mark.share("data")
RECORDS = [{"instruction": f"问{i}\n", "input": "\u2028，\"'", "output": "答" * (i % 7 + 1)} for i in range(3000)]


def write(file, records):
    kind = file.suffix
    if kind == ".json":
        file.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    elif kind == ".jsonl":
        lines = [json.dumps(r, ensure_ascii=False) for r in records]
        file.write_text("\n\n".join(lines) + "\r\n", encoding="utf-8-sig")
    elif kind in (".csv", ".tsv"):
        with file.open("w", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, list(records[0]), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    elif kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    else:
        table = pyarrow.Table.from_pylist(records)
        opened = pyarrow.ipc.new_stream if "stream" in file.name else pyarrow.ipc.new_file
        with opened(str(file), table.schema) as f:
            f.write_table(table)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.arrow", "stream.arrow"])
def test_every_kind_of_file_gives_the_same_records(tmp_path, name):
    file = tmp_path / name
    write(file, RECORDS)
    assert [r for _, r in read_records(file)] == RECORDS
    assert direct_file(str(file)).formatting == "alpaca"


def test_plain_text_is_read_by_lines(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("一\n\n二\n", encoding="utf-8")
    assert [r for _, r in read_records(file)] == [{"text": "一"}, {"text": "二"}]


def test_lines_of_jsonl_are_counted_with_blank_ones(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n  \n{"a": 2}\n')
    assert list(read_records(file)) == [(1, {"a": 1}), (4, {"a": 2})]


def test_pieces_may_end_anywhere(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    records = [{"a": "好" * i, "b": [i, {"c": None}], "d\\": '"}],['} for i in range(60)]
    file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr("glmft.data.reading.PIECE", size)
        assert [r for _, r in read_records(file)] == records


def test_the_place_of_an_error_far_into_the_file(tmp_path):
    file = tmp_path / "a.json"
    good = json.dumps({"instruction": "a", "output": "b" * 1000})
    lines = [good] * 3000
    lines[2500] = good.replace(": ", " ", 1)
    file.write_text("[" + ",\n".join(lines) + "]")
    assert file.stat().st_size > 2 * PIECE
    with pytest.raises(ValueError, match=r"a\.json:2501:\d+: not valid JSON: Expecting ':' delimiter"):
        list(read_records(file))


def test_memory_does_not_grow_with_the_file(tmp_path):
    file = tmp_path / "a.json"
    record = json.dumps({"instruction": "问" * 200, "output": "答" * 300}, ensure_ascii=False)
    with file.open("w", encoding="utf-8") as f:
        f.write("[" + record)
        for _ in range(80_000):
            f.write("," + record)
        f.write("]")
    assert file.stat().st_size > 100 << 20
    code = (
        "import resource, sys; from pathlib import Path; from glmft.data.reading import read_records\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "n = sum(1 for _ in read_records(Path(sys.argv[1])))\n"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    # `exec` in a shell of its own: the peak of this process would be counted otherwise
    done = subprocess.run(["sh", "-c", 'exec "$@"', "sh", sys.executable, "-c", code, str(file)], capture_output=True)
    records, kilobytes = map(int, done.stdout.split())
    assert records == 80_001
    assert kilobytes < 30_000
    assert resource.getpagesize() > 0


def test_csv_records_stand_where_they_begin(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('\ninstruction,output\n"a\nb",c\nd,e\n')
    assert [(line, r["output"]) for line, r in read_records(file)] == [(3, "c"), (5, "e")]
