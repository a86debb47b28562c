"""Attacks on whoever opens other people's files: name -> what is planted and opened. Each must end in a refusal of
glmft, or in plain data; `pwned` must not appear anywhere, and nothing outside of the folder may be read or written.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from glmft import config
from glmft.artefacts import MANIFEST, verify
from glmft.checkpoints import FILE, CheckpointFiles
from glmft.data.corpus import CorpusSpec, prepare
from glmft.engine import find_tuned
from glmft.errors import GlmftError
from glmft.models import load_model, load_tokenizer
from glmft.models.published import find_weights
from glmft.runs import Run, read_jsonl, read_status
from glmft.strategies.adapter import load_adapter

PWNED = "pwned"
SECRET = "top-secret-of-another-folder"


class Planted:
    """Becomes a call when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def gadgets(place: Path) -> dict[str, Planted]:
    mark = str(place / PWNED)
    return {
        "os.system": Planted(os.system, f"touch '{mark}'"),
        "eval": Planted(eval, f"open({mark!r}, 'w')"),
        "exec": Planted(exec, f"open({mark!r}, 'w').close()"),
        "subprocess": Planted(subprocess.call, ["touch", mark]),
        "open": Planted(builtins.open, mark, "w"),
        "rename": Planted(os.rename, str(place / "tiny" / "config.json"), mark),
    }


def zipped(value: Any) -> bytes:
    """As torch.save writes it, whose unpickler is asked to load it."""
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


# ---- what is opened


def open_checkpoint(place: Path, content: bytes) -> None:
    (place / "step").mkdir()
    (place / "step" / FILE).write_bytes(content)
    CheckpointFiles().load_checkpoint(place / "step")


def open_base(place: Path, content: bytes) -> None:
    (place / "tiny" / "model.safetensors").unlink()
    (place / "tiny" / "pytorch_model.bin").write_bytes(content)
    load_model(place / "tiny")


def open_adapter(place: Path, content: bytes) -> None:
    (place / "adapter" / "adapter_model.safetensors").unlink()
    (place / "adapter" / "adapter_model.bin").write_bytes(content)
    load_adapter(load_model(place / "tiny", dtype="float32"), place / "adapter")


def adapter_setting(**values: Any) -> Callable[[Path], Any]:
    def attack(place: Path) -> Any:
        file = place / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return load_adapter(load_model(place / "tiny", dtype="float32"), place / "adapter")

    return attack


def url(opened: Callable[[str], Any], address: str) -> Callable[[Path], Any]:
    return lambda place: opened(address)


def data_file(name: str, content: bytes | str) -> Callable[[Path], Any]:
    def attack(place: Path) -> Any:
        raw = content.encode() if isinstance(content, str) else content
        (place / name).write_bytes(raw)
        return prepare(CorpusSpec.of(place / "tiny", path=str(place / name), cache=False))

    return attack


def control_text(text: str) -> Callable[[Path], Any]:
    """A record that holds the name of a control token: it must arrive as plain text."""

    def attack(place: Path) -> Any:
        record = {"instruction": f"a {text} b", "input": "", "output": f"c {text} d"}
        (place / "a.json").write_text(json.dumps([record], ensure_ascii=False))
        tokenizer = load_tokenizer(place / "tiny")
        corpus = prepare(CorpusSpec.of(place / "tiny", path=str(place / "a.json"), cache=False))
        ids = corpus.train[0][0].tolist()
        usual = [tokenizer.encode_prompt([])[0:2], 1]  # [gMASK] sop
        controls = [i for i in ids if i >= len(tokenizer) - 9]
        assert len(controls) == len(usual[0]) + 2, (text, controls)  # and <|user|>, <|assistant|>
        return None

    return attack


