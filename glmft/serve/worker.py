"""Jobs from many clients, answered in batches by one thread."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from glmft.messages import Message

if TYPE_CHECKING:
    from glmft.engine import Engine, Reply, Sampling

TOGETHER = 0.01  # seconds that a request waits for others to share its batch


@dataclass
class Job:
    """A request on its way: what is asked, and where its events go: text as it comes where it is a `stream`, then one
    `Done` or an exception."""

    voice: str
    messages: list[Message]
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
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
        if self.stream and not self.cancelled and len(ready) > len(self.sent):
            self.say(ready[len(self.sent) :])
            self.sent = ready
        return not self.cancelled and self.count < self.sampling.max_new_tokens


@dataclass(frozen=True)
class Done:
    """How an answer ended. `rest` is what of it was not sent yet."""

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
        self.jobs: queue.Queue[Job] = queue.Queue(waiting)
        self.active: list[Job] = []

    def run(self) -> None:
        """For ever: the first job that waits, and what may share its batch."""
        held: list[Job] = []
        while True:
            job = held.pop(0) if held else self.jobs.get()
            end = time.monotonic() + TOGETHER
            while len(held) < 4 * self.rows:
                try:
                    held.append(self.jobs.get(timeout=max(0.0, end - time.monotonic())))
                except queue.Empty:
                    break
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
