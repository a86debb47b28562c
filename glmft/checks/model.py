"""The model folder: files, shapes, hashes, tokenizer; the published answer is proof that weights were read right."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from glmft.checks.finding import Finding, Text, both
from glmft.errors import GlmftError
from glmft.models.hub import download_commands, find_local, is_hub_id
from glmft.models.published import PublishedConfig, check_folder, check_tokenizer
from glmft.models.tokenizer import load_tokenizer

MODEL, TOKENIZER = Text("model", "模型"), Text("tokenizer", "分词器")
ROUND_TRIP = "你好，philosophy 与 <|user|> 是普通文本。\n第二行 🙂"
QUESTION = "你好"
PUBLISHED_ANSWER = "你好👋！我是人工智能助手 ChatGLM3-6B，很高兴见到你，欢迎问我任何问题。"
IS_6B = {"num_layers": 28, "hidden_size": 4096, "padded_vocab_size": 65024}


def check_model(path: str, answer: bool) -> Iterator[Finding]:
    """The folder, its tokenizer, its hashes; with `answer` also what it says."""
    folder = find_local(path)
    if folder is None:
        yield Finding(MODEL, False, Text(f"{path}: not on this machine", f"{path}：本机没有"), download(path))
        return
    try:
        config, layout, weights = check_folder(folder)
    except GlmftError as e:
        yield Finding(MODEL, False, both(str(e)), refetch(path))
        return
    size = f"{len(weights.files)} × {weights.format}, {weights.num_bytes / 1e9:.1f} GB, {layout}"
    yield Finding(MODEL, True, Text(f"{folder}: complete ({size})", f"{folder}：完整（{size}）"))
    yield from check_tokenizer_file(folder, config, path)
    yield from check_hashes(folder, weights.files, path)
    if answer:
        yield check_answer(folder, config)


def download(path: str) -> Text | None:
    """The commands that fetch a hub model; None for a path that is no hub id."""
    return both(download_commands(path, None).strip()) if is_hub_id(path) else None


def refetch(path: str) -> Text:
    """How to replace damaged files."""
    return download(path) or Text("fetch the files again", "请重新下载这些文件")


def check_tokenizer_file(folder: Path, config: PublishedConfig, path: str) -> Iterator[Finding]:
    """Size against the model's table, and text that must come back unchanged."""
    try:
        tokenizer = load_tokenizer(folder)
        check_tokenizer(len(tokenizer), config, folder)
    except GlmftError as e:
        yield Finding(TOKENIZER, False, both(str(e)), refetch(path))
        return
    back = tokenizer.decode(tokenizer.encode(ROUND_TRIP))
    says = Text(f"{len(tokenizer)} tokens; text comes back unchanged", f"{len(tokenizer)} 个 token；文本往返不变")
    if back != ROUND_TRIP:
        says = Text(f"{ROUND_TRIP!r} comes back as {back!r}", f"{ROUND_TRIP!r} 往返后变成 {back!r}")
    yield Finding(TOKENIZER, back == ROUND_TRIP, says, None if back == ROUND_TRIP else refetch(path))


def recorded_hash(file: Path) -> str | None:
    """sha256 that the Hugging Face client recorded: the name of the blob that a snapshot links to, or the etag beside
    a `--local-dir` download."""
    metadata = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    candidates = [file.resolve().name, *(metadata.read_text().split() if metadata.is_file() else [])]
    return next((c for c in candidates if re.fullmatch(r"[0-9a-f]{64}", c)), None)


def check_hashes(folder: Path, files: tuple[Path, ...], path: str) -> Iterator[Finding]:
    """Every file whose hash was recorded when it was fetched."""
    name = Text("hashes", "哈希")
    known = {f: h for f in (*files, folder / "tokenizer.model") if f.is_file() and (h := recorded_hash(f))}
    if not known:
        yield Finding(name, None, Text("none were recorded when it was fetched", "下载时没有记录"))
        return
    wrong = []
    for file, wanted in known.items():
        with file.open("rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != wanted:
                wrong.append(file.name)
    if wrong:
        yield Finding(name, False, both(f"sha256 ≠: {', '.join(wrong)}"), refetch(path))
    else:
        yield Finding(name, True, Text(f"{len(known)} files as published", f"{len(known)} 个文件与发布的一致"))


def check_answer(folder: Path, config: PublishedConfig) -> Finding:
    """Greedy answer to 你好; for the 6B it is known."""
    import torch

    from glmft.messages import Message
    from glmft.models import load_model
    from glmft.models.generation import answer
    from glmft.precision import real_bf16

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(folder, dtype="bfloat16" if real_bf16() else "float32", device=device)
    (said,) = answer(model, load_tokenizer(folder), [[Message("user", QUESTION)]], max_new_tokens=48)
    name = Text("answer", "回答")
    if any(getattr(config, k) != v for k, v in IS_6B.items()):
        return Finding(
            name,
            None,
            Text(
                f"{QUESTION} → {said} (not a 6B: nothing to compare with)", f"{QUESTION} → {said}（不是 6B，无可比较）"
            ),
        )
    ok = said == PUBLISHED_ANSWER
    expected = "" if ok else f" ≠ {PUBLISHED_ANSWER}"
    return Finding(name, ok, both(f"{QUESTION} → {said}{expected}"))
