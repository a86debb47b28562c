"""The base model's own greedy answers to packaged prompts, mixed in against forgetting; made once a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmft.caches import cache_dir
from glmft.files import read_json, write_json
from glmft.messages import Message
from glmft.models.generation import answer
from glmft.models.hub import PACKAGED
from glmft.models.published import fingerprint
from glmft.models.tokenizer import load_tokenizer

PROMPTS = PACKAGED / "prompts" / "replay.json"
MAX_NEW_TOKENS = 128


def replay_file(folder: Path) -> Path:
    """Where the answers of this model lie, or will lie: its name follows from weights and prompts."""
    key = hashlib.sha256(f"{fingerprint(folder)} {MAX_NEW_TOKENS} ".encode() + PROMPTS.read_bytes()).hexdigest()
    return cache_dir() / "replay" / f"{key[:16]}.json"


def make_replay(folder: Path, load: Callable[[], Any]) -> Path:
    """Writes the file as alpaca records where it is not there yet; `load` gives the base model. Answers that did not
    end within 128 tokens are left out, so that no cut answer is learned."""
    file = replay_file(folder)
    if not file.is_file():
        prompts, tokenizer = read_json(PROMPTS), load_tokenizer(folder)
        print(f"glmft: data.replay=self: the base answers {len(prompts)} prompts, once", flush=True)
        answers = answer(load(), tokenizer, [[Message("user", p)] for p in prompts], MAX_NEW_TOKENS)
        pairs = zip(prompts, answers, strict=True)
        ended = [(p, a) for p, a in pairs if a and len(tokenizer.encode(a)) < MAX_NEW_TOKENS - 2]
        write_json(file, [{"instruction": p, "output": a} for p, a in ended])
    return file
