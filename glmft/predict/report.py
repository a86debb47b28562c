"""Scores of predictions, as a table, a page, files and a W&B table."""

from __future__ import annotations

import csv
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glmft.files import write_json
from glmft.scores import Answer, bootstrap, corpus_bleu, per_answer
from glmft.tables import as_latex

SHOWN = 20  # records of the page, those that changed most


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

    def cells(tag: str, row: Sequence[str | None]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c or '')}</{tag}>" for c in row) + "</tr>"

    most = sorted(found, key=changed, reverse=True)[:SHOWN]
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
            *(cells("td", row) for row in side_by_side(most)),
            "</table></body></html>",
        ]
    )


def side_by_side(found: Sequence[dict[str, Any]]) -> list[list[str | None]]:
    """The last question, the reference if there is one, and the answer of each voice, of every record."""
    return [[r["messages"][-1]["content"], r["reference"], *(a["text"] for a in r["answers"].values())] for r in found]


def write_scores(folder: Path, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """scores.json, .csv, .tex and report.html of what was predicted."""
    result = score(found)
    lines = table(result)
    write_json(folder / "scores.json", result)
    with (folder / "scores.csv").open("w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows(lines)
    (folder / "scores.tex").write_text(as_latex(lines), encoding="utf-8")
    (folder / "report.html").write_text(as_page(lines, found), encoding="utf-8")
    return result


def to_wandb(folder: Path, project: str, found: Sequence[dict[str, Any]], result: dict[str, Any]) -> None:
    """Scores as a summary, predictions as a table."""
    import wandb

    voices = list(found[0]["answers"])
    run = wandb.init(project=project, name=folder.name, job_type="predict", dir=str(folder))
    try:
        run.log({"predictions": wandb.Table(columns=["asked", "reference", *voices], data=side_by_side(found))})
        run.summary.update({f"{v}/{name}": x for v in voices for name, x in result["scores"][v].items()})
    finally:
        run.finish()
