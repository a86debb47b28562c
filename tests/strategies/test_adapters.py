"""What was saved is loaded exactly; anything else is refused by name. One line a kind of damage."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmft.artefacts import MANIFEST, write_folder
from glmft.errors import DamagedError, GlmftError, ProblemList, UserError
from glmft.models import load_model
from glmft.strategies.adapter import CONFIG, PICKLED, WEIGHTS, load_adapter, save_adapter
from glmft.strategies.lora import LoRA

pytestmark = pytest.mark.share("reliability")


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory) -> Path:
    """An adapter as a run leaves it."""
    torch.manual_seed(0)
    model = load_model(tiny, dtype="float32")
    tuned = LoRA(r=4).apply(model)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    folder = tmp_path_factory.mktemp("run") / "adapter"
    write_folder(folder, lambda part: save_adapter(tuned, part, "card"), {"base": model.base_fingerprint})
    return folder


def weights(change) -> object:
    """Rewrites the tensors, without a manifest: as adapters of other tools come."""

    def damage(folder: Path) -> None:
        (folder / MANIFEST).unlink()
        state = load_file(folder / WEIGHTS)
        save_file(change(state) or state, folder / WEIGHTS)

    return damage


def settings(**values: object) -> object:
    def damage(folder: Path) -> None:
        (folder / MANIFEST).unlink()
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))

    return damage


def content(name: str, change) -> object:
    def damage(folder: Path) -> None:
        file = folder / name
        file.write_bytes(change(file.read_bytes()))

    return damage


def plain(name: str, change) -> object:
    def damage(folder: Path) -> None:
        (folder / MANIFEST).unlink()
        content(name, change)(folder)

    return damage


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


class Gadget:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> object:
        import os

        return os.system, ("touch EXECUTED",)


def pickled(value: object) -> object:
    def damage(folder: Path) -> None:
        (folder / MANIFEST).unlink()
        (folder / WEIGHTS).unlink()
        (folder / PICKLED).write_bytes(pickle.dumps(value))

    return damage


def elsewhere(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "secret")
    (folder / WEIGHTS).symlink_to(folder.parent / "secret")


def manifest(**values: object) -> object:
    def damage(folder: Path) -> None:
        told = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(told | values))

    return damage


HUGE = (2**60).to_bytes(8, "little")


def file_for_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


K = {  # kind: (damage, error, what the message holds)
    "folder missing": (shutil.rmtree, UserError, "not an adapter folder, adapter_config.json and adapter_model"),
    "a file for a folder": (file_for_folder, UserError, "not an adapter folder"),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), UserError, "adapter_model.safetensors missing"),
    "configuration missing": (lambda f: (f / CONFIG).unlink(), UserError, "adapter_config.json missing"),
    "weights empty": (
        plain(WEIGHTS, lambda b: b""),
        DamagedError,
        "adapter_model.safetensors: cannot be read as tensors",
    ),
    "weights cut off": (plain(WEIGHTS, lambda b: b[:-9]), DamagedError, "cannot be read as tensors"),
    "a header of 2^60 bytes": (plain(WEIGHTS, lambda b: HUGE + b[8:]), DamagedError, "cannot be read as tensors"),
    "a text file": (plain(WEIGHTS, lambda b: b"hello " * 99), DamagedError, "cannot be read as tensors"),
    "cut off, with a manifest": (content(WEIGHTS, lambda b: b[:-9]), DamagedError, "bytes, the manifest says"),
    "one bit": (
        content(WEIGHTS, flipped),
        DamagedError,
        "adapter_model.safetensors: its content is not what was written",
    ),
    "alpha changed": (
        content(CONFIG, lambda b: b.replace(b'"lora_alpha": 16', b'"lora_alpha": 99')),
        DamagedError,
        "adapter_config.json: its content",
    ),
    "manifest of a newer format": (manifest(format=9), DamagedError, "format 9, this version reads 1; update glmft"),
    "another base": (
        manifest(base="0123456789abcdef"),
        UserError,
        "an adapter of another base model (0123456789abcdef)",
    ),
    "a link out of the folder": (elsewhere, DamagedError, "adapter_model.safetensors: missing"),
    "half the keys": (weights(lambda s: dict(list(s.items())[::2])), ProblemList, "missing base_model.model"),
    "another key": (weights(lambda s: s | {"other": torch.zeros(2)}), ProblemList, "unexpected other"),
    "renamed keys": (weights(lambda s: {"_orig_mod." + k: v for k, v in s.items()}), ProblemList, "... and "),
    "not a number": (
        weights(lambda s: (s[next(iter(s))].fill_(float("nan")), None)[1]),
        ProblemList,
        "holds values that are not finite",
    ),
    "another shape": (
        weights(lambda s: s | {next(k for k in s if "lora_B" in k): torch.zeros(3, 4)}),
        ProblemList,
        "has shape [3, 4], expected",
    ),
    "another rank": (settings(r=8), UserError, "r is 8, the tensors have 4"),
    "a rank beyond all memory": (settings(r=10**12), UserError, "r is 1000000000000, the tensors have 4"),
    "other targets": (
        settings(target_modules=["q_proj"]),
        ProblemList,
        "unexpected base_model.model.model.layers.0.mlp",
    ),
    "another kind of adapter": (settings(peft_type="IA3"), UserError, "peft_type is IA3, only LORA is loaded"),
    "a key of a newer PEFT": (
        settings(lora_alhpa=1),
        UserError,
        "unknown key 'lora_alhpa', did you mean 'lora_alpha'?",
    ),
    "code to import": (
        settings(auto_mapping={"parent_library": "os"}),
        UserError,
        "auto_mapping asks for code to be imported",
    ),
    "megatron": (settings(megatron_config={"a": 1}), UserError, "megatron_config asks for code to be imported"),
    "a task that there is not": (settings(task_type="CAUSAL_HM"), UserError, "Invalid task type: 'CAUSAL_HM'"),
    "configuration not JSON": (
        plain(CONFIG, lambda b: b[:20]),
        DamagedError,
        "adapter_config.json: not an adapter's configuration (JSON",
    ),
    "configuration without a kind": (plain(CONFIG, lambda b: b"{}"), DamagedError, "(KeyError: 'peft_type')"),
    "a pickle that runs a command": (
        pickled({"a": Gadget()}),
        DamagedError,
        "adapter_model.bin: cannot be read as tensors",
    ),
    "a pickle of something else": (pickled([1, 2]), DamagedError, "adapter_model.bin: cannot be read as tensors"),
}


def tree(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("kind", K)
def test_nothing_but_the_adapter_is_loaded(tiny, original, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    damage, error, says = K[kind]
    folder = Path(shutil.copytree(original, tmp_path / "a"))
    damage(folder)
    before = tree(tmp_path)
    with pytest.raises(GlmftError) as caught:
        load_adapter(load_model(tiny, dtype="float32"), folder)
    assert isinstance(caught.value, error)
    assert says in str(caught.value)
    assert tree(tmp_path) == before  # nothing was run, nothing changed


def test_the_adapter_itself_and_other_peoples_pickles(tiny, original, tmp_path):
    tokens = torch.arange(5, 25)[None]
    whole = load_adapter(load_model(tiny, dtype="float32"), original)(tokens).logits
    folder = Path(shutil.copytree(original, tmp_path / "a"))
    (folder / MANIFEST).unlink()
    torch.save(load_file(folder / WEIGHTS), folder / PICKLED)
    (folder / WEIGHTS).unlink()
    again = load_adapter(load_model(tiny, dtype="float32"), folder)(tokens).logits
    assert torch.equal(whole, again)
    assert not torch.equal(whole, load_model(tiny, dtype="float32")(tokens).logits)


def test_cut_off_or_flipped_anywhere(tiny, original, tmp_path):
    """At ten places of either file; the tensors are never looked at."""
    model = load_model(tiny, dtype="float32")
    for name in (WEIGHTS, CONFIG):
        whole = (original / name).read_bytes()
        for tenth in range(10):
            at = len(whole) * tenth // 10
            flipped_there = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
            for what, says in ((whole[:at], "bytes, the manifest says"), (flipped_there, "its content is not")):
                folder = Path(shutil.copytree(original, tmp_path / "a", dirs_exist_ok=True))
                (folder / name).write_bytes(what)
                with pytest.raises(DamagedError, match=says):
                    load_adapter(model, folder)