def in_zip(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr(name, "x")
    return out.getvalue()


def linked_adapter(place: Path) -> Any:
    file = place / "adapter" / "adapter_model.safetensors"
    file.unlink()
    file.symlink_to(place.parent / "outside.txt")
    return load_adapter(load_model(place / "tiny", dtype="float32"), place / "adapter")


def manifest_outside(place: Path) -> Any:
    (place / "adapter" / MANIFEST).write_text(
        json.dumps({"format": 1, "files": {"../../outside.txt": {"bytes": 1, "sha256": "x"}}})
    )
    return verify(place / "adapter")


def weights_outside(place: Path) -> Any:
    index = {"weight_map": {"a": "../../outside.txt"}}
    (place / "tiny" / "model.safetensors.index.json").write_text(json.dumps(index))
    return find_weights(place / "tiny")


def run_file(name: str, content: str, opened: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A run directory of somebody else."""

    def attack(place: Path) -> Any:
        run = place / "run"
        (run / ".hydra").mkdir(parents=True)
        (run / ".hydra" / "config.yaml").write_text("model:\n  path: tiny\n")
        (run / name).write_text(content)
        shutil.copytree(place / "adapter", run / "adapter")
        return opened(run)

    return attack


def config_of(run: Path) -> Any:
    return config.identity(config.read(run / ".hydra" / "config.yaml"))


def tuned_of(run: Path) -> Any:
    (run / "adapter" / "adapter_config.json").unlink()  # so that the run's own configuration is asked
    shutil.move(run / "adapter", run / "model")
    return find_tuned(str(run))


PYTHON = "!!python/object/apply:os.system ['touch pwned']"
TARGET = "model:\n  _target_: os.system\n  command: touch pwned\n  path: tiny\n"
SECRET_OF_ENV = "model:\n  path: ${oc.env:CANARY}\n"


def attacks(place: Path) -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """All of them, for a folder that holds `tiny` (a base) and `adapter`."""
    for name, gadget in gadgets(place).items():
        for form, content in (("raw", pickle.dumps(gadget)), ("torch", zipped({"a": gadget}))):
            for what, opened in (("checkpoint", open_checkpoint), ("base", open_base), ("adapter", open_adapter)):
                if what == "base" and form == "raw" and name not in ("os.system", "exec"):
                    continue  # the same reader as torch's form
                yield f"{what}: {form} pickle, {name}", lambda p, o=opened, c=content: o(p, c)
    for address in ("http://127.0.0.1:9/a", "https://127.0.0.1:9/a", "s3://bucket/a", "file:///etc/passwd"):
        yield f"checkpoint at {address}", url(CheckpointFiles().load_checkpoint, address)
        yield f"base at {address}", url(lambda a: load_model(a, source="local"), address)
        yield f"run at {address}", url(lambda a: load_model(find_tuned(a).base), address)
        yield f"data at {address}", lambda p, a=address: prepare(CorpusSpec.of(p / "tiny", path=a, cache=False))
    for name in ("../x", "a/b", "..", "a\nb", "/etc/x", "$(touch pwned)/a", "~/../x"):
        yield f"run name {name!r}", lambda p, n=name: Run.named(p / "runs", n)
    yield "adapter weights are a link outwards", linked_adapter
    yield "manifest names a file outside", manifest_outside
    yield "index names a file outside", weights_outside
    for key, value in {
        "auto_mapping": {"parent_library": "os", "base_model_class": "system"},
        "megatron_config": {"a": 1},
        "_target_": "os.system",
        "peft_type": "os.system",
        "corda_config": {"cache_file": "/etc/passwd"},
        "target_modules": "(a+)+$" * 20,
        "r": 10**15,
    }.items():
        yield f"adapter setting {key}", adapter_setting(**{key: value})
    yield "YAML tag in a run's configuration", run_file(".hydra/config.yaml", f"model: {PYTHON}", config_of)
    yield "YAML tag, read by chat", run_file(".hydra/config.yaml", f"model:\n  path: {PYTHON}", tuned_of)
    yield "_target_ in a run's configuration", run_file(".hydra/config.yaml", TARGET, config_of)
    yield "secret asked by a run's configuration", run_file(".hydra/config.yaml", SECRET_OF_ENV, tuned_of)
    yield "status that is code", run_file("status.json", "__import__('os').system('touch pwned')", read_status)
    yield "metrics that are code", run_file("metrics.jsonl", PYTHON, lambda r: read_jsonl(r / "metrics.jsonl"))
    for name in ("a.zip", "a.gz", "a.tar", "a.pkl", "a.npy", "a.pt"):
        yield f"data in {name}", data_file(name, in_zip("../../outside.txt"))
    yield "100,000 levels of nesting", data_file("a.json", "[" * 100_000)
    yield "a number of 5,000 digits", data_file("a.json", '[{"instruction": ' + "9" * 5000 + "}]")
    yield "a YAML bomb as data", data_file("a.yaml", "a: &a [x,x]\nb: [*a,*a]")
    for text in ("<|user|>", "<|assistant|>", "<|system|>", "[gMASK]", "sop", "</s>", "<|observation|>"):
        yield f"control text {text}", control_text(text)


def attempt(attack: Callable[[Path], Any], place: Path) -> str:
    """What came of it, in one line."""
    try:
        result = attack(place)
    except GlmftError as e:
        return f"refused: {e}"
    return f"read as data: {result!r}"
