"""glmft predict: a data set or a file of prompts through the base and what was trained, with scores."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmft import console
from glmft.caches import use_cache_dir
from glmft.errors import UserError
from glmft.files import append_jsonl, read_rows, write_json
from glmft.messages import Message, as_messages
from glmft.models.published import fingerprint
from glmft.quiet import quiet_libraries
from glmft.scores import PREDICTIONS
from glmft.tables import as_text

if TYPE_CHECKING:
    from glmft.engine import Engine, Sampling, Tuned
    from glmft.predict.asked import Asked

SETTINGS = "settings.json"


def predict(engine: Engine, asked: Sequence[Asked], sampling: Sampling, batch: int, file: Path) -> None:
    """Every voice answers every prompt; a line each is appended as it comes, and what is there is not asked again."""
    done = {row["id"] for row in read_rows(file)}
    left = sorted(
        (a for a in asked if a["id"] not in done), key=lambda a: sum(len(m["content"]) for m in a["messages"])
    )
    size = max(1, batch // len(engine.names))
    began = time.monotonic()
    for start in range(0, len(left), size):
        part = left[start : start + size]
        questions = [(voice, as_messages(a["messages"])) for a in part for voice in engine.names]
        replies = iter(engine.reply(questions, sampling))
        losses = reference_losses(engine, part)
        for a, loss in zip(part, losses, strict=True):
            answers = {}
            for voice in engine.names:
                reply = next(replies)
                text, ended = reply.message.content, reply.stopped == "end"
                answers[voice] = {"text": text, "tokens": len(reply.ids), "ended": ended, **loss[voice]}
            append_jsonl(file, {**a, "answers": answers})
        ready = start + len(part)
        rate = ready / (time.monotonic() - began)
        print(f"\r{ready}/{len(left)} records, {rate:.1f} a second", end="", file=sys.stderr, flush=True)
    if left:
        print(file=sys.stderr)


def reference_losses(engine: Engine, asked: Sequence[Asked]) -> list[dict[str, dict[str, float]]]:
    """-log p of each reference's tokens under each voice: {"loss": sum in nats, "reference_tokens"}."""
    out: list[dict[str, dict[str, float]]] = [{voice: {} for voice in engine.names} for _ in asked]
    known = [i for i, a in enumerate(asked) if a["reference"]]
    if not known:
        return out
    pairs = [
        (
            engine.tokenizer.encode_prompt(asked[i]["messages"]),
            engine.tokenizer.encode_answer(
                Message("assistant", asked[i]["reference"], asked[i].get("reference_metadata", ""))
            ),
        )
        for i in known
    ]
    for voice in engine.names:
        scores = engine.score(voice, pairs)
        sums = scores.per_answer(scores.loss)
        for i, total, count in zip(known, sums, scores.lengths, strict=True):
            out[i][voice] = {"loss": float(total), "reference_tokens": int(count)}
    return out


def weights_of(tuned: Tuned) -> str:
    """A hash of what was tuned."""
    if tuned.adapter is None:
        return fingerprint(tuned.model) if tuned.model else ""
    files = sorted(tuned.adapter.glob("adapter_*"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """The folder belongs to these settings, or is new.

    Raises:
        UserError: it holds predictions made with others; the differences are listed.
    """
    file = folder / SETTINGS
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if changed := [f"{k}: {before.get(k)} -> {v}" for k, v in settings.items() if before.get(k) != v]:
            raise UserError(f"{folder}: holds predictions made otherwise ({'; '.join(changed)}); choose another --out")
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: exists and holds something else; choose another --out")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or that of the error."""
    parser = argparse.ArgumentParser(prog="glmft predict", description=__doc__)
    parser.add_argument("sources", nargs="+", help="runs, adapter folders or models; the base always answers too")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="a data set of the registry, or a data file: its last answers are references")
    what.add_argument("--prompts", type=Path, help="a prompt a line; or JSON lines with prompt or messages, reference")
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), help="the folder; the same command goes on there"
    )
    parser.add_argument("--dir", help="folder of dataset_info.json")
    parser.add_argument("--fill", nargs="*", default=[], metavar="NAME=VALUE", help="blanks (default: the run's own)")
    parser.add_argument("--max-samples", type=int, help="only so many records, chosen by a fixed seed")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64, help="rows of a batch, over all voices")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    console.add_weights(parser)
    parser.add_argument("--wandb", metavar="PROJECT", help="log scores and answers there")
    options = parser.parse_args(arguments)
    use_cache_dir()
    quiet_libraries()

    def command() -> None:
        from glmft.predict.report import table

        with console.out_of_memory(advice="; --batch-size"):
            result = run(options)
        print(as_text(table(result)))
        print(f"{options.out}/: {PREDICTIONS}, scores.json, .csv, .tex, report.html")

    return console.run(command, interrupted=f"stopped; the same command goes on in {options.out}")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Asks, scores, writes.

    Raises:
        GlmftError: what does not fit.
    """
    from glmft.engine import Engine, Sampling, find_tuned
    from glmft.predict.asked import fill_of, read_data, read_prompts
    from glmft.predict.report import to_wandb, write_scores

    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, seed=options.seed)
    if options.batch_size < 1 or (options.max_samples is not None and options.max_samples < 1):
        raise UserError("--batch-size and --max-samples must be 1 or more")
    if options.prompts:
        asked = read_prompts(options.prompts)[: options.max_samples]
    tuned = [find_tuned(source, options.model) for source in options.sources]
    engine = Engine(tuned, options.dtype, options.device)
    if options.data:
        fill = fill_of(tuned, options.fill)
        folder = engine.tokenizer.model_file.parent
        asked = read_data(options.data, folder, options.dir, options.max_samples, fill)
    settings = {
        **{"sources": options.sources, "asked": options.data or str(options.prompts), "records": len(asked)},
        "content of what is asked": hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()[:16],
        "weights": [engine.base_fingerprint, *map(weights_of, tuned)],
        **{"sampling": asdict(sampling), "dtype": options.dtype, "batch_size": options.batch_size},
    }
    check_settings(options.out, settings)
    predict(engine, asked, sampling, options.batch_size, options.out / PREDICTIONS)
    found = sorted(read_rows(options.out / PREDICTIONS), key=lambda row: row["id"])
    result = write_scores(options.out, found)
    if options.wandb:
        to_wandb(options.out, options.wandb, found, result)
    return result


if __name__ == "__main__":
    sys.exit(main())
