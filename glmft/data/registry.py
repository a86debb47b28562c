"""`dataset_info.json`, the registry of data sets that LLaMA-Factory users have.

Places are tried in this order: an absolute path, `data.dir`, the working directory, ./data, the packaged examples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmft.data.formats import FORMATS
from glmft.errors import UserError, nearest
from glmft.files import read_json

REGISTRY = "dataset_info.json"
LLAMA_FACTORY = "https://raw.githubusercontent.com/hiyouga/LLaMA-Factory/main/data"
WELL_KNOWN = {"alpaca_zh_demo": LLAMA_FACTORY, "identity": LLAMA_FACTORY}
PACKAGED = Path(__file__).resolve().parent.parent / "assets" / "data"
KNOWN_KEYS = ("file_name", "formatting", "columns")
OTHER_KEYS = (  # of the dialect, not read by this version
    *("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"),
    *("split", "subset", "folder", "num_samples", "tags", "ranking"),
)


@dataclass(frozen=True, slots=True)
class DatasetEntry:
    """A data set as the registry names it: its file, its format and the keys of its columns."""

    name: str
    file: Path
    formatting: str = "alpaca"
    columns: Mapping[str, str | None] = field(default_factory=dict)


def _folders(data_dir: str | None) -> list[Path]:
    given = [Path(data_dir).expanduser()] if data_dir else []
    return [*given, Path(), Path("data"), PACKAGED]


def find_datasets(names: Sequence[str], data_dir: str | None) -> tuple[list[DatasetEntry], list[str]]:
    """(entries found, problems): all names are looked up, so that one run reports every miss."""
    entries, problems = [], []
    for name in names:
        try:
            entries.append(find_dataset(name, data_dir))
        except UserError as e:
            problems.append(str(e))
    return entries, problems


def find_dataset(name: str, data_dir: str | None = None) -> DatasetEntry:
    """Looks the name up in the first registry that has it.

    Raises:
        UserError: no registry has the name (every place tried is listed), or its entry cannot be used.
    """
    known: list[str] = []
    tried: list[str] = []
    for folder in _folders(data_dir):
        file = folder / REGISTRY
        tried.append(str(file) if folder != PACKAGED else "the packaged examples")
        if not file.is_file():
            continue
        entries = read_registry(file)
        if name in entries:
            return _entry(file, name, entries[name])
        known += entries
    raise UserError(
        f"data.datasets: '{name}' is in no registry{nearest(name, known)} (tried {', '.join(tried)}); "
        + (_fetch_command(name) if name in WELL_KNOWN else "")
        + f'put your JSON beside a {REGISTRY} with {{"{name}": {{"file_name": "..."}}}}, or give data.path=FILE'
    )


def _fetch_command(name: str) -> str:
    files = "{" + f"{REGISTRY},{name}.json" + "}"
    return f"to fetch it:\n    curl -L --create-dirs --output 'data/#1' '{WELL_KNOWN[name]}/{files}'\n  or "


def direct_file(path: str) -> DatasetEntry:
    """A JSON file named directly, in alpaca records."""
    given = Path(path).expanduser()
    places = [given] if given.is_absolute() else [given, Path("data") / given, PACKAGED / given]
    file = next((p for p in places if p.exists()), None)
    if file is None:
        raise UserError(f"data.path={path}: no such file (tried {', '.join(str(p) for p in places[:2])})")
    return DatasetEntry(given.stem, file)


def read_registry(file: Path) -> dict[str, Any]:
    """The entries of a registry by name, as they stand there.

    Raises:
        UserError: not a JSON object.
    """
    try:
        entries = read_json(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: not valid JSON: {e}") from None
    if not isinstance(entries, dict):
        raise UserError(f"{file}: expected an object of data sets by name")
    return entries


def _entry(registry: Path, name: str, value: Any) -> DatasetEntry:
    where = f"{registry}: '{name}'"
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object with file_name")
    if unknown := [k for k in value if k not in KNOWN_KEYS + OTHER_KEYS]:
        near = nearest(unknown[0], KNOWN_KEYS + OTHER_KEYS)
        raise UserError(f"{where}: unknown key '{unknown[0]}'{near}")
    if other := [k for k in value if k in OTHER_KEYS]:
        raise UserError(f"{where}: '{other[0]}' is not read by this version; give a local alpaca JSON as file_name")
    if not isinstance(value.get("file_name"), str):
        raise UserError(f"{where}: file_name is missing")
    formatting = value.get("formatting", "alpaca")
    if formatting not in FORMATS:
        raise UserError(f"{where}: formatting '{formatting}' is not read by this version ({', '.join(FORMATS)})")
    columns = value.get("columns", {})
    if not isinstance(columns, dict):
        raise UserError(f"{where}: columns must be an object")
    file = registry.parent / value["file_name"]
    if not file.resolve().is_relative_to(registry.parent.resolve()):
        raise UserError(f"{where}: file_name '{value['file_name']}' lies outside the registry's folder")
    if not file.is_file():
        raise UserError(f"{where}: {file}: no such file")
    return DatasetEntry(name, file, formatting, columns)
