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
from glmft.data.reading import READERS, read_records
from glmft.errors import UserError, nearest

REGISTRY = "dataset_info.json"
LLAMA_FACTORY = "https://raw.githubusercontent.com/hiyouga/LLaMA-Factory/main/data"
WELL_KNOWN = {"alpaca_zh_demo": LLAMA_FACTORY, "identity": LLAMA_FACTORY}
PACKAGED = Path(__file__).resolve().parent.parent / "assets" / "data"
HUBS = {
    "hf_hub_url": "hf download {repo} --repo-type dataset --local-dir data/{name}",
    "ms_hub_url": "modelscope download --dataset {repo} --local_dir data/{name}",
    "om_hub_url": "clone {repo} from modelers.cn into data/{name}",
}
NO_DATA = (REGISTRY, "state.json", "dataset_dict.json")  # of the `datasets` library
PLAIN_TEXT = "plain text, which holds no answers to learn"
TEXT_COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools")
OTHER_COLUMNS = {  # column -> why a set that has it is not used
    **dict.fromkeys(("images", "videos", "audios"), "ChatGLM3 reads text only"),
    **dict.fromkeys(("chosen", "rejected"), "ranked answers are for preference tuning, glmft tunes on instructions"),
    "kto_tag": "rated answers are for preference tuning, glmft tunes on instructions",
}
TAGS = tuple(
    f"{t}_tag" for t in ("role", "content", "user", "assistant", "observation", "function", "system")
)  # of a message
KEYS = (
    *("file_name", *HUBS, "script_url", "cloud_file_name", "formatting", "ranking"),
    *("subset", "split", "folder", "num_samples", "columns", "tags"),
)


class NeedsNetwork(UserError):
    """A data set that lies on a hub."""


class Unsupported(UserError):
    """A data set of a kind that is not trained on."""


class MissingFile(UserError):
    """A data set whose files are not here."""


@dataclass(frozen=True, slots=True)
class DatasetEntry:
    """A data set: its files, its format, and the names in it that differ from the format's own."""

    name: str
    files: tuple[Path, ...]
    formatting: str = "alpaca"
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    num_samples: int | None = None


def _folders(data_dir: str | None) -> list[Path]:
    given = [Path(data_dir).expanduser()] if data_dir else []
    return [*given, Path(), Path("data"), PACKAGED]


def registries(data_dir: str | None = None) -> list[Path]:
    """The registries that are there, in the order they are asked."""
    return [f for folder in _folders(data_dir) if (f := folder / REGISTRY).is_file()]


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
    for file in registries(data_dir):
        entries = read_registry(file)
        if name in entries:
            return entry_of(file, name, entries[name])
        known += entries
    tried = [str(f / REGISTRY) if f != PACKAGED else "the packaged examples" for f in _folders(data_dir)]
    raise UserError(
        f"data.datasets: '{name}' is in no registry{nearest(name, known)} (tried {', '.join(tried)}); "
        + (_fetch_command(name) if name in WELL_KNOWN else "")
        + f'put your JSON beside a {REGISTRY} with {{"{name}": {{"file_name": "..."}}}}, or give data.path=FILE'
    )


def _fetch_command(name: str) -> str:
    files = "{" + f"{REGISTRY},{name}.json" + "}"
    return f"to fetch it:\n    curl -L --create-dirs --output 'data/#1' '{WELL_KNOWN[name]}/{files}'\n  or "


def direct_file(path: str) -> DatasetEntry:
    """A file or folder named directly; its format is that of its first record.

    Raises:
        UserError: there is no such file, or its first record looks like no format.
    """
    given = Path(path).expanduser()
    places = [given] if given.is_absolute() else [given, Path("data") / given, PACKAGED / given]
    found = next((p for p in places if p.exists()), None)
    if found is None:
        raise MissingFile(f"data.path={path}: no such file (tried {', '.join(str(p) for p in places[:2])})")
    files = _data_files(found, f"data.path={path}") if found.is_dir() else (found,)
    return DatasetEntry(given.stem, files, detect_format(files[0]))


