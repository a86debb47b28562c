"""What a request may hold, in OpenAI's form, and what is said where it cannot be answered."""

from __future__ import annotations

import json
from typing import Annotated, Any

from annotated_types import Interval, Len
from pydantic import BaseModel, ValidationError

from glmft.data.formats import openai
from glmft.data.records import RecordError
from glmft.messages import Message


class ChatRequest(BaseModel):
    """The part of OpenAI's request that is read; what is not named here is ignored."""

    model: str
    messages: Annotated[list[dict[str, Any]], Len(1)]
    max_tokens: Annotated[int, Interval(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Interval(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Interval(ge=0, le=2)] = 0.8
    top_p: Annotated[float, Interval(gt=0, le=1)] = 0.8
    n: Annotated[int, Interval(ge=1, le=1)] = 1
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    stop: str | Annotated[list[str], Len(0, 16)] | None = None
    seed: Annotated[int, Interval(ge=0, lt=2**63)] | None = None
    tools: list[dict[str, Any]] | None = None


class Refused(Exception):
    """A request that gets an error of OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def parse(body: bytes) -> ChatRequest:
    """Raises:
    Refused: not JSON, or a value that is not allowed; all are named.
    """
    try:
        return ChatRequest.model_validate(json.loads(body))
    except ValidationError as e:
        told = [f"{'.'.join(map(str, error['loc'])) or 'body'}: {error['msg']}" for error in e.errors()[:20]]
        where = e.errors()[0]["loc"]
        raise Refused(400, "; ".join(told), param=str(where[0]) if where else None) from None
    except (ValueError, RecursionError) as e:
        raise Refused(400, f"the body is not JSON ({str(e).splitlines()[0]})") from None


def messages_of(request: ChatRequest) -> list[Message]:
    """The conversation in ChatGLM3's roles; tools stand in the system message.

    Raises:
        Refused: a role, content or tool that cannot be used.
    """
    if any("\ud800" <= c <= "\udfff" for c in json.dumps(request.messages, ensure_ascii=False)):
        raise Refused(400, "messages: hold half a character (a lone surrogate)", param="messages")
    turns = [{**turn, "content": _text(turn.get("content"), i)} for i, turn in enumerate(request.messages)]
    try:
        messages = openai.convert({"messages": turns, "tools": request.tools}, {}, {})
    except RecordError as e:
        raise Refused(400, str(e), param="messages") from None
    if messages[-1].role not in ("user", "observation"):
        raise Refused(400, "messages: the last one must be the user's or a tool's", param="messages")
    return messages


def _text(content: Any, number: int) -> Any:
    """Content as text: a list of text parts is joined."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
        raise Refused(400, f"messages.{number}.content: only parts of type text are read", param="messages")
    return "".join(p["text"] for p in content)


def error_of(refused: Refused) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
    told = {"message": str(refused), "type": kind.get(refused.status, "invalid_request_error")}
    return {"error": told | {"param": refused.param, "code": refused.code}}
