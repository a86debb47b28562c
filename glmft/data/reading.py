"""Reading a JSON file of records; every problem is named with its place in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glmft.errors import UserError


def read_records(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list, in order. UTF-8, with or without a byte order mark.

    Raises:
        UserError: the file is missing, not UTF-8, not JSON (with line and column), or not a list of objects.
    """
    if not file.is_file():
        raise UserError(f"{file}: {'a folder, expected a JSON file' if file.is_dir() else 'no such file'}")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: not UTF-8 (byte {e.start}); convert it, for example: iconv -f GBK -t UTF-8") from None
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror})") from None
    if not text.strip():
        raise UserError(f"{file}: empty; expected a JSON list of records")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        hint = "; one object a line is JSONL, expected one list" if e.msg == "Extra data" else ""
        raise UserError(f"{file}:{e.lineno}:{e.colno}: not valid JSON: {e.msg}{hint}") from None
    except RecursionError:
        raise UserError(f"{file}: nested too deeply to be a list of records") from None
    if not isinstance(value, list):
        raise UserError(f"{file}: holds {_kind(value)}, expected a list of records: [ {{...}}, {{...}} ]")
    if not value:
        raise UserError(f"{file}: an empty list, there is nothing to train on")
    for number, record in enumerate(value, start=1):
        if not isinstance(record, dict):
            raise UserError(
                f"{file}: record {number} is {_kind(record)}, expected an object with instruction and output"
            )
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a text", bool: "true/false", int: "a number", float: "a number"}
    return names[type(value)]
