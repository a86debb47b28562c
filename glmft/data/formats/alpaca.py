"""instruction, input, output; with system, history and tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmft.data.records import RecordError, text_of
from glmft.data.tools import with_tools
from glmft.messages import Message


def recognises(record: Mapping[str, Any]) -> bool:
    """It has an instruction or an output."""
    return "instruction" in record or "output" in record


def convert(record: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, str]) -> list[Message]:
    """`instruction` + newline + `input` asks, `output` answers; `history` holds earlier [question, answer] pairs.

    Raises:
        RecordError: a key is missing, not text, or empty where text is needed.
    """
    prompt, query = columns.get("prompt", "instruction"), columns.get("query", "input")
    response = columns.get("response", "output")
    instruction = text_of(record, prompt)
    more = text_of(record, query, required=False)
    output = text_of(record, response)
    question = f"{instruction}\n{more}" if instruction and more else instruction or more
    if not question.strip():
        raise RecordError("nothing asked", f"'{prompt}' and '{query}' are both empty")
    if not output.strip():
        raise RecordError("nothing to learn", f"'{response}' is empty: there is no answer to learn")
    messages = []
    if system := text_of(record, columns.get("system", "system"), required=False):
        messages.append(Message("system", system))
    for asked, answered in _history(record, columns.get("history", "history")):
        messages += [Message("user", asked), Message("assistant", answered)]
    messages += [Message("user", question), Message("assistant", output)]
    return with_tools(messages, record, columns)


def _history(record: Mapping[str, Any], key: str) -> list[list[str]]:
    value = record.get(key) or []
    if not isinstance(value, list):
        raise RecordError("history", f"'{key}' must be a list of [question, answer] pairs of text")
    for i, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
            raise RecordError("history", f"'{key}' must be a list of [question, answer] pairs of text; see {key}[{i}]")
    return value
