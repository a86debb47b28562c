"""glmft serve: base and adapters behind OpenAI's chat API, for this machine and its programs. In production, serve an
export with vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import importlib.util
import json
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval, Len
from pydantic import BaseModel, ValidationError

from glmft.caches import use_cache_dir
from glmft.data.formats import openai
from glmft.data.records import RecordError
from glmft.data.tools import arguments_of
from glmft.errors import GlmftError, ResourceError, UserError
from glmft.messages import Message
from glmft.quiet import quiet_libraries

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from glmft.engine import Engine, Reply, Sampling

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST_BODY = 2**20  # bytes
TOGETHER = 0.01  # seconds that a request waits for others to share its batch
DEFAULT_TOKENS = 512
COLDEST = 1e-3  # temperature below which logits would overflow; the choice is greedy there


# ---- what a request may hold


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
        raise Refused(
            400, "; ".join(told), param=str(e.errors()[0]["loc"][0]) if e.errors()[0]["loc"] else None
        ) from None
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


# ---- answering


@dataclass
class Job:
    """A request on its way: what is asked, and where its events go: text, then one `Done` or an exception."""

    voice: str
    messages: list[Message]
    sampling: Sampling
    stops: tuple[str, ...]
    whole: bool  # nothing is sent before the end, since the answer may be a call
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    count: int = 0
    sent: str = ""
    cut: str | None = None  # the text up to a stop word

    def say(self, event: Any) -> None:
        """From the thread of the engine."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def hear(self, message: Message) -> bool:
        """One more token was said; false where that was enough."""
        self.count += 1
        text = message.content
        at = min((i for s in self.stops if (i := text.find(s)) >= 0), default=-1)
        if at >= 0:
            self.cut = text[:at]
            return False
        held = max((len(s) for s in self.stops), default=1) - 1  # may become a stop word
        ready = text[: len(text) - held] if held else text
        ready = ready.rstrip("\ufffd")  # half a character
        if not self.whole and not self.cancelled and len(ready) > len(self.sent):
            self.say(ready[len(self.sent) :])
            self.sent = ready
        return not self.cancelled and self.count < self.sampling.max_new_tokens


@dataclass(frozen=True)
class Done:
    """How an answer ended."""

    rest: str
    reason: str
    tokens: int
    message: Message


class Worker(threading.Thread):
    """Answers jobs in batches: those that come together and are chosen alike share one.

    Args:
        engine: the voices.
        waiting: jobs that may wait; more are refused.
        rows: of a batch.
    """

    def __init__(self, engine: Engine, waiting: int = 64, rows: int = 32) -> None:
        super().__init__(daemon=True)
        self.engine, self.rows = engine, rows
        self.jobs: queue.Queue[Job | None] = queue.Queue(waiting)
        self.active: list[Job] = []

    def run(self) -> None:
        held: list[Job] = []
        while True:
            job = held.pop(0) if held else self.jobs.get()
            if job is None:
                return
            end = time.monotonic() + TOGETHER
            while len(held) < 4 * self.rows:
                try:
                    found = self.jobs.get(timeout=max(0.0, end - time.monotonic()))
                except queue.Empty:
                    break
                if found is None:
                    return
                held.append(found)
            batch = [job, *(j for j in held if _alike(job, j))][: self.rows]
            held = [j for j in held if j not in batch]
            self._answer([j for j in batch if not j.cancelled])

    def _answer(self, batch: list[Job]) -> None:
        if not batch:
            return
        self.active = batch
        longest = max(j.sampling.max_new_tokens for j in batch)
        sampling = replace(batch[0].sampling, max_new_tokens=longest)
        try:
            replies = self.engine.reply([(j.voice, j.messages) for j in batch], sampling, lambda i, m: batch[i].hear(m))
            for job, reply in zip(batch, replies, strict=True):
                job.say(_done(job, reply))
        except Exception as e:  # the server goes on; each client is told
            for job in batch:
                job.say(e)
        self.active = []


def _alike(a: Job, b: Job) -> bool:
    """Whether two may share a batch: greedy ones, and those chosen alike without a seed."""
    same = replace(a.sampling, max_new_tokens=1) == replace(b.sampling, max_new_tokens=1)
    return same and (a.sampling.temperature == 0 or a.sampling.seed is None)


def _done(job: Job, reply: Reply) -> Done:
    message = reply.message
    if job.cut is not None:
        message = Message("assistant", job.cut, message.metadata)
    reason = "length" if reply.stopped != "end" and job.cut is None else "stop"
    return Done(message.content[len(job.sent) :], reason, job.count + (reply.stopped == "end"), message)


