"""One function a record format: record -> Conversation.

A new format is one function here, found by its name in the registry entry's `formatting`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from glmft.errors import nearest
from glmft.messages import Conversation, Message

Columns = Mapping[str, str | None]


class RecordError(ValueError):
    """A record that cannot be trained on: which key, what came, what is allowed."""


def alpaca(record: Mapping[str, Any], columns: Columns, source: str = "") -> Conversation:
    """`instruction` + newline + `input` asks, `output` answers; `history` holds earlier [question, answer] pairs.

    `columns` maps prompt, query, response, system, history to the record's keys.

    Raises:
        RecordError: a key is missing, not text, or empty where text is needed.
    """
    keys = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
    keys |= {k: v for k, v in columns.items() if v is not None}
    system = _text(record, keys["system"], required=False)
    instruction = _text(record, keys["prompt"], required=True)
    query = _text(record, keys["query"], required=False)
    output = _text(record, keys["response"], required=True)
    question = "\n".join(part for part in (instruction, query) if part)
    if not question.strip():
        raise RecordError(f"{keys['prompt']!r} and {keys['query']!r} are both empty")
    if not output.strip():
        raise RecordError(f"{keys['response']!r} is empty: there is no answer to learn")
    messages = [Message("system", system)] if system else []
    for pair in _history(record, keys["history"]):
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return Conversation((*messages, Message("user", question), Message("assistant", output)), source)


def _text(record: Mapping[str, Any], key: str, required: bool) -> str:
    value = record.get(key)
    if isinstance(value, str):
        return value
    if value is None and not required:
        return ""
    if key not in record:
        raise RecordError(f"{key!r} is missing{nearest(key, record)} (its keys: {', '.join(map(repr, record))})")
    raise RecordError(f"{key!r} is {type(value).__name__} ({str(value)[:40]!r}), expected text")


def _history(record: Mapping[str, Any], key: str) -> list[list[str]]:
    value = record.get(key) or []
    ok = isinstance(value, list) and all(
        isinstance(p, list) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in value
    )
    if not ok:
        raise RecordError(f"{key!r} must be a list of [question, answer] pairs of text")
    return list(value)


FORMATS: dict[str, Callable[..., Conversation]] = {"alpaca": alpaca}
