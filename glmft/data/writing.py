"""Conversations -> records of a format that other tools read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from glmft.data.records import RecordError
from glmft.data.tools import arguments_of
from glmft.messages import Conversation, Message
from glmft.models.tokenizer import TOOLS_PROMPT


def _parts(conversation: Conversation) -> tuple[str, Any, list[Message]]:
    """(system text, tools, the other messages); the text that `with_tools` puts in by itself is left out again. A
    system message that is more than text stays among the messages."""
    first, *rest = conversation.messages
    for before, message in zip([None, *rest], [*rest, None], strict=True):
        if before and before.metadata and before.role != "assistant":
            raise RecordError("metadata", f"the {before.role}'s message has metadata '{before.metadata}'")
        if before and message and _is_call(before) and message.role != "observation":
            raise RecordError("call", f"the call of '{before.metadata}' has no result")
    if first.role != "system":
        return "", None, [first, *rest]
    if first.tools and first.content == TOOLS_PROMPT and first.learn is None:
        return "", first.tools, rest
    if first.learn is not None or not first.content:
        return "", first.tools, [first, *rest]
    return first.content, first.tools, rest


def _is_call(message: Message) -> bool:
    return message.role == "assistant" and bool(message.metadata)


def _arguments(message: Message) -> dict[str, Any]:
    arguments = arguments_of(message.content)
    if arguments is None:
        raise RecordError("call", f"the call of '{message.metadata}' has no plain named arguments: {message.content}")
    return arguments


def _flag(message: Message, key: str, value: Any) -> dict[str, Any]:
    return {} if message.learn is None else {key: value(message.learn)}


def alpaca(conversation: Conversation) -> dict[str, Any]:
    """instruction, input, output, with history and system.

    Raises:
        RecordError: it uses tools, or flags of its own.
    """
    system, tools, messages = _parts(conversation)
    roles = [m.role for m in messages]
    if tools or any(m.metadata for m in messages) or roles != ["user", "assistant"] * (len(roles) // 2):
        raise RecordError(
            "tools", "alpaca records hold questions and answers in turn only; use --to sharegpt or openai"
        )
    if any(m.learn is not None for m in messages):
        raise RecordError("flags", "alpaca records have no train flag per message; use --to sharegpt or openai")
    texts = [m.content for m in messages]
    record: dict[str, Any] = {"instruction": texts[-2], "input": "", "output": texts[-1]}
    if len(texts) > 2:
        record["history"] = [list(pair) for pair in zip(texts[:-2:2], texts[1:-2:2], strict=True)]
    return record | ({"system": system} if system else {})


def sharegpt(conversation: Conversation) -> dict[str, Any]:
    """conversations of from and value, with system and tools."""
    system, tools, messages = _parts(conversation)
    names = {"system": "system", "user": "human", "assistant": "gpt", "observation": "observation"}
    turns = []
    for m in messages:
        flag = _flag(m, "train", bool)
        if _is_call(m):
            call = json.dumps({"name": m.metadata, "arguments": _arguments(m)}, ensure_ascii=False)
            turns.append({"from": "function_call", "value": call} | flag)
        else:
            turns.append({"from": names[m.role], "value": m.content} | flag)
    record: dict[str, Any] = {"conversations": turns}
    if system:
        record["system"] = system
    return record | ({"tools": json.dumps(tools, ensure_ascii=False)} if tools else {})


def openai(conversation: Conversation) -> dict[str, Any]:
    """messages of role and content, with tool_calls and tools."""
    system, tools, messages = _parts(conversation)
    out: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    calls = 0
    for m in messages:
        flag = _flag(m, "weight", int)
        if _is_call(m):
            calls += 1
            function = {"name": m.metadata, "arguments": json.dumps(_arguments(m), ensure_ascii=False)}
            call = {"id": f"call_{calls}", "type": "function", "function": function}
            out.append({"role": "assistant", "content": None, "tool_calls": [call]} | flag)
        elif m.role == "observation":
            out.append({"role": "tool", "content": m.content, "tool_call_id": f"call_{calls}"} | flag)
        else:
            out.append({"role": m.role, "content": m.content} | flag)
    record: dict[str, Any] = {"messages": out}
    return record | ({"tools": [{"type": "function", "function": t} for t in tools]} if tools else {})


WRITERS: dict[str, Callable[[Conversation], dict[str, Any]]] = {f.__name__: f for f in (alpaca, sharegpt, openai)}
