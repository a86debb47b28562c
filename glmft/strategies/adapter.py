"""Adapters on disk, in PEFT's format: exactly the adapter's tensors when written, exactly those when read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from glmft.errors import DamagedError, ProblemList, UserError
from glmft.kernels.lora import use_lean_forward

WEIGHTS = "adapter_model.safetensors"


def save_adapter(model: PeftModel, folder: Path, card: str) -> None:
    """adapter_config.json, adapter_model.safetensors and the model card.

    PEFT would add the embedding and the head (1 GB on the 6B), since the vocabulary of the published config differs
    from GlmConfig's default; `save_embedding_layers=False` keeps them out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").write_text(card, encoding="utf-8")


def load_adapter(model: nn.Module, folder: str | Path) -> PeftModel:
    """The model with the adapter active, every tensor of it checked: PEFT itself leaves missing ones at zero.

    Raises:
        UserError: the folder holds no adapter.
        DamagedError: the weights cannot be read.
        ProblemList: tensors are missing, unexpected or of another shape.
    """
    path = Path(folder)
    missing = [n for n in ("adapter_config.json", WEIGHTS) if not (path / n).is_file()]
    if missing:
        raise UserError(f"{path}: not an adapter folder, {' and '.join(missing)} missing")
    found = _shapes(path / WEIGHTS)
    tuned = PeftModel.from_pretrained(model, str(path))  # type: ignore[arg-type]
    expected = {k: tuple(v.shape) for k, v in _adapter_state(tuned).items()}
    problems = [f"missing {k}" for k in expected if k not in found]
    problems += [f"unexpected {k}" for k in found if k not in expected]
    problems += [
        f"{k} has shape {list(found[k])}, expected {list(s)}" for k, s in expected.items() if found.get(k, s) != s
    ]
    if problems:
        raise ProblemList(f"{path / WEIGHTS}: not an adapter of this model", problems)
    use_lean_forward(tuned)
    return tuned


def _adapter_state(model: PeftModel) -> dict[str, Any]:
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as f:
            return {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise DamagedError(f"{file}: cannot be read ({e})") from None
