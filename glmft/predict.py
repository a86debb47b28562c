"""glmft predict: a data set or a file of prompts through the base and what was trained, with scores."""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import html
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from glmft.caches import use_cache_dir
from glmft.errors import GlmftError, ResourceError, UserError
from glmft.files import append_jsonl, read_rows, write_json
from glmft.messages import Message, as_messages
from glmft.models.published import fingerprint
from glmft.quiet import quiet_libraries
from glmft.scores import Answer, bootstrap, corpus_bleu, per_answer
from glmft.tables import as_latex, as_text

if TYPE_CHECKING:
    from glmft.engine import Engine, Sampling, Tuned

PREDICTIONS, SETTINGS, SCORES = "predictions.jsonl", "settings.json", "scores.json"
SHOWN = 20  # records of the page, those that changed most
Asked = dict[str, Any]
"""{"id", "source", "messages", "reference"}."""


# ---- what is asked


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
        file = (t.adapter or t.model or Path()).parent / ".hydra" / "config.yaml"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            known = yaml.safe_load(file.read_text(encoding="utf-8"))["data"]["fill"]
            out = {str(k): str(v) for k, v in known.items()} | out
    return out | dict(g.split("=", 1) for g in given)


def weights_of(tuned: Tuned) -> str:
    """A hash of what was tuned."""
    if tuned.adapter is None:
        return fingerprint(tuned.model) if tuned.model else ""
    files = sorted(tuned.adapter.glob("adapter_*"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _asked(number: int, source: str, messages: Sequence[Message], reference: str | None, metadata: str = "") -> Asked:
    said = [
        {k: v for k, v in asdict(m).items() if k == "content" or (k in ("role", "metadata", "tools") and v)}
        for m in messages
    ]
    asked = {"id": number, "source": source, "messages": said, "reference": reference}
    return asked | ({"reference_metadata": metadata} if metadata else {})


# ---- answering


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


# ---- scores


def score(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of each voice, and paired differences to the base with their 95 % interval."""
    voices = list(found[0]["answers"])
    references = [row["reference"] for row in found]
    each: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, dict[str, float]] = {}
    for voice in voices:
        said = [row["answers"][voice] for row in found]
        answers = [Answer(a["text"], a["tokens"], a["ended"]) for a in said]
        each[voice] = per_answer(answers, references)
        whole[voice] = {name: float(np.nanmean(values)) for name, values in each[voice].items()}
        pairs = [(a.text, r) for a, r in zip(answers, references, strict=True) if r is not None]
        whole[voice] |= corpus_bleu(pairs)
        counted = [a for a in said if "loss" in a]
        if counted:
            loss = sum(a["loss"] for a in counted) / sum(a["reference_tokens"] for a in counted)
            whole[voice] |= {"loss": loss, "perplexity": float(np.exp(loss))}
            own = [a["loss"] / a["reference_tokens"] if "loss" in a else np.nan for a in said]
            each[voice]["loss of a record"] = np.array(own)
    against = {
        voice: {
            name: {
                "difference": float(np.nanmean(values - each[voices[0]][name])),
                "interval": bootstrap(values - each[voices[0]][name]),
            }
            for name, values in each[voice].items()
        }
        for voice in voices[1:]
    }
    return {"records": len(found), "scores": whole, "against_base": against}


def table(result: dict[str, Any]) -> list[list[str]]:
    """Rows of text: name, a value for each voice, the difference to the base with its interval."""
    voices = list(result["scores"])
    out = [["", *voices, *(f"{v} - base" for v in voices[1:])]]
    for name in dict.fromkeys(n for v in voices for n in result["scores"][v]):
        row = [name, *(f"{result['scores'][v][name]:.4g}" for v in voices)]
        for voice in voices[1:]:
            told = result["against_base"][voice].get(name)
            row.append(
                f"{told['difference']:+.3g} [{told['interval'][0]:+.3g}, {told['interval'][1]:+.3g}]" if told else ""
            )
        out.append(row)
    return out


def as_page(lines: list[list[str]], found: Sequence[dict[str, Any]]) -> str:
    """One HTML file without scripts: the table, and the records whose answers changed most, side by side."""
    voices = lines[0][1 : 1 + len(found[0]["answers"])]

    def changed(row: dict[str, Any]) -> float:
        a = [row["answers"][v] for v in voices]
        if all("loss" in x for x in a):
            return max(abs(x["loss"] - a[0]["loss"]) / x["reference_tokens"] for x in a)
        return float(any(x["text"] != a[0]["text"] for x in a))

    def cells(tag: str, row: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"

    most = sorted(found, key=changed, reverse=True)[:SHOWN]
    asked = [
        [r["messages"][-1]["content"], r["reference"] or "", *(r["answers"][v]["text"] for v in voices)] for r in most
    ]
    return "\n".join(
        [
            '<!doctype html><html><head><meta charset="utf-8"><title>glmft predict</title><style>',
            "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:80em;padding:0 1em}",
            "table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ccc;padding:.3em .7em;",
            "text-align:left;vertical-align:top;white-space:pre-wrap}</style></head><body>",
            f"<h1>{len(found)} records</h1><table>",
            cells("th", lines[0]),
            *(cells("td", row) for row in lines[1:]),
            "</table><h2>Changed most</h2><table>",
            cells("th", ["asked", "reference", *voices]),
            *(cells("td", row) for row in asked),
            "</table></body></html>",
        ]
    )


def write_scores(folder: Path) -> dict[str, Any]:
    """scores.json, .csv, .tex and report.html of what was predicted."""
    found = sorted(read_rows(folder / PREDICTIONS), key=lambda row: row["id"])
    result = score(found)
    lines = table(result)
    write_json(folder / SCORES, result)
    with (folder / "scores.csv").open("w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows(lines)
    (folder / "scores.tex").write_text(as_latex(lines), encoding="utf-8")
    (folder / "report.html").write_text(as_page(lines, found), encoding="utf-8")
    return result


def to_wandb(folder: Path, project: str, result: dict[str, Any]) -> None:
    """Scores as a summary, predictions as a table."""
    import wandb

    found = list(read_rows(folder / PREDICTIONS))
    voices = list(found[0]["answers"])
    data = [[r["messages"][-1]["content"], r["reference"], *(r["answers"][v]["text"] for v in voices)] for r in found]
    run = wandb.init(project=project, name=folder.name, job_type="predict", dir=str(folder))
    try:
        run.log({"predictions": wandb.Table(columns=["asked", "reference", *voices], data=data)})
        run.summary.update({f"{v}/{name}": x for v in voices for name, x in result["scores"][v].items()})
    finally:
        run.finish()


# ---- the command


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
    parser.add_argument("--model", help="base model: folder or hub id (default: what the adapter was trained on)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--wandb", metavar="PROJECT", help="log scores and answers there")
    options = parser.parse_args(arguments)
    use_cache_dir()
    quiet_libraries()
    try:
        result = run(options)
    except GlmftError as e:
        print(f"glmft: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print(f"\nglmft: stopped; the same command goes on in {options.out}", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as e:  # torch: out of memory
        print(f"glmft: {str(e).splitlines()[0] if str(e) else 'not enough memory'}; --batch-size", file=sys.stderr)
        return ResourceError.exit_code
    print(as_text(table(result)))
    print(f"{options.out}/: {PREDICTIONS}, scores.json, .csv, .tex, report.html")
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Asks, scores, writes.

    Raises:
        GlmftError: what does not fit.
    """
    from glmft.engine import Engine, Sampling, find_tuned

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
        "weights": [fingerprint(engine.tokenizer.model_file.parent), *map(weights_of, tuned)],
        **{"sampling": asdict(sampling), "dtype": options.dtype, "batch_size": options.batch_size},
    }
    check_settings(options.out, settings)
    predict(engine, asked, sampling, options.batch_size, options.out / PREDICTIONS)
    result = write_scores(options.out)
    if options.wandb:
        to_wandb(options.out, options.wandb, result)
    return result


if __name__ == "__main__":
    sys.exit(main())
