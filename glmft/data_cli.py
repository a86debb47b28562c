"""glmft data: data sets on the command line."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from glmft.data.corpus import read_conversations
from glmft.data.registry import REGISTRY, DatasetEntry, read_registry
from glmft.errors import GlmftError, UserError
from glmft.files import write_json


def add(file: Path, name: str, folder: Path, replace: bool) -> None:
    """Checks every record, then writes the entry; a file outside the folder is copied into it.

    Raises:
        UserError: the file cannot be used, or the name is taken by another file.
        ProblemList: records that cannot be used.
    """
    counts: Counter[str] = Counter()
    conversations = read_conversations(DatasetEntry(name, file), {}, "error", counts)
    registry = folder / REGISTRY
    entries = read_registry(registry) if registry.is_file() else {}
    target = file if file.resolve().is_relative_to(folder.resolve()) else folder / file.name
    file_name = target.resolve().relative_to(folder.resolve()).as_posix()
    if entries.get(name, {}).get("file_name", file_name) != file_name and not replace:
        raise UserError(
            f"{registry}: '{name}' is there already, for {entries[name]['file_name']}; --replace changes it"
        )
    if target != file:
        if target.exists() and target.read_bytes() != file.read_bytes() and not replace:
            raise UserError(f"{target}: exists with other content; --replace overwrites it")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    write_json(registry, entries | {name: {"file_name": file_name}})
    print(f"{len(conversations)} records of {file} are '{name}' in {registry}\nuse them: data.datasets=[{name}]")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or that of the error."""
    parser = argparse.ArgumentParser(prog="glmft data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="check a file and name it in dataset_info.json")
    adding.add_argument("file", type=Path)
    adding.add_argument("--name", help="of the data set (default: the file's)")
    adding.add_argument("--dir", type=Path, default=Path("data"), help=f"folder of {REGISTRY} (default: %(default)s)")
    adding.add_argument("--replace", action="store_true", help="an entry of this name or a file may be overwritten")
    options = parser.parse_args(arguments)
    try:
        add(options.file, options.name or options.file.stem, options.dir, options.replace)
    except GlmftError as e:
        print(f"glmft: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
