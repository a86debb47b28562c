"""Adapters on disk, in PEFT's format: exactly the adapter's tensors when written, exactly those when read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from glmft.artefacts import verify_if_listed
from glmft.errors import DamagedError, ProblemList, UserError, nearest
from glmft.files import read_json, write_json
from glmft.kernels.lora import use_lean_forward
from glmft.models.published import tensor_differences
from glmft.strategies.exchange import is_published, to_glm, to_published

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def save_adapter(model: PeftModel, folder: Path, card: str) -> None:
    """adapter_config.json, adapter_model.safetensors and the model card.

    PEFT would add the embedding and the head (1 GB on the 6B), since the vocabulary of the published config differs
    from GlmConfig's default; `save_embedding_layers=False` keeps them out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").write_text(card, encoding="utf-8")


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> PeftModel:
    """The model with the adapter active: exactly its tensors, all of them there, of the right shape and finite. PEFT
    itself leaves missing ones at zero, and takes a flipped bit or another base's adapter without a word.

    Other people's `adapter_model.bin` is read as tensors only. Where glmft's manifest lies beside, it is compared.

    Raises:
        UserError: the folder holds no LoRA adapter, or one of another base model.
        DamagedError: a file is broken, or not what was written.
        ProblemList: tensors are missing, unexpected, of another shape, or not finite.
    """
    config, state, weights = _checked(Path(folder), model)
    with _named(folder):
        tuned = get_peft_model(model, config, adapter_name=name)  # type: ignore[arg-type]
    return _filled(tuned, state, weights, name)


def add_adapter(model: PeftModel, folder: str | Path, name: str) -> PeftModel:
    """One more adapter on a model that has some.

    Raises:
        UserError: the name is taken; and as `load_adapter`.
    """
    if name in model.peft_config:
        raise UserError(f"{folder}: an adapter called '{name}' is loaded already")
    config, state, weights = _checked(Path(folder), model.get_base_model())
    with _named(folder):
        model.add_adapter(name, config)
    return _filled(model, state, weights, name)


def read_adapter(folder: Path, model: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(adapter_config.json, tensors) in GLM's names, of an adapter of this model's base.

    Raises:
        UserError, DamagedError: as `load_adapter`.
    """
    _, state, _ = _checked(folder, model)
    return _raw(folder / CONFIG), state


def write_adapter(folder: Path, state: dict[str, torch.Tensor], rank: int, base: str, card: str) -> None:
    """An adapter whose scaling is 1, in PEFT's format."""
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in state})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM", inference_mode=True)
    config.base_model_name_or_path = base
    _write(folder, config.to_dict() | {"target_modules": targets}, state, card)


def _checked(path: Path, model: Any) -> tuple[LoraConfig, dict[str, torch.Tensor], Path]:
    weights = next((path / n for n in (WEIGHTS, PICKLED) if (path / n).is_file()), None)
    missing = [CONFIG] * (not (path / CONFIG).is_file()) + [WEIGHTS] * (weights is None)
    if weights is None or missing:
        raise UserError(f"{path}: not an adapter folder, {' and '.join(missing)} missing")
    base, own = verify_if_listed(path).get("base"), getattr(model, "base_fingerprint", None)
    if base and own and base != own:
        raise UserError(f"{path}: an adapter of another base model ({base}), this one is {own}")
    raw, state = _raw(path / CONFIG), _read(weights)
    if is_published(state):
        with _named(weights):
            raw, state = to_glm(raw, state, model.config)
    return _config(path / CONFIG, raw, state), state, weights


def _filled(tuned: PeftModel, state: dict[str, torch.Tensor], weights: Path, name: str) -> PeftModel:
    own = get_peft_model_state_dict(tuned, save_embedding_layers=False, adapter_name=name)
    problems = tensor_differences(*({k: tuple(t.shape) for k, t in of.items()} for of in (state, own)))
    problems += [f"{k} holds values that are not finite" for k, t in state.items() if not t.isfinite().all()]
    if problems:
        raise ProblemList(f"{weights}: not an adapter of this model", problems)
    set_peft_model_state_dict(tuned, state, adapter_name=name)
    use_lean_forward(tuned)
    return tuned.eval()


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.name == PICKLED:
            state = torch.load(file, map_location="cpu", weights_only=True)
            return {str(k): v for k, v in state.items() if isinstance(v, torch.Tensor)}
        return load_file(file)
    except Exception as e:  # torch has many for a file that is not its own, and for one that asks for code
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DamagedError(f"{file}: cannot be read as tensors ({reason})") from None


def _raw(file: Path) -> dict[str, Any]:
    try:
        raw = read_json(file)
        _ = raw["peft_type"], raw["r"]
    except (ValueError, KeyError, TypeError) as e:
        raise DamagedError(f"{file}: not an adapter's configuration ({type(e).__name__}: {e})") from None
    return dict(raw)


def _config(file: Path, raw: dict[str, Any], state: dict[str, torch.Tensor]) -> LoraConfig:
    """adapter_config.json, as far as it is a plain LoRA whose rank the tensors have: nothing is imported or fetched
    because of it, and no memory is taken for a rank that is not there."""
    kind, rank = raw["peft_type"], raw["r"]
    if kind != "LORA":
        raise UserError(f"{file}: peft_type is {kind}, only LORA is loaded")
    if asking := [k for k in ("auto_mapping", "megatron_config") if raw.get(k)]:
        raise UserError(f"{file}: {asking[0]} asks for code to be imported, which is not done")
    ranks = {t.shape[0] for k, t in state.items() if "lora_A" in k}
    if not raw.get("rank_pattern") and ranks != {rank}:
        raise UserError(f"{file}: r is {rank}, the tensors have {', '.join(map(str, sorted(ranks))) or 'none'}")
    known = {f.name for f in fields(LoraConfig)}
    unknown = [k for k in raw if k not in known and k not in ("peft_version",)]
    if unknown:
        raise UserError(f"{file}: unknown key '{unknown[0]}'{nearest(unknown[0], known)}; made by a newer PEFT?")
    values = {k: v for k, v in raw.items() if k in known and k not in ("peft_type", "runtime_config")}
    with _named(file):
        return LoraConfig(**values | {"inference_mode": True})


@contextmanager
def _named(place: str | Path) -> Iterator[None]:
    """PEFT's own refusals, with the file or folder they are about."""
    try:
        yield
    except (ValueError, TypeError, UserError) as e:
        raise UserError(f"{place}: {str(e).splitlines()[0]}") from None


def write_published(source: str | Path, folder: Path, model: Any) -> None:
    """An adapter in the published layer names, beside the card of the source.

    Raises:
        UserError: it has no exact counterpart there; and as `load_adapter`.
    """
    raw, state = read_adapter(Path(source), model)
    with _named(source):
        raw, state = to_published(raw, state, model.config)
    card = Path(source) / "README.md"
    _write(folder, raw, state, card.read_text(encoding="utf-8") if card.is_file() else "")


def _write(folder: Path, raw: dict[str, Any], state: dict[str, torch.Tensor], card: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, raw)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")
