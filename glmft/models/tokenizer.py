"""The ChatGLM3 tokenizer: SentencePiece for text, control ids inserted by the program and never read from text.

Layout of a conversation (published fine-tuning rule):

    [gMASK] sop  <|user|> metadata \\n content  <|assistant|> metadata \\n content  ...  </s>

Supervised is what follows each <|assistant|> up to and including the token that ends the turn: the next role's
token in the middle, </s> at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from glmft.errors import DamagedError, UserError
from glmft.messages import ROLES, Conversation, Message, Sample, as_messages

CONTROL_TOKENS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
TOOLS_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"
"""The system message that stands before tools where there is none (the published prompt guide)."""


class ChatGLM3Tokenizer:
    """SentencePiece plus nine control ids that follow its last piece (64789 to 64797 in the published model)."""

    def __init__(self, model_file: str | Path) -> None:
        self.model_file = Path(model_file)
        try:
            self.sp = SentencePieceProcessor(model_file=str(model_file))
        except (OSError, RuntimeError) as e:
            raise DamagedError(f"{model_file}: not a SentencePiece model ({e}); fetch tokenizer.model again") from None
        self.num_pieces: int = self.sp.vocab_size()
        self.control_ids = {name: self.num_pieces + i for i, name in enumerate(CONTROL_TOKENS)}
        self.control_names = {i: name for name, i in self.control_ids.items()}
        self.role_ids = {role: self.control_ids[f"<|{role}|>"] for role in ROLES}
        self.eos_id: int = self.sp.eos_id()
        self.pad_id: int = self.sp.unk_id()
        self._newline = self.encode("\n")

    def __len__(self) -> int:
        """Pieces and control tokens; the model's table is padded beyond this."""
        return self.num_pieces + len(CONTROL_TOKENS)

    @property
    def stop_ids(self) -> list[int]:
        """Generation stops at </s>, <|user|>, <|observation|>."""
        return [self.eos_id, self.control_ids["<|user|>"], self.control_ids["<|observation|>"]]

    def encode(self, text: str) -> list[int]:
        """Plain SentencePiece; `<|user|>` or `[gMASK]` in the text stay text."""
        return list(self.sp.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Plain SentencePiece; control ids and padding rows of the table are left out."""
        return str(self.sp.decode([i for i in ids if i < self.num_pieces]))

    def encode_conversation(self, messages: Conversation | Sequence[Message | dict[str, Any]]) -> Sample:
        """Ids and labels of a whole conversation, for training.

        Raises:
            UserError: there is no message, or the last one is not the assistant's.
        """
        source = messages.source if isinstance(messages, Conversation) else ""
        return self.encode_conversations([Conversation(as_messages(messages), source)])[0]

    def encode_conversations(self, conversations: Sequence[Conversation]) -> list[Sample]:
        """The same for many, in one call of SentencePiece."""
        for c in conversations:
            if not c.messages or c.messages[-1].role != "assistant":
                raise UserError(f"{c.source or 'conversation'}: must end with an assistant message to be trained on")
        contents = iter(self.sp.encode([_content(m) for c in conversations for m in c.messages]))
        return [self._assemble(c, [next(contents) for _ in c.messages]) for c in conversations]

    def _assemble(self, conversation: Conversation, contents: Sequence[list[int]]) -> Sample:
        ids = self._prefix()
        spans: list[tuple[int, int]] = []
        learned = False
        for turn, content in zip(conversation.messages, contents, strict=True):
            ids.append(self.role_ids[turn.role])
            if learned:  # the role token that ends a learned turn belongs to it
                spans[-1] = (spans[-1][0], len(ids))
            start = len(ids)
            ids += self._head(turn)
            ids += content
            learned = turn.learns
            if learned and spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], len(ids))
            elif learned:
                spans.append((start, len(ids)))
        ids.append(self.eos_id)
        if learned:
            spans[-1] = (spans[-1][0], len(ids))
        return Sample(ids, spans, conversation.source)

    def encode_prompt(self, messages: Conversation | Sequence[Message | dict[str, Any]]) -> list[int]:
        """Ids that ask for the next answer: the same encoder, ending with <|assistant|>."""
        ids = self._prefix()
        for turn in as_messages(messages):
            ids += [self.role_ids[turn.role], *self._encode_body(turn)]
        return [*ids, self.control_ids["<|assistant|>"]]

    def encode_answer(self, turn: Message) -> list[int]:
        """Ids of an assistant's turn that ends a conversation: what `encode_prompt` asks for."""
        return [*self._encode_body(turn), self.eos_id]

    def parse_reply(self, ids: Sequence[int]) -> Message:
        """A raw reply (without or with its stop token): its first line is the metadata, the rest the content."""
        body = [i for i in ids if i not in self.stop_ids]
        metadata, newline, content = self.decode(body).partition("\n")
        if not newline:  # cut before the first line ended
            return Message("assistant", metadata.strip())
        return Message("assistant", content.strip(), metadata=metadata.strip())

    def parse_beginning(self, ids: Sequence[int]) -> Message:
        """A reply that is still being said: nothing, until its first line, which may be a tool's name, has ended."""
        message = self.parse_reply(ids)
        return message if "\n" in self.decode(ids) else Message("assistant", "")

    def render(self, sample: Sample, color: bool = True) -> str:
        """The sample as the model sees it, every token visible; what is learned in green, or in «» without colour."""
        text = [self.token_text(i).replace("\n", "\\n") for i in sample.input_ids]
        opening, closing = ("\x1b[32m", "\x1b[0m") if color else ("«", "»")
        for start, end in sample.supervised:
            text[start] = opening + text[start]
            text[end - 1] += closing
        return "".join(text)

    def token_text(self, i: int) -> str:
        """One token as text: control names as they are, bytes as <0x0A>, the word boundary as ▁."""
        if i in self.control_names:
            return self.control_names[i]
        return str(self.sp.id_to_piece(i)) if i < self.num_pieces else f"<row {i}>"

    def _prefix(self) -> list[int]:
        return [self.control_ids["[gMASK]"], self.control_ids["sop"]]

    def _head(self, turn: Message) -> list[int]:
        return self.encode(f"{turn.metadata}\n") if turn.metadata else self._newline

    def _encode_body(self, turn: Message) -> list[int]:
        return self._head(turn) + self.encode(_content(turn))


def _content(turn: Message) -> str:
    if turn.tools is None:
        return turn.content
    return f"{turn.content}\n{json.dumps(turn.tools, indent=4, ensure_ascii=False)}"


def load_tokenizer(path: str | Path) -> ChatGLM3Tokenizer:
    """The tokenizer of a model folder, or a `tokenizer.model` file itself.

    Raises:
        UserError: there is no `tokenizer.model`.
        DamagedError: the file is not a SentencePiece model.
    """
    file = Path(path)
    file = file / "tokenizer.model" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"{file}: no such file; a ChatGLM3 folder holds tokenizer.model beside config.json")
    return ChatGLM3Tokenizer(file)
