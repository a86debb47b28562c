"""messages of {"role", "content"} with tool_calls, as OpenAI's chat API has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmft.data.records import RecordError, flag_of, kind_of, role_of, roles_of, text_of, turns_of
from glmft.data.tools import call_of_json, with_tools
from glmft.messages import Message

ROLE_TAGS = {
    "user_tag": ("user", "user"),
    "assistant_tag": ("assistant", "assistant"),
    "observation_tag": ("tool", "observation"),
    "function_tag": ("function_call", "call"),
    "system_tag": ("system", "system"),
}
OTHER_ROLES = {"developer": "system", "function": "observation"}


def recognises(record: Mapping[str, Any]) -> bool:
    """It has a list of messages."""
    return isinstance(record.get("messages"), list)


def convert(record: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, str]) -> list[Message]:
    """Calls made together are put one after the other, each before its own result, as ChatGLM3 takes them.

    Raises:
        RecordError: a key is missing or of the wrong type, a role is unknown, or a call has no result.
    """
    key, role_key, text_key = (
        columns.get("messages", "messages"),
        tags.get("role_tag", "role"),
        tags.get("content_tag", "content"),
    )
    roles = OTHER_ROLES | roles_of(ROLE_TAGS, tags)
    messages: list[Message] = []
    waiting: list[tuple[str | None, Message]] = []  # (id, call) without a result yet
    for i, turn in enumerate(turns_of(record, key)):
        where = f"{key}[{i}]."
        role, learn = role_of(turn, role_key, roles, where), flag_of(turn, where)
        calls = _calls(turn, where)
        text = text_of(turn, text_key, where, required=not calls)
        if role == "observation":
            if not waiting:
                raise RecordError(
                    "observation without a call", f"{where}'{role_key}' is a result, but no tool was called"
                )
            messages += [_take(waiting, turn.get("tool_call_id"), where), Message("observation", text, learn=learn)]
            continue
        if waiting:
            raise RecordError(
                "call without a result", f"{key}[{i}]: the call of '{waiting[0][1].metadata}' has no result"
            )
        if role == "call":
            waiting = [(None, m) for m in call_of_json(text, f"{where}{text_key}", learn)]
            continue
        if text or not calls:
            messages.append(Message(role, text, learn=learn))  # type: ignore[arg-type]
        for identity, function in calls:
            waiting += [(identity, m) for m in call_of_json(function, f"{where}tool_calls", learn)]
    messages += [call for _, call in waiting]  # a conversation may end with what is to be called
    return with_tools(messages, record, columns)


def _calls(turn: Mapping[str, Any], where: str) -> list[tuple[str | None, Any]]:
    if turn.get("function_call"):
        return [(None, turn["function_call"])]
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list):
        raise RecordError("tool_calls", f"{where}'tool_calls' is {kind_of(calls)}, expected a list")
    for call in calls:
        if not isinstance(call, dict) or "function" not in call:
            raise RecordError("tool_calls", f"{where}'tool_calls' holds {kind_of(call)} without 'function'")
    return [(call.get("id"), call["function"]) for call in calls]


def _take(waiting: list[tuple[str | None, Message]], identity: Any, where: str) -> Message:
    """The call that this result belongs to: by its id, or the next one."""
    ids = [i for i, _ in waiting]
    if identity is None or ids == [None] * len(ids):
        return waiting.pop(0)[1]
    if identity not in ids:
        known = ", ".join(map(str, ids))
        raise RecordError("unknown call id", f"{where}'tool_call_id' is '{identity}', which was not called ({known})")
    return waiting.pop(ids.index(identity))[1]
