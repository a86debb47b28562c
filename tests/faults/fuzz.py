"""Mutated records, data files and artefacts: no crash, no hang, no silent acceptance.

    python tests/faults/fuzz.py --records 1000000 --files 10000 --seconds 900

A record is either refused with a RecordError, or becomes a conversation that can be encoded and has something to learn.
A data file is read, or refused with a place. A changed artefact is never taken for the one that was saved.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from glmft.artefacts import MANIFEST, verify, write_folder
from glmft.checkpoints import CheckpointFiles
from glmft.data.encoding import conversation_of
from glmft.data.formats import FORMATS
from glmft.data.reading import read_records
from glmft.data.records import RecordError
from glmft.data.registry import DatasetEntry
from glmft.errors import GlmftError
from glmft.models import load_model, load_tokenizer
from glmft.strategies.adapter import load_adapter, save_adapter
from glmft.strategies.lora import LoRA

TINY = Path(__file__).resolve().parents[2] / "glmft" / "assets" / "tiny-chatglm3"
TOOL = {"name": "weather", "parameters": {"city": {"type": "string"}}}
CALL = json.dumps({"name": "weather", "arguments": {"city": "北京"}}, ensure_ascii=False)
SEEDS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [{"instruction": "问", "input": "补", "output": "答", "system": "s", "history": [["早", "早"]]}],
    "sharegpt": [
        {
            "conversations": [
                {"from": "human", "value": "问"},
                {"from": "function_call", "value": CALL},
                {"from": "observation", "value": "晴"},
                {"from": "gpt", "value": "答", "train": True},
            ],
            "tools": json.dumps([TOOL]),
            "system": "s",
        }
    ],
    "openai": [
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "问"},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": json.loads(CALL)}]},
                {"role": "tool", "content": "晴", "tool_call_id": "1"},
                {"role": "assistant", "content": "答", "weight": 1},
            ],
            "tools": [{"type": "function", "function": TOOL}],
        }
    ],
    "thudm": [
        {
            "conversations": [
                {"role": "user", "content": "问"},
                {"role": "tool", "name": "weather", "parameters": {"city": "北京"}, "observation": {"a": 1}},
                {"role": "assistant", "content": "答", "loss": True},
            ],
            "tools": [TOOL],
        }
    ],
}
assert set(SEEDS) == set(FORMATS)
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 10**30, 1.5, float("inf"), "", " ", "\n", "\0", "\ud800", "\ufffd", "a" * 3000),
    *("<|user|>", "[gMASK]", "</s>", "{{name}}", "问" * 50, "\u2028", "[", "{}", "null", [], [[]], {}, {"a": {}}),
    *(
        [1, 2],
        ["a", "b"],
        [["a", "b"]],
        [{"role": "user"}],
        {"name": "x"},
        "human",
        "gpt",
        "user",
        "assistant",
        "system",
    ),
]


def mutate(value: Any, rng: random.Random) -> Any:
    """One random change somewhere in a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        how = rng.random()
        if how < 0.2:
            del value[key]
        elif how < 0.3:
            value[key + rng.choice("x s")] = value.pop(key)
        else:
            value[key] = mutate(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        how = rng.random()
        if how < 0.2:
            del value[i]
        elif how < 0.35:
            value.insert(rng.randrange(len(value) + 1), copy.deepcopy(value[i]))
        elif how < 0.5:
            rng.shuffle(value)
        else:
            value[i] = mutate(value[i], rng)
        return value
    if isinstance(value, str) and value and rng.random() < 0.4:
        i = rng.randrange(len(value) + 1)
        return value[:i] + rng.choice(["", "\ud83d", "\x01", '"', "'", "}", "é", "𠮷"]) + value[i + 1 :]
    return copy.deepcopy(rng.choice(VALUES))


def fuzz_records(count: int, end: float, rng: random.Random) -> Counter[str]:
    tokenizer = load_tokenizer(TINY)
    seen: Counter[str] = Counter()
    while seen.total() < count and time.monotonic() < end:
        name = rng.choice(list(SEEDS))
        record: Any = copy.deepcopy(rng.choice(SEEDS[name]))
        for _ in range(rng.randint(1, 3)):
            record = mutate(record, rng)
        try:
            conversation = conversation_of(record, DatasetEntry("x", (Path("x"),), name), "x", {"name": "n"})
        except RecordError as e:
            str(e).encode()  # can be printed
            seen["refused"] += 1
            continue
        sample = tokenizer.encode_conversation(conversation)
        assert len(sample.labels) == len(sample.input_ids)
        assert max(sample.input_ids) < len(tokenizer)
        prompts = sample.input_ids.count(tokenizer.role_ids["assistant"])
        assert prompts == sum(m.role == "assistant" for m in conversation.messages) > 0, record
        seen["accepted"] += 1
    return seen


def fuzz_files(count: int, end: float, rng: random.Random, folder: Path) -> Counter[str]:
    """Bytes of data files changed, cut, or put in."""
    records = [r for rs in SEEDS.values() for r in rs] * 3
    texts = {
        "a.json": json.dumps(records, ensure_ascii=False, indent=1),
        "a.jsonl": "\n".join(json.dumps(r, ensure_ascii=False) for r in records),
        "a.csv": "instruction,output\n" + '"问\n",答\n' * 20,
    }
    seen: Counter[str] = Counter()
    while seen.total() < count and time.monotonic() < end:
        name = rng.choice(list(texts))
        (folder / name).write_bytes(damaged(texts[name].encode(), rng))
        try:
            for _, record in read_records(folder / name):
                assert (
                    isinstance(record, RecordError)
                    or record is None
                    or isinstance(record, (dict, list, str, int, float))
                )
            seen["read"] += 1
        except GlmftError as e:
            if name not in str(e):
                raise AssertionError(f"{e} does not name {name}") from None
            seen["refused"] += 1
    return seen


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes, changed in one to three places; never the same."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(changed) or 1)
        how = rng.random()
        if how < 0.4 and changed:
            changed[i] ^= 1 << rng.randrange(8)
        elif how < 0.6:
            del changed[i : i + rng.randint(1, 9)]
        elif how < 0.8:
            changed[i:i] = rng.randbytes(rng.randint(1, 9))
        else:
            del changed[i:]
    return bytes(changed) if bytes(changed) != data else data + b"x"


def fuzz_artefacts(count: int, end: float, rng: random.Random, folder: Path) -> Counter[str]:
    """Changed adapters and checkpoints: with a manifest all are refused; without one, none may crash."""
    torch.manual_seed(0)
    base = load_model(TINY, dtype="float32")
    tuned = LoRA(r=2, targets=["q_proj"]).apply(load_model(TINY, dtype="float32"))
    write_folder(folder / "adapter", lambda p: save_adapter(tuned, p, "card"), {"base": base.base_fingerprint})
    state = {"state_dict": {"a": torch.randn(50)}, "loops": {}, "optimizer_states": [], "glmft": {"step": 1}}
    CheckpointFiles().save_checkpoint(state, folder / "checkpoint")
    checks: dict[str, Callable[[Path], Any]] = {
        "adapter": lambda p: load_adapter(load_model(TINY, dtype="float32"), p),
        "checkpoint": lambda p: (verify(p), CheckpointFiles().load_checkpoint(p)),
    }
    seen: Counter[str] = Counter()
    while seen.total() < count and time.monotonic() < end:
        kind = rng.choice(list(checks))
        bare = rng.random() < 0.3
        copied = folder / "copy"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(folder / kind, copied)
        names = [p.name for p in copied.iterdir() if p.name not in ("README.md", MANIFEST)]
        name = rng.choice(names if rng.random() < 0.8 else [MANIFEST])
        if bare:
            (copied / MANIFEST).unlink()
            name = name if name != MANIFEST else names[0]
        target = copied / name
        before = target.read_bytes()
        target.write_bytes(damaged(before, rng))
        if name == MANIFEST and same_manifest(before, target.read_bytes()):
            continue  # another blank, or a fact that names no file
        try:
            if bare and kind == "checkpoint":
                CheckpointFiles().load_checkpoint(copied)
            else:
                checks[kind](copied)
        except GlmftError:
            seen[f"{kind} refused"] += 1
        else:
            assert bare, f"{kind}/{name}: changed, and taken"
            seen[f"{kind} without a manifest, another one"] += 1
    return seen


def same_manifest(before: bytes, after: bytes) -> bool:
    try:
        a, b = json.loads(before), json.loads(after)
        return a["files"] == b["files"] and b["format"] == a["format"]
    except (ValueError, KeyError, TypeError):
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=10_000, help="data files, and as many artefacts")
    parser.add_argument("--seconds", type=float, default=900, help="for each of the three")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        for title, run in {
            "records": lambda end: fuzz_records(options.records, end, rng),
            "data files": lambda end: fuzz_files(options.files, end, rng, Path(name)),
            "artefacts": lambda end: fuzz_artefacts(options.files, end, rng, Path(name)),
        }.items():
            began = time.monotonic()
            seen = run(began + options.seconds)
            told = ", ".join(f"{n:,} {what}" for what, n in sorted(seen.items()))
            print(f"{title}: {seen.total():,} in {time.monotonic() - began:.0f} s: {told}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
