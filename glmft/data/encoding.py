"""Records -> samples: one chunk at a time, in this process or in several.

Everything that decides the token ids of a data set is in `Policies` and `DatasetEntry`.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from glmft.data.formats import FORMATS
from glmft.data.records import RecordError, check, kind_of
from glmft.data.registry import DatasetEntry
from glmft.errors import UserError
from glmft.messages import Conversation, Message, Sample
from glmft.models.tokenizer import ChatGLM3Tokenizer

OnTooLong = Literal["truncate", "drop", "split_turns", "error"]
OnBadRecord = Literal["error", "drop"]
DAMAGE = {  # what stands in a text whose encoding was damaged before it came here -> pattern
    "replacement character U+FFFD": re.compile("\ufffd|锟斤拷"),
    "mojibake (UTF-8 read as another encoding)": re.compile(
        "[\u00c3\u00c2][\u0080-\u00bf\u20ac\u2018-\u201e\u2122]|\u00e2\u20ac|[\u00e4-\u00e9][\u0080-\u00bf\u0152-\u02dc\u2013-\u203a]{2}"
    ),
}
SUSPECT = re.compile("[\ufffd锟\u00c2\u00c3\u00e2\u00e4-\u00e9]")  # one of these is in every damaged text
FULL = 20  # problems of a chunk whose message is kept
DROPPED = "dropped: "
CUT = "cut at max_length"
SPLIT = "split between turns"
SPLIT_LESS = "split between turns, a turn longer than max_length left out"


@dataclass(frozen=True)
class Policies:
    """What is done with the records of every set. Lengths are tokens; `fill` holds values of {{name}}-style blanks."""

    max_length: int = 2048
    on_too_long: OnTooLong = "truncate"
    on_bad_record: OnBadRecord = "error"
    train_on_prompt: bool = False
    mask_history: bool = False
    fill: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.train_on_prompt and self.mask_history:
            raise UserError("data.train_on_prompt and data.mask_history contradict each other; choose one")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands in a data set: its file's number, its own number in the file (from 1), its line."""

    file: int
    number: int
    line: int | None = None


@dataclass
class Chunk:
    """Samples of some records: ids int32 [tokens], supervised bool [tokens], and per sample: lengths, num_supervised,
    records (position of its record in the data set, from 0) and two hashes uint64: of all ids, of the prompt's ids."""

    ids: np.ndarray
    supervised: np.ndarray
    lengths: np.ndarray
    num_supervised: np.ndarray
    records: np.ndarray
    hashes: np.ndarray
    files: dict[int, int]  # file -> records seen
    problems: list[tuple[Place, str, str]] = field(default_factory=list)  # place, kind, message or ""
    events: list[tuple[Place, str]] = field(default_factory=list)  # dropped, cut, damaged


class TooLong(ValueError):
    """Raised where the policy is "error"."""


def conversation_of(
    value: Any, entry: DatasetEntry, source: str, fill: Mapping[str, str] | None = None
) -> Conversation:
    """The conversation of a record, checked.

    Raises:
        RecordError: it cannot be trained on.
    """
    if isinstance(value, RecordError):
        raise value
    if not isinstance(value, dict):
        raise RecordError("record not an object", f"is {kind_of(value)}, expected an object")
    messages = FORMATS[entry.formatting].convert(value, entry.columns, entry.tags)
    if fill:
        messages = [_filled(m, fill) for m in messages]
    check(messages)
    return Conversation(tuple(messages), source)


def _filled(message: Message, fill: Mapping[str, str]) -> Message:
    if "{{" not in message.content:
        return message
    text = message.content
    for name, value in fill.items():
        text = text.replace("{{" + name + "}}", value)
    return replace(message, content=text)


def supervise(conversation: Conversation, train_on_prompt: bool, mask_history: bool) -> Conversation:
    """Says for each message whether it is learned; flags of the records themselves stay as they are."""
    if not train_on_prompt and not mask_history:
        return conversation
    messages = conversation.messages
    last = max(i for i, m in enumerate(messages) if m.role in ("user", "system"))
    learns = [
        m.learn if m.learn is not None else train_on_prompt or (m.learns and (not mask_history or i > last))
        for i, m in enumerate(messages)
    ]
    return replace(conversation, messages=tuple(replace(m, learn=x) for m, x in zip(messages, learns, strict=True)))


