"""conversations of {"role", "content"}, the format of ChatGLM3's own fine-tuning demo."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from glmft.data.records import RecordError, flag_of, kind_of, role_of, text_of, turns_have, turns_of
from glmft.data.tools import call, with_tools
from glmft.messages import Message

ROLES = {r: r for r in ("system", "user", "assistant", "observation", "tool")}


def recognises(record: Mapping[str, Any]) -> bool:
    """Its conversations have `role`."""
    return turns_have(record, "role")


def convert(record: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, str]) -> list[Message]:
    """A `tool` turn with name, parameters and observation is a call and its result.

    Raises:
        RecordError: a key is missing or of the wrong type, or a role is unknown.
    """
    key = columns.get("messages", "conversations")
    messages: list[Message] = []
    for i, turn in enumerate(turns_of(record, key)):
        where = f"{key}[{i}]."
        role, learn = role_of(turn, "role", ROLES, where), flag_of(turn, where)
        if role != "tool":
            metadata = text_of(turn, "metadata", where, required=False)
            messages.append(Message(role, text_of(turn, "content", where), metadata, learn=learn))  # type: ignore[arg-type]
            continue
        parameters = turn.get("parameters", {})
        if not isinstance(parameters, dict):
            problem = f"{where}'parameters' is {kind_of(parameters)}, expected an object"
            raise RecordError("tool arguments", problem)
        messages.append(call(text_of(turn, "name", where), parameters, learn))
        if "observation" in turn:
            seen = turn["observation"]
            text = seen if isinstance(seen, str) else json.dumps(seen, ensure_ascii=False)
            messages.append(Message("observation", text))
    return with_tools(messages, record, columns)
