"""conversations of {"from", "value"}; all names can be changed by `columns` and `tags`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmft.data.records import RecordError, flag_of, role_of, roles_of, text_of, turns_have, turns_of
from glmft.data.tools import call_of_json, with_tools
from glmft.messages import Message

ROLE_TAGS = {  # tag -> (its own name, role)
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "observation"),
    "function_tag": ("function_call", "call"),
    "system_tag": ("system", "system"),
}


def recognises(record: Mapping[str, Any]) -> bool:
    """Its conversations have `from`."""
    return turns_have(record, "from")


def convert(record: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, str]) -> list[Message]:
    """Turns of human and gpt, function_call and observation; `system` and `tools` beside them.

    Raises:
        RecordError: a key is missing or of the wrong type, or a role is unknown.
    """
    key, role_key, text_key = (
        columns.get("messages", "conversations"),
        tags.get("role_tag", "from"),
        tags.get("content_tag", "value"),
    )
    roles = roles_of(ROLE_TAGS, tags)
    messages: list[Message] = []
    system = columns.get("system", "system")
    if text := text_of(record, system, required=False):
        messages.append(Message("system", text))
    for i, turn in enumerate(turns_of(record, key)):
        where = f"{key}[{i}]."
        role = role_of(turn, role_key, roles, where)
        text, learn = text_of(turn, text_key, where), flag_of(turn, where)
        if role == "call":
            messages += call_of_json(text, f"{where}{text_key}", learn)
        elif role == "system" and messages:
            problem = f"{where}'{role_key}' is a system message, beside '{system}' or after other messages"
            raise RecordError("system not first", problem)
        else:
            messages.append(Message(role, text, learn=learn))  # type: ignore[arg-type]
    return with_tools(messages, record, columns)
