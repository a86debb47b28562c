"""Answers to conversations, in batches padded on the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glmft.messages import Conversation, Message
from glmft.models.tokenizer import ChatGLM3Tokenizer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, attention mask) of one batch, both [B, S]: every prompt ends at the last column."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


@torch.inference_mode()
def generate_ids(
    model: Any, prompts: Sequence[Sequence[int]], tokenizer: ChatGLM3Tokenizer, max_new_tokens: int
) -> list[list[int]]:
    """Greedy continuations of one batch, without the stop token. Left padding: prompts [B, S]."""
    device = next(model.parameters()).device
    ids, mask = left_padded(prompts, tokenizer.pad_id, device)
    stop = tokenizer.stop_ids
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_id,
        eos_token_id=stop,
    )
    replies = []
    for row in out[:, ids.shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in stop), len(row))
        replies.append(row[:end])
    return replies


def answer(
    model: nn.Module,
    tokenizer: ChatGLM3Tokenizer,
    conversations: Sequence[Conversation | Sequence[Message]],
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> list[str]:
    """Greedy answers in the order of the conversations; those of similar length share a batch. A Conversation is
    asked without its last answer."""
    prompts = [tokenizer.encode_prompt(c.prompt if isinstance(c, Conversation) else c) for c in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            replies = generate_ids(model, [prompts[i] for i in batch], tokenizer, max_new_tokens)
            for i, reply in zip(batch, replies, strict=True):
                answers[i] = tokenizer.parse_reply(reply).content
    return answers
