"""Atomic writes and small JSON helpers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glmft.errors import DamagedError


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes beside the target, then renames: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    data = content.encode() if isinstance(content, str) else content
    try:
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """`value` as UTF-8 JSON, atomically, with a final newline."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=indent, default=str) + "\n")


def read_json(path: Path) -> Any:
    """UTF-8 JSON, with or without a byte order mark."""
    return json.loads(path.read_text(encoding="utf-8-sig"))


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """One object as one line, flushed, so that a reader can follow the file."""
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows that `append_jsonl` wrote; a last line that was cut off is taken away, so that the next one stands alone.

    Raises:
        DamagedError: another line is no object.
    """
    if not file.is_file():
        return
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        file.write_bytes(whole)
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            yield dict(json.loads(line))
        except (ValueError, TypeError):
            raise DamagedError(f"{file}: line {number} is not what was written; remove it to go on") from None
