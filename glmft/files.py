"""Atomic writes and small JSON helpers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


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