def detect_format(file: Path) -> str:
    """The format whose marks the first usable record has.

    Raises:
        UserError: no format has them; its keys are named, and what is known.
    """
    record = next((r for _, r in read_records(file) if isinstance(r, dict)), None)
    if file.suffix == ".txt":
        raise Unsupported(f"{file}: {PLAIN_TEXT}")
    if record is None:
        return "alpaca"  # nothing here is a record: reading it says so, one by one
    found = [name for name, form in FORMATS.items() if form.recognises(record)]
    if not found:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise UserError(
            f"{file}: the first record looks like no known format (its keys: {keys}); known are {', '.join(FORMATS)}; "
            f"an entry in {REGISTRY} can say what its columns mean"
        )
    return found[0]


def read_registry(file: Path) -> dict[str, Any]:
    """The entries of a registry by name, as they stand there.

    Raises:
        UserError: not a JSON object, or a name stands there twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [k for k, _ in pairs]
        if twice := [n for n in names if names.count(n) > 1]:
            raise UserError(f"{file}: '{twice[0]}' stands there twice; keep one of them")
        return dict(pairs)

    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: not valid JSON: {e}") from None
    if not isinstance(entries, dict):
        raise UserError(f"{file}: expected an object of data sets by name")
    return entries


def entry_of(registry: Path, name: str, value: Any) -> DatasetEntry:
    """A data set as its registry describes it.

    Raises:
        NeedsNetwork, Unsupported, MissingFile: it cannot be used, and why.
        UserError: the entry itself is wrong.
    """
    where = f"{registry}: '{name}'"
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object with file_name")
    if unknown := [k for k in value if k not in KEYS]:
        raise UserError(f"{where}: unknown key '{unknown[0]}'{nearest(unknown[0], KEYS)}")
    columns = _names(value, "columns", (*TEXT_COLUMNS, *OTHER_COLUMNS), where)
    tags = _names(value, "tags", TAGS, where)
    formatting = value.get("formatting", "alpaca")
    if not isinstance(formatting, str) or formatting not in FORMATS:
        near = nearest(str(formatting), FORMATS)
        raise UserError(f"{where}: formatting '{formatting}' is unknown{near} (allowed: {', '.join(FORMATS)})")
    if value.get("ranking"):
        raise Unsupported(f"{where}: ranking: {OTHER_COLUMNS['chosen']}")
    if other := [k for k in columns if k in OTHER_COLUMNS]:
        raise Unsupported(f"{where}: column '{other[0]}': {OTHER_COLUMNS[other[0]]}")
    num_samples = value.get("num_samples")
    if num_samples is not None and (type(num_samples) is not int or num_samples < 1):
        raise UserError(f"{where}: num_samples is {num_samples!r}, expected a number of 1 or more")
    files = _files_of(registry.parent, name, value, where)
    if files[0].suffix == ".txt":
        raise Unsupported(f"{where}: {files[0].name}: {PLAIN_TEXT}")
    return DatasetEntry(name, files, formatting, columns, tags, num_samples)


def _names(value: Mapping[str, Any], key: str, allowed: Sequence[str], where: str) -> dict[str, str]:
    names = value.get(key) or {}
    if not isinstance(names, dict):
        raise UserError(f"{where}: {key} must be an object")
    for k, v in names.items():
        if k not in allowed:
            raise UserError(f"{where}: {key}: unknown key '{k}'{nearest(k, allowed)} (allowed: {', '.join(allowed)})")
        if v is not None and not isinstance(v, str):
            raise UserError(f"{where}: {key}.{k} is {v!r}, expected the name it has in the file")
    return {k: v for k, v in names.items() if v is not None}


def _files_of(folder: Path, name: str, value: Mapping[str, Any], where: str) -> tuple[Path, ...]:
    if "script_url" in value:
        raise Unsupported(f"{where}: script_url: a loading script is foreign code and is not run; give its data files")
    if "cloud_file_name" in value:
        raise Unsupported(f"{where}: cloud_file_name: cloud storage is not read; copy the file here")
    if "file_name" not in value:
        commands = [HUBS[k].format(repo=value[k], name=name) for k in HUBS if k in value]
        if commands:
            raise NeedsNetwork(
                f'{where} lies on a hub; fetch it, then say "file_name": "{name}" there:\n    '
                + "\n    ".join(commands)
            )
        raise UserError(f"{where}: file_name is missing")
    if not isinstance(value["file_name"], str) or not value["file_name"]:
        raise UserError(f"{where}: file_name is {value['file_name']!r}, expected the name of a file")
    file = folder / value["file_name"]
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{where}: file_name '{value['file_name']}' lies outside the registry's folder")
    if not file.exists():
        fetch = f"; {_fetch_command(name).removesuffix('or ').strip()}" if name in WELL_KNOWN else ""
        raise MissingFile(f"{where}: {file}: no such file{fetch}")
    if file.is_file():
        return (file,)
    names = [value.get(key) for key in ("folder", "subset", "split")]
    for key, name_of in zip(("folder", "subset", "split"), names, strict=True):
        if name_of is not None and not isinstance(name_of, str):
            raise UserError(f"{where}: {key} is {name_of!r}, expected a name")
    inside = file / (names[0] or "")
    if not inside.resolve().is_relative_to(file.resolve()):
        raise UserError(f"{where}: folder '{names[0]}' lies outside {file}")
    if not inside.is_dir():
        raise MissingFile(f"{where}: {inside}: no such folder")
    return _data_files(inside, where, names[1], names[2])


def _data_files(top: Path, where: str, subset: str | None = None, split: str | None = None) -> tuple[Path, ...]:
    """The data files of a folder, as a downloaded hub repository has them: `subset` and `split` choose by names."""
    below = [p for p in sorted(top.rglob("*")) if p.is_file() and p.name not in NO_DATA]
    below = [p for p in below if not any(part.startswith(".") for part in p.relative_to(top).parts)]
    files = [p for p in below if p.suffix.lower() in READERS]
    for key, wanted in (("subset", subset), ("split", split)):
        if wanted is None:
            continue
        chosen = [p for p in files if any(_is_of(part, wanted) for part in p.relative_to(top).parts)]
        if not chosen and (key, wanted) != ("split", "train"):
            names = ", ".join(sorted(p.relative_to(top).as_posix() for p in files)[:8])
            raise UserError(f"{where}: {key} '{wanted}': no file of that name in {top} (there are {names or 'none'})")
        files = chosen or files
    if not files:
        raise UserError(f"{where}: {top}: no data file ({', '.join(READERS)}) in this folder")
    kinds = sorted({p.suffix.lower() for p in files})
    if len(kinds) > 1:
        raise UserError(f"{where}: {top} holds files of several types: {', '.join(kinds)}; keep one of them")
    return tuple(files)


def _is_of(part: str, wanted: str) -> bool:
    """`train`, `train.json`, `train-00000-of-00002.parquet` and `train_sft/` are of `train` and `train_sft`."""
    return part == wanted or any(part.startswith(wanted + c) for c in ".-")


def describe(registry: Path) -> dict[str, tuple[str, str]]:
    """Every entry of a registry: name -> ("usable" | "needs network" | "missing" | "unsupported" | "wrong", why)."""
    classes = {NeedsNetwork: "needs network", Unsupported: "unsupported", MissingFile: "missing"}
    out = {}
    for name, value in read_registry(registry).items():
        try:
            entry = entry_of(registry, name, value)
            out[name] = ("usable", f"{entry.formatting}, {', '.join(f.name for f in entry.files[:3])}")
        except UserError as e:
            status = next((s for c, s in classes.items() if isinstance(e, c)), "wrong")
            if status in ("needs network", "missing") and list(value.get("columns") or ()) == ["prompt"]:
                out[name] = ("unsupported", f"its columns name a prompt and no response: {PLAIN_TEXT}")
                continue
            out[name] = (status, str(e).removeprefix(f"{registry}: '{name}'").removeprefix(": ").strip())
    return out