# ---- the server


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
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.routing import Route

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
        from starlette.responses import JSONResponse

        alive = self.worker.is_alive()
        told = {
            "status": "ok" if alive else "failed",
            "waiting": self.worker.jobs.qsize(),
            "active": len(self.worker.active),
        }
        return JSONResponse(told, 200 if alive else 503)

    async def models(self, request: Request) -> Response:
        """The voices."""
        from starlette.responses import JSONResponse

        self.check_key(request)
        data = [{"id": n, "object": "model", "created": self.began, "owned_by": "glmft"} for n in self.engine.names]
        return JSONResponse({"object": "list", "data": data})

    async def chat(self, request: Request) -> Response:
        """One completion, at once or as it comes."""
        from starlette.responses import JSONResponse, StreamingResponse

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
            return StreamingResponse(_stream(job, head, prompt, with_usage), media_type="text/event-stream")
        done = await _wait(job, request)
        message, reason = _message(done, bool(asked.tools))
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": _usage(prompt, done)})

    def job(self, asked: ChatRequest) -> Job:
        """Raises:
        Refused: an unknown model, or messages that cannot be used.
        """
        from glmft.engine import Sampling

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
        return Job(asked.model, messages, sampling, stops, bool(asked.tools), asyncio.get_running_loop())


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
        if isinstance(event, Done):
            return Done(job.sent + event.rest, event.reason, event.tokens, event.message)
        if isinstance(event, Exception):
            raise _failure(event)


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
        return {"role": "assistant", "content": done.rest if not with_tools else done.message.content}, done.reason
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls"


def _usage(prompt: int, done: Done) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": done.tokens, "total_tokens": prompt + done.tokens}


async def _stream(job: Job, head: dict[str, Any], prompt: int, with_usage: bool) -> AsyncIterator[str]:
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
                yield f"data: {json.dumps(_error(refused))}\n\n"
                return
            else:
                message, reason = _message(found, job.whole)
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


def _error(refused: Refused) -> dict[str, Any]:
    kind = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
    told = {"message": str(refused), "type": kind.get(refused.status, "invalid_request_error")}
    return {"error": told | {"param": refused.param, "code": refused.code}}


async def _refusal(request: Request, e: Exception) -> Response:
    from starlette.responses import JSONResponse

    assert isinstance(e, Refused)
    return JSONResponse(_error(e), e.status, {"Retry-After": "1"} if e.status == 429 else None)


async def _not_found(request: Request, e: Exception) -> Response:
    from starlette.responses import JSONResponse

    status = int(getattr(e, "status_code", 404))
    return JSONResponse(_error(Refused(status, f"there is no {request.method} {request.url.path[:200]}")), status)


# ---- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or that of the error."""
    parser = argparse.ArgumentParser(prog="glmft serve", description=__doc__)
    parser.add_argument("sources", nargs="+", help="runs, adapter folders or models; each is a model name, with 'base'")
    parser.add_argument("--host", default="127.0.0.1", help="another than this machine's own needs an API key")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--api-key", help="what clients must send; or GLMFT_API_KEY, which no list of processes shows")
    parser.add_argument("--max-waiting", type=int, default=64, help="requests that may wait; more get 429")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--model", help="base model: folder or hub id (default: what the adapter was trained on)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    key = options.api_key or os.environ.get("GLMFT_API_KEY")
    try:
        check(options.host, options.port, key, options.max_waiting, options.batch_size)
        use_cache_dir()
        quiet_libraries()
        from glmft.engine import Engine, find_tuned

        engine = Engine([find_tuned(s, options.model) for s in options.sources], options.dtype, options.device)
        serve(Server(engine, key, options.max_waiting, options.batch_size), options.host, options.port)
    except GlmftError as e:
        print(f"glmft: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        return 0
    return 0


def check(host: str, port: int, key: str | None, waiting: int, rows: int) -> None:
    """Raises:
    UserError: another host without a key, or a number below 1.
    ResourceError: the extra `serve` is not installed.
    """
    if host not in LOOPBACK and not key:
        raise UserError(f"--host {host}: reachable from elsewhere, which needs --api-key (or GLMFT_API_KEY)")
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: must be 0 to 65535")
    if min(waiting, rows) < 1:
        raise UserError("--max-waiting and --batch-size must be 1 or more")
    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise ResourceError("glmft serve needs starlette and uvicorn: pip install 'glmft[serve]'")


def serve(server: Server, host: str, port: int) -> None:
    """Until a signal; open answers have ten seconds to end.

    Raises:
        UserError: the port is taken.
    """
    import socket

    import uvicorn

    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as e:
        raise UserError(f"--host {host} --port {port}: {e.strerror}; another port, or 0 for a free one") from None
    port = listening.getsockname()[1]
    hosts = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
    config = uvicorn.Config(
        server.app(hosts), log_level="warning", access_log=False, timeout_graceful_shutdown=10, timeout_keep_alive=5
    )
    print(f"glmft: http://{host}:{port}/v1 answers as {', '.join(server.engine.names)}; Ctrl-C ends", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    sys.exit(main())