def limit_length(
    sample: Sample, conversation: Conversation, tokenizer: ChatGLM3Tokenizer, max_length: int, policy: OnTooLong
) -> tuple[list[Sample], str]:
    """(samples within `max_length` tokens, what was done): no sample where the record is dropped.

    A cut answer never ends with </s>, and nothing stands behind the last token that is learned.

    Raises:
        TooLong: it is too long and the policy is "error".
    """
    if len(sample) <= max_length:
        return ([sample], "") if sample.num_supervised else ([], DROPPED + "nothing in it is to be learned")
    if policy == "error":
        raise TooLong(f"{len(sample)} tokens, data.max_length={max_length}; raise it, or choose another on_too_long")
    if policy == "drop":
        return [], DROPPED + "longer than max_length"
    if policy == "split_turns":
        parts, left_out = _split(conversation, tokenizer, max_length)
        parts = [s for s in parts if s.num_supervised]
        if not parts:
            return [], DROPPED + "a single turn is longer than max_length"
        return parts, SPLIT_LESS if left_out else SPLIT
    answer = sample.input_ids.index(tokenizer.role_ids["assistant"]) + 1
    spans = [(s, min(e, max_length)) for s, e in sample.supervised if s < max_length]
    if not spans or spans[-1][1] <= answer:
        return [], DROPPED + "no answer token left within max_length"
    return [Sample(sample.input_ids[: spans[-1][1]], spans, sample.source)], CUT


def _split(conversation: Conversation, tokenizer: ChatGLM3Tokenizer, max_length: int) -> tuple[list[Sample], int]:
    """(samples of as many whole rounds as fit, rounds that fit into none). A round is a question and all that answers
    it; every sample has the system message."""
    system = [m for m in conversation.messages if m.role == "system"]
    rounds: list[list[Message]] = []
    for message in conversation.messages[len(system) :]:
        if message.role == "user":
            rounds.append([])
        rounds[-1].append(message)

    def encoded(turns: Sequence[Message]) -> Sample:
        return tokenizer.encode_conversation(Conversation((*system, *turns), conversation.source))

    fitting = [r for r in rounds if len(encoded(r)) <= max_length]
    groups: list[list[Message]] = []
    for turns in fitting:
        if groups and len(encoded([*groups[-1], *turns])) <= max_length:
            groups[-1] += turns
        else:
            groups.append(list(turns))
    return [encoded(g) for g in groups], len(rounds) - len(fitting)


def encode_chunk(
    records: Sequence[tuple[int, Place, Any]], entry: DatasetEntry, policies: Policies, tokenizer: ChatGLM3Tokenizer
) -> Chunk:
    """The samples of (position, place, record) triples, with everything that was noticed on the way."""
    fill = dict(policies.fill)
    conversations: list[Conversation] = []
    where: list[tuple[int, Place]] = []
    problems: list[tuple[Place, str, str]] = []
    events: list[tuple[Place, str]] = []
    for position, place, value in records:
        try:
            conversation = conversation_of(value, entry, "", fill)
        except RecordError as e:
            problems.append((place, e.kind, str(e) if len(problems) < FULL else ""))
            continue
        conversations.append(supervise(conversation, policies.train_on_prompt, policies.mask_history))
        where.append((position, place))
    kept: list[tuple[int, Sample]] = []
    encoded = tokenizer.encode_conversations(conversations)
    for (position, place), conversation, sample in zip(where, conversations, encoded, strict=True):
        events += [(place, kind) for kind in damage(conversation)]
        try:
            samples, event = limit_length(sample, conversation, tokenizer, policies.max_length, policies.on_too_long)
        except TooLong as e:
            problems.append((place, "too long", str(e) if len(problems) < FULL else ""))
            continue
        if event:
            events.append((place, event))
        kept += [(position, s) for s in samples]
    files = Counter(place.file for _, place, _ in records)
    return _as_arrays(kept, tokenizer.role_ids["assistant"], files, problems, events)


def damage(conversation: Conversation) -> list[str]:
    """Kinds of damage that the encoding of the text has suffered, as far as they leave marks."""
    texts = [m.content for m in conversation.messages if SUSPECT.search(m.content)]
    return [kind for kind, pattern in DAMAGE.items() if any(pattern.search(t) for t in texts)]


def _as_arrays(
    kept: Sequence[tuple[int, Sample]], assistant: int, files: Counter[int], problems: Any, events: Any
) -> Chunk:
    flat = array("i")
    hashes = np.empty((len(kept), 2), np.uint64)
    lengths = np.fromiter((len(s) for _, s in kept), np.int32, len(kept))
    supervised = np.zeros(int(lengths.sum()), bool)
    start = 0
    for i, (_, sample) in enumerate(kept):
        flat.fromlist(sample.input_ids)
        for a, b in sample.supervised:
            supervised[start + a : start + b] = True
        data = memoryview(flat)[start:].tobytes()
        prompt = _behind_last(sample.input_ids, assistant)
        hashes[i] = digest(data), digest(data[: 4 * prompt])
        start += len(sample)
    return Chunk(
        ids=np.frombuffer(flat, np.int32),
        supervised=supervised,
        lengths=lengths,
        num_supervised=np.fromiter((s.num_supervised for _, s in kept), np.int32, len(kept)),
        records=np.fromiter((r for r, _ in kept), np.int64, len(kept)),
        hashes=hashes,
        files=dict(files),
        problems=problems,
        events=events,
    )


def _behind_last(ids: Sequence[int], wanted: int) -> int:
    """Position behind the last occurrence, 0 where there is none."""
    return next((i + 1 for i in range(len(ids) - 1, -1, -1) if ids[i] == wanted), 0)


def digest(data: bytes) -> int:
    """64 bits that tell texts apart."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
