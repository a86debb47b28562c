"""The words of the data path: Message, Conversation, Sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

IGNORE_INDEX = -100
Role = Literal["system", "user", "assistant", "observation"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    `metadata` is the tool's name of an assistant call; `tools` belong to a system message; `learn` says whether the
    turn is trained on (None: the assistant's turns are).
    """

    role: Role
    content: str
    metadata: str = ""
    tools: Any = None
    learn: bool | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role is {self.role!r}, allowed are {', '.join(ROLES)}")

    @property
    def learns(self) -> bool:
        """Whether the turn is trained on."""
        return self.role == "assistant" if self.learn is None else self.learn


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order. `source` says where they came from: `file.json: record 7`."""

    messages: tuple[Message, ...]
    source: str = ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last answer."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages

    @property
    def answer(self) -> str:
        """The last answer, or an empty string where the conversation ends with a question."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else ""


@dataclass(slots=True)
class Sample:
    """Token ids of one conversation, length T, and the spans [start, end) of them that are trained on, in order."""

    input_ids: list[int]
    supervised: list[tuple[int, int]]
    source: str = field(default="", compare=False)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labels(self) -> list[int]:
        """The ids where they are trained on, else -100; length T."""
        labels = [IGNORE_INDEX] * len(self.input_ids)
        for start, end in self.supervised:
            labels[start:end] = self.input_ids[start:end]
        return labels

    @property
    def num_supervised(self) -> int:
        """Tokens that are predicted in training (the first token of a sample has no prediction)."""
        return sum(end - max(start, 1) for start, end in self.supervised)


def as_messages(messages: Conversation | Sequence[Message | dict[str, Any]]) -> tuple[Message, ...]:
    """Accepts a Conversation, Messages, or dicts with role and content."""
    if isinstance(messages, Conversation):
        return messages.messages
    return tuple(m if isinstance(m, Message) else Message(**m) for m in messages)
