"""What is asked: prompts of a file, or the records of a data set with their last answers as references."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glmft.engine import Tuned, asked_of_run
from glmft.errors import DamagedError, UserError
from glmft.messages import Message, as_messages

Asked = dict[str, Any]
"""{"id", "source", "messages", "reference"}."""


def read_prompts(file: Path) -> list[Asked]:
    """A text file with a prompt a line, or JSON lines: a text, {"prompt", "reference"} or {"messages", "reference"}.

    Raises:
        UserError: a line is nothing of these (named).
    """
    out: list[Asked] = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: cannot be read ({getattr(e, 'strerror', None) or 'not UTF-8'})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}: line {number}"
        try:
            found = json.loads(line) if file.suffix in (".jsonl", ".json") else line
            found = {"prompt": found} if isinstance(found, str) else dict(found)
            messages = found.get("messages") or [{"role": "user", "content": found["prompt"]}]
            reference = found.get("reference")
            if reference is not None and not isinstance(reference, str):
                raise TypeError("reference is no text")
            if not all(isinstance(m.get("content"), str) for m in messages):
                raise TypeError("content is no text")
            out.append(_asked(len(out), where, as_messages(messages), reference))
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise UserError(f"{where}: neither a text, nor an object with prompt or messages ({e})") from None
    if not out:
        raise UserError(f"{file}: holds no prompt")
    return out


def read_data(
    name: str, folder: Path, directory: str | None, limit: int | None, fill: Mapping[str, str]
) -> list[Asked]:
    """The records of a data set (a registry's name, or a file) without their last answers, which are the references.
    `fill` has values of {{name}}-style blanks."""
    from glmft.data.corpus import CorpusSpec, prepare

    where = {"path": name} if Path(name).exists() else {"datasets": [name]}
    corpus = prepare(CorpusSpec.of(folder, **where, dir=directory, max_samples=limit, fill=dict(fill)))
    found = corpus.conversations(corpus.train, range(len(corpus.train)))
    return [_asked(i, c.source, c.prompt, c.messages[-1].content, c.messages[-1].metadata) for i, c in enumerate(found)]


def fill_of(tuned: Sequence[Tuned], given: Sequence[str]) -> dict[str, str]:
    """Values of blanks: those of the command line, then those that the runs were trained with.

    Raises:
        UserError: one is not NAME=VALUE.
    """
    if wrong := [g for g in given if "=" not in g]:
        raise UserError(f"--fill {wrong[0]}: expected NAME=VALUE")
    out: dict[str, str] = {}
    for t in tuned:
        with contextlib.suppress(DamagedError, KeyError, TypeError, AttributeError):
            known = asked_of_run((t.adapter or t.model or Path()).parent)["data"]["fill"]
            out = {str(k): str(v) for k, v in known.items()} | out
    return out | dict(g.split("=", 1) for g in given)


def _asked(number: int, source: str, messages: Sequence[Message], reference: str | None, metadata: str = "") -> Asked:
    said = [
        {k: v for k, v in asdict(m).items() if k == "content" or (k in ("role", "metadata", "tools") and v)}
        for m in messages
    ]
    asked = {"id": number, "source": source, "messages": said, "reference": reference}
    return asked | ({"reference_metadata": metadata} if metadata else {})
