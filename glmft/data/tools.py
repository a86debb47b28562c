"""Tools in ChatGLM3's own form (the published prompt guide, PROMPT.md of THUDM/ChatGLM3).

The system message ends with the tools as JSON; a call is an assistant message whose metadata is the tool's name and
whose content is a Python block `tool_call(key=value)`; its result is an observation.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from glmft.data.records import RecordError, kind_of, shown
from glmft.messages import Message
from glmft.models.tokenizer import TOOLS_PROMPT


def call(name: str, arguments: Mapping[str, Any], learn: bool | None = None) -> Message:
    """An assistant message that calls a tool.

    Raises:
        RecordError: an argument's name cannot be written as a keyword.
    """
    if wrong := [k for k in arguments if not str(k).isidentifier()]:
        raise RecordError("argument name", f"tool '{name}': argument {shown(wrong[0])} is not a plain name")
    inside = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
    return Message("assistant", f"```python\ntool_call({inside})\n```", name, learn=learn)


def arguments_of(content: str) -> dict[str, Any] | None:
    """What `call` was given, or None where the content is not such a block of plain values."""
    code = content.strip().removeprefix("```python").removesuffix("```").strip()
    try:
        node = ast.parse(code, mode="eval").body
        if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
            return None
        found = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        json.dumps(found, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return found


def call_of_json(value: Any, where: str, learn: bool | None = None) -> list[Message]:
    """Calls written as JSON text or object {"name", "arguments"}, or a list of them.

    Raises:
        RecordError: not JSON, or not of that form.
    """
    value = _parsed(value, "tool call", where)
    items = value if isinstance(value, list) else [value]
    if not items:
        raise RecordError("tool call", f"{where}: an empty list, expected a call")
    return [_call(item, where, learn) for item in items]


def _call(item: Any, where: str, learn: bool | None) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not item["name"].strip():
        raise RecordError("tool call", f'{where}: {shown(item)}, expected {{"name": ..., "arguments": {{...}}}}')
    arguments = _parsed(item.get("arguments", {}) or {}, "tool arguments", f"{where}: arguments of '{item['name']}'")
    if not isinstance(arguments, dict):
        raise RecordError(
            "tool arguments",
            f"{where}: arguments of '{item['name']}' are {kind_of(arguments)}, expected an object",
        )
    return call(item["name"], arguments, learn)


def tools_of(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Declared tools, as a list or JSON text; OpenAI's {"type": "function", "function": {...}} is unwrapped.

    Raises:
        RecordError: not JSON, not a list, or a tool without a name.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    value = _parsed(value, "tools", f"'{where}'")
    if not isinstance(value, list):
        raise RecordError("tools", f"'{where}' is {kind_of(value)}, expected a list of tools")
    tools = [t["function"] if isinstance(t, dict) and isinstance(t.get("function"), dict) else t for t in value]
    for tool in tools:
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise RecordError("tool without a name", f"'{where}' holds {shown(tool)}, expected an object with 'name'")
    return tools or None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _parsed(value: Any, kind: str, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError) as e:
        raise RecordError(f"{kind} not JSON", f"{where} is not valid JSON ({e}): {shown(value)}") from None


def with_tools(messages: Sequence[Message], record: Mapping[str, Any], columns: Mapping[str, str]) -> list[Message]:
    """The messages with the record's tools in the system message, which is put in front where there is none.

    Raises:
        RecordError: see `tools_of`.
    """
    key = columns.get("tools", "tools")
    tools = tools_of(record.get(key), key)
    if not tools:
        return list(messages)
    if messages and messages[0].role == "system":
        return [Message("system", messages[0].content, tools=tools, learn=messages[0].learn), *messages[1:]]
    return [Message("system", TOOLS_PROMPT, tools=tools), *messages]
