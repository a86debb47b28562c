"""From `model.path` to a local folder: a folder, the Hugging Face hub or ModelScope."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from glmft.errors import ResourceError, UserError

Source = Literal["auto", "local", "hf", "modelscope"]
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_MODELSCOPE_NAMES = {"zai-org": "ZhipuAI", "THUDM": "ZhipuAI"}
_FILES = ["*.json", "*.safetensors", "tokenizer.model"]
PACKAGED = Path(__file__).resolve().parent.parent / "assets"


def is_hub_id(path: str) -> bool:
    """`owner/name`, which a hub can be asked for."""
    return bool(_HUB_ID.match(path))


def find_local(path: str) -> Path | None:
    """The folder meant by `path`: as given, under ./models, or among the packaged models; None if there is none."""
    given = Path(path).expanduser()
    places = [given] if given.is_absolute() else [given, Path("models") / given.name, PACKAGED / path]
    return next((p.resolve() for p in places if (p / "config.json").is_file()), None)


def download_commands(path: str, revision: str | None) -> str:
    """The exact commands that fetch a hub model into ./models, from either hub."""
    owner, _, name = path.partition("/")
    pin = f" --revision {revision}" if revision else ""
    return (
        f"    hf download {path}{pin} --include '*.json' '*.safetensors' tokenizer.model --local-dir models/{name}\n"
        f"    modelscope download --model {_MODELSCOPE_NAMES.get(owner, owner)}/{name}{pin} --local_dir models/{name}"
    )


def missing_locally(path: str, source: Source, revision: str | None) -> str | None:
    """Why a run could not start without a download, or None where a folder is there."""
    if source in ("auto", "local") and find_local(path):
        return None
    if source == "local" or not is_hub_id(path):
        tried = ", ".join(str(p) for p in (Path(path), Path("models") / Path(path).name))
        hint = f"; to fetch it:\n{download_commands(path, revision)}" if is_hub_id(path) else ""
        return f"model.path={path}: no model folder there (tried {tried}){hint}"
    return f"model.path={path}: not on this machine; to fetch it:\n{download_commands(path, revision)}"


def fetch(path: str, source: Source = "auto", revision: str | None = None) -> Path:
    """A local folder with the model: found, or downloaded from the hub that `source` names.

    `auto` takes a folder if there is one, else ModelScope where USE_MODELSCOPE_HUB=1, else the Hugging Face hub
    (mirror: HF_ENDPOINT; no network: HF_HUB_OFFLINE=1).

    Raises:
        UserError: no such folder and no such model; the message holds the download commands.
        ResourceError: the `modelscope` package is needed and absent.
    """
    if source in ("auto", "local") and (folder := find_local(path)):
        return folder
    if source == "local" or not is_hub_id(path):
        raise UserError(missing_locally(path, source, revision) or "")
    if source == "modelscope" or (source == "auto" and os.environ.get("USE_MODELSCOPE_HUB") == "1"):
        return _from_modelscope(path, revision)
    return _from_hf(path, revision)


def _from_hf(path: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=_FILES))
        if not any(folder.glob("*.safetensors")):  # an older upload
            snapshot_download(path, revision=revision, allow_patterns=["pytorch_model*.bin*"])
        return folder
    except Exception as e:  # the hub client has many; each means: not to be had
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"{missing_locally(path, 'hf', revision)}\n  the hub said: {reason}") from None


def _from_modelscope(path: str, revision: str | None) -> Path:
    owner, _, name = path.partition("/")
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ResourceError("model.source=modelscope needs a package: pip install modelscope") from None
    try:
        model = f"{_MODELSCOPE_NAMES.get(owner, owner)}/{name}"
        return Path(snapshot_download(model, revision=revision, allow_patterns=_FILES))
    except Exception as e:
        raise UserError(f"{missing_locally(path, 'modelscope', revision)}\n  ModelScope said: {e}") from None
