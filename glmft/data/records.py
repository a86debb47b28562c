"""What is wrong with a record, and the checks that every format shares."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from glmft.errors import nearest
from glmft.messages import Message

KINDS: dict[type, str] = {
    **{type(None): "null", bool: "true or false", int: "a number", float: "a number"},
    **{str: "text", list: "a list", dict: "an object"},
}
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class RecordError(ValueError):
    """A record that cannot be trained on: which key, what came, what is allowed. `kind` names the sort of problem."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message.encode("utf-8", "backslashreplace").decode())  # half of a surrogate pair is no text
        self.kind = kind

    def __reduce__(self) -> Any:
        return RecordError, (self.kind, str(self))


def kind_of(value: Any) -> str:
    """`a list`, `null`, ..."""
    return KINDS.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """The value as JSON, cut to 40 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:40] + "..."


def text_of(record: Mapping[str, Any], key: str, where: str = "", required: bool = True) -> str:
    """The text under a key; an optional one may be absent or null. `where` is put before the key in messages.

    Raises:
        RecordError: the key is missing, null or not text.
    """
    value = record.get(key)
    if isinstance(value, str):
        return value
    if value is None and not required:
        return ""
    if key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise RecordError("missing key", f"{where}'{key}' is missing{nearest(key, record)} (its keys: {keys})")
    if value is None:
        raise RecordError("null", f"{where}'{key}' is null, expected text")
    raise RecordError("not text", f"{where}'{key}' is {kind_of(value)} ({shown(value)}), expected text")


def flag_of(message: Mapping[str, Any], where: str) -> bool | None:
    """The per-message `train`, `loss` (THUDM) or `weight` (OpenAI) flag: true or false, 1 or 0; None where absent.

    Raises:
        RecordError: another value.
    """
    for key in ("train", "loss", "weight"):
        value = message.get(key)
        if value is None:
            continue
        if value in (0, 1):
            return bool(value)
        raise RecordError("training flag", f"{where}'{key}' is {shown(value)}, expected true or false")
    return None


def turns_of(record: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The list of message objects under a key.

    Raises:
        RecordError: missing, not a list, empty, or an item that is not an object.
    """
    value = record.get(key)
    if key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise RecordError("missing key", f"'{key}' is missing{nearest(key, record)} (its keys: {keys})")
    if not isinstance(value, list):
        raise RecordError("not a list of messages", f"'{key}' is {kind_of(value)}, expected a list of messages")
    if not value:
        raise RecordError("no messages", f"'{key}' is an empty list")
    for i, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise RecordError("message not an object", f"{key}[{i}] is {kind_of(turn)}, expected an object")
    return value


def turns_have(record: Mapping[str, Any], key: str) -> bool:
    """Whether the record's `conversations` hold a message with this key."""
    turns = record.get("conversations")
    return isinstance(turns, list) and any(isinstance(t, dict) and key in t for t in turns)


def roles_of(own: Mapping[str, tuple[str, str]], tags: Mapping[str, str]) -> dict[str, str]:
    """Names in the file -> roles, from {tag: (the format's own name, role)} and the names that an entry gives."""
    return {tags.get(tag, name): role for tag, (name, role) in own.items()}


def role_of(turn: Mapping[str, Any], key: str, roles: Mapping[str, str], where: str) -> str:
    """The role, translated by `roles`.

    Raises:
        RecordError: it is missing or not one of them.
    """
    name = text_of(turn, key, where)
    if name not in roles:
        allowed = ", ".join(roles)
        raise RecordError("unknown role", f"{where}'{key}' is '{name}'{nearest(name, roles)}; allowed: {allowed}")
    return roles[name]


def check(messages: Sequence[Message]) -> None:
    """Order of roles, tool calls and text of a whole conversation.

    Raises:
        RecordError: it could not be trained on as it stands.
    """
    declared = {str(t.get("name")) for m in messages if m.tools for t in m.tools if isinstance(t, dict)}
    before: Message | None = None
    for i, message in enumerate(messages, start=1):
        if message.role == "system":
            if i > 1:
                raise RecordError("system not first", f"message {i} is a system message, allowed only as the first")
        else:
            _check_turn(i, message, before)
            if message.metadata:
                _check_call(i, message, declared)
            elif not message.content.strip() and message.role != "observation":
                what = "answer" if message.role == "assistant" else "question"
                raise RecordError(f"empty {what}", f"message {i} is an empty {what}")
            before = message
        _check_text(message.content, f"message {i} ({message.role})")
        if message.metadata:
            _check_text(message.metadata, f"metadata of message {i}")
        if message.tools:
            _check_text(json.dumps(message.tools, ensure_ascii=False), "tools")
    if before is None or before.role != "assistant":
        role = "system message" if before is None else before.role
        raise RecordError("no answer at the end", f"ends with the {role}: the last message must be an answer to learn")


def _check_text(text: str, where: str) -> None:
    if found := CONTROL.search(text):
        what = "half of a surrogate pair" if found.group() >= "\ud800" else "a control character"
        code = f"U+{ord(found.group()):04X}"
        raise RecordError(what, f"{where}, character {found.start() + 1}: {what} ({code}), which is no text; remove it")


def _check_turn(i: int, message: Message, before: Message | None) -> None:
    if message.role == "user" and before is not None and before.role != "assistant":
        raise RecordError(
            "user out of order", f"message {i} is the user's, after the {before.role}; an answer must stand between"
        )
    if message.role == "assistant" and before is None:
        raise RecordError("answer first", f"message {i} is an answer to nothing; a user message must come first")
    if message.role == "observation" and not (before and before.role == "assistant" and before.metadata):
        raise RecordError("observation without a call", f"message {i} is an observation, but no tool was called")


def _check_call(i: int, message: Message, declared: set[str]) -> None:
    if message.role == "assistant" and message.metadata != "interpreter" and message.metadata not in declared:
        if not declared:
            raise RecordError(
                "tool call without tools", f"message {i} calls '{message.metadata}', but the record declares no 'tools'"
            )
        raise RecordError(
            "unknown tool",
            f"message {i} calls '{message.metadata}'{nearest(message.metadata, declared)}; "
            f"declared: {', '.join(sorted(declared))}",
        )
