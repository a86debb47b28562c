"""How fast data becomes batches on this machine: reading, tokenising, the cache, the loader.

Each stage runs in a process of its own, so that its memory is its own: `python -m glmft.data.bench STAGE ...`.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glmft.data.encoding import Policies
from glmft.data.packing import plan_rows
from glmft.data.preparation import prepare_set
from glmft.data.reading import read_records
from glmft.data.registry import PACKAGED, DatasetEntry

ENTRY = "generated"
WORDS = 18  # sentences of the packaged sets that make a record of about 130 tokens of the real vocabulary


def generate(file: Path, records: int, seed: int = 0) -> None:
    """Alpaca records made of sentences of the packaged sets, with numbers so that no two are alike."""
    rng = random.Random(seed)
    sentences = sorted(
        {s for f in PACKAGED.glob("tiny*.json") for r in json.loads(f.read_text("utf-8")) for s in _texts(r)}
    )
    with file.open("w", encoding="utf-8") as out:
        for i in range(records):
            answer = "".join(rng.choices(sentences, k=rng.randint(2, 2 * WORDS)))
            record = {"instruction": f"{rng.choice(sentences)} {i}", "input": "", "output": answer}
            out.write(("[\n" if i == 0 else ",\n") + json.dumps(record, ensure_ascii=False))
        out.write("\n]\n")


def _texts(record: dict[str, str]) -> Iterator[str]:
    return (record[k] for k in ("instruction", "output"))


def run(folder: Path, tokenizer: Path, records: int, read_bytes: int, processes: int | None) -> dict[str, Any]:
    """All stages, one after the other; `read_bytes` is the size of the file that is only read."""
    file = folder / "records.json"
    generate(file, records)
    stage = [sys.executable, "-m", "glmft.data.bench"]
    out: dict[str, Any] = {"records": records, "file_bytes": file.stat().st_size}
    many = str(processes or 0)
    for name in ("prepare", "again", "loader"):
        out[name] = _result([*stage, name, str(file), str(tokenizer), many])
    large = folder / "large.json"
    generate(large, max(1, int(records * read_bytes / file.stat().st_size)))
    out["read"] = _result([*stage, "read", str(large), str(tokenizer), many])
    return out


def _result(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(arguments: list[str]) -> dict[str, Any]:
    """One stage."""
    stage, file, tokenizer, processes = arguments[0], Path(arguments[1]), Path(arguments[2]), int(arguments[3])
    before = _megabytes(resource.RUSAGE_SELF)
    began = time.perf_counter()
    if stage == "read":
        records = sum(1 for _ in read_records(file))
        return _seconds(began) | {
            "records": records,
            "bytes": file.stat().st_size,
            "memory_mb": _megabytes(resource.RUSAGE_SELF),
            "memory_mb_above_start": _megabytes(resource.RUSAGE_SELF) - before,
        }
    prepared = prepare_set(DatasetEntry(ENTRY, (file,)), tokenizer, Policies(), processes or None)
    tokens = int(prepared.store.lengths.sum(dtype="int64"))
    out = _seconds(began) | {"tokens": tokens, "samples": len(prepared.store), "from_cache": prepared.from_cache}
    if stage == "loader":
        return _loader(prepared)
    own, workers = _megabytes(resource.RUSAGE_SELF), _megabytes(resource.RUSAGE_CHILDREN)
    return out | {
        "tokens_per_sec": round(tokens / out["seconds"]),
        "memory_mb": own,
        "memory_mb_largest_worker": workers,
        "policies": asdict(prepared.policies),
    }


def _loader(prepared: Any) -> dict[str, Any]:
    """Tokens per second that one loader process hands over, packed, without a model."""
    import numpy as np

    from glmft.data.datamodule import EpochPlan, PlannedDataset
    from glmft.data.mixing import Samples
    from glmft.data.packing import Schedule

    samples = Samples.of([prepared.store], [np.arange(min(len(prepared.store), 100_000))])
    plan = EpochPlan(samples, Schedule(8192, 8192, 2048), True, 0, 0)
    began = time.perf_counter()
    rows = len(plan_rows(samples.lengths, plan.schedule.row_budget, 0, 0))
    planned = time.perf_counter() - began
    data = PlannedDataset(plan, 0)
    data[(0, 0)]
    began = time.perf_counter()
    tokens = sum(data[(0, i)].num_tokens for i in range(len(plan.batches(0))))
    spent = time.perf_counter() - began
    return {"tokens": tokens, "seconds": round(spent, 3), "tokens_per_sec": round(tokens / spent)} | {
        "plan_seconds_100k": round(planned, 3),
        "rows": rows,
    }


def _seconds(began: float) -> dict[str, Any]:
    return {"seconds": round(time.perf_counter() - began, 3)}


def _megabytes(who: int) -> int:
    return resource.getrusage(who).ru_maxrss // 1024


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
