"""The routes of OpenAI's chat API, over a worker."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import queue
import sys
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from glmft.data.tools import arguments_of
from glmft.engine import Engine, Sampling
from glmft.errors import UserError
from glmft.serve.requests import ChatRequest, Refused, error_of, messages_of, parse
from glmft.serve.worker import Done, Job, Worker

LARGEST_BODY = 2**20  # bytes
DEFAULT_TOKENS = 512
COLDEST = 1e-3  # temperature below which logits would overflow; the choice is greedy there


class Server:
    """The routes, over a worker.

    Args:
        engine: the voices, which are the model names.
        key: what clients must send as a bearer token, if anything.
        waiting: requests that may wait; more get 429.
        rows: of a batch.
    """

    def __init__(self, engine: Engine, key: str | None = None, waiting: int = 64, rows: int = 32) -> None:
        self.engine = engine
        self.worker = Worker(engine, waiting, rows)
        self.digest = hashlib.sha256(key.encode()).digest() if key else None
        self.began = int(time.time())
        self.worker.start()

    def app(self, hosts: Sequence[str]) -> Starlette:
        """The application; requests for other host names are refused."""
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)],
            exception_handlers={Refused: _refusal, 404: _not_found, 405: _not_found},
        )

    def check_key(self, request: Request) -> None:
        """Raises:
        Refused: 401, the key is missing or wrong; 403, a page of another origin asks.
        """
        origin = request.headers.get("origin")
        if origin and origin.partition("://")[2] != request.headers.get("host"):
            raise Refused(403, f"requests from {origin[:100]} are not answered")
        sent = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.digest and not hmac.compare_digest(hashlib.sha256(sent).digest(), self.digest):
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    async def health(self, request: Request) -> Response:
        """Whether it answers, and how busy it is."""
        alive = self.worker.is_alive()
        told = {
            "status": "ok" if alive else "failed",
            "waiting": self.worker.jobs.qsize(),
            "active": len(self.worker.active),
        }
        return JSONResponse(told, 200 if alive else 503)

    async def models(self, request: Request) -> Response:
        """The voices."""
        self.check_key(request)
        data = [{"id": n, "object": "model", "created": self.began, "owned_by": "glmft"} for n in self.engine.names]
        return JSONResponse({"object": "list", "data": data})

    async def chat(self, request: Request) -> Response:
        """One completion, at once or as it comes."""
        self.check_key(request)
        asked = parse(await _body(request))
        job = self.job(asked)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        prompt = len(self.engine.tokenizer.encode_prompt(job.messages))
        if prompt >= self.engine.limit:
            says = f"the conversation is {prompt} tokens long, the model reads {self.engine.limit}"
            raise Refused(400, says, param="messages", code="context_length_exceeded")
        try:
            self.worker.jobs.put_nowait(job)
        except queue.Full:
            raise Refused(429, "too many requests are waiting; try again later", code="rate_limit_exceeded") from None
        if asked.stream:
            with_usage = bool((asked.stream_options or {}).get("include_usage"))
            events = _stream(job, head, prompt, bool(asked.tools), with_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        done = await _wait(job, request)
        message, reason = _message(done, bool(asked.tools))
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": _usage(prompt, done)})

    def job(self, asked: ChatRequest) -> Job:
        """Raises:
        Refused: an unknown model, or messages that cannot be used.
        """
        if asked.model not in self.engine.names:
            known = ", ".join(self.engine.names)
            raise Refused(
                404, f"the model '{asked.model[:200]}' does not exist; there are {known}", "model", "model_not_found"
            )
        messages = messages_of(asked)
        limit = asked.max_completion_tokens or asked.max_tokens or DEFAULT_TOKENS
        temperature = asked.temperature if asked.temperature >= COLDEST else 0.0
        sampling = Sampling(limit, temperature, asked.top_p, seed=asked.seed if temperature else None)
        stops = tuple(s for s in ([asked.stop] if isinstance(asked.stop, str) else asked.stop or ()) if s)
        stream = asked.stream and not asked.tools  # an answer that may be a call is sent whole
        return Job(asked.model, messages, sampling, stops, stream, asyncio.get_running_loop())


async def _body(request: Request) -> bytes:
    """Raises:
    Refused: 413, larger than a conversation can be.
    """
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > LARGEST_BODY:
            raise Refused(413, f"the body is larger than {LARGEST_BODY} bytes")
    return content


async def _wait(job: Job, request: Request) -> Done:
    """The end of an answer; a client that left is not waited for."""
    while True:
        try:
            event = await asyncio.wait_for(job.events.get(), 0.2)
        except TimeoutError:
            if await request.is_disconnected():
                job.cancelled = True
                raise Refused(499, "the client left") from None
            continue
        if isinstance(event, Exception):
            raise _failure(event)
        assert isinstance(event, Done)
        return event


def _failure(e: Exception) -> Refused:
    if isinstance(e, UserError):
        return Refused(400, str(e))
    print(f"glmft: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
    return Refused(500, "the model failed; the server's log says why", code="internal_error")


def _message(done: Done, with_tools: bool) -> tuple[dict[str, Any], str]:
    """The assistant's message, with `tool_calls` where it calls a tool."""
    name = done.message.metadata
    arguments = arguments_of(done.message.content) if with_tools and name else None
    if arguments is None:
        return {"role": "assistant", "content": done.rest}, done.reason
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls"


def _usage(prompt: int, done: Done) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": done.tokens, "total_tokens": prompt + done.tokens}


async def _stream(
    job: Job, head: dict[str, Any], prompt: int, with_tools: bool, with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events; when the client leaves, the row ends."""

    def event(delta: dict[str, Any] | None, reason: str | None = None, **more: Any) -> str:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason}]
        told = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(told, ensure_ascii=False)}\n\n"

    try:
        yield event({"role": "assistant", "content": ""})
        while True:
            found = await job.events.get()
            if isinstance(found, str):
                yield event({"content": found})
            elif isinstance(found, Exception):
                refused = _failure(found)
                yield f"data: {json.dumps(error_of(refused))}\n\n"
                return
            else:
                message, reason = _message(found, with_tools)
                if "tool_calls" in message:
                    yield event({"tool_calls": [{"index": 0, **message["tool_calls"][0]}]})
                elif message["content"]:
                    yield event({"content": message["content"]})
                yield event({}, reason)
                if with_usage:
                    yield event(None, usage=_usage(prompt, found))
                yield "data: [DONE]\n\n"
                return
    finally:
        job.cancelled = True


async def _refusal(request: Request, e: Exception) -> Response:
    assert isinstance(e, Refused)
    return JSONResponse(error_of(e), e.status, {"Retry-After": "1"} if e.status == 429 else None)


async def _not_found(request: Request, e: Exception) -> Response:
    status = int(getattr(e, "status_code", 404))
    return JSONResponse(error_of(Refused(status, f"there is no {request.method} {request.url.path[:200]}")), status)
