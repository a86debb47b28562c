"""glmft judge: which answer is better, base or tuned, by another model that is asked twice, with the order swapped."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from glmft import console
from glmft.errors import ResourceError, UserError
from glmft.files import append_jsonl, read_rows, write_json
from glmft.scores import PREDICTIONS, bootstrap

JUDGEMENTS, RESULT = "judgements.jsonl", "judged.json"
PROMPT = """\
You compare two answers to the same request. Judge how correct, helpful and clear each is; neither length nor the order
in which they stand counts. End with one line: VERDICT: A, VERDICT: B or VERDICT: TIE.

[Request]
{asked}

[Reference, if any]
{reference}

[Answer A]
{a}

[Answer B]
{b}
"""
_VERDICT = re.compile(r"VERDICT:\s*\**\s*(A|B|TIE)\b", re.IGNORECASE)


def verdict(text: str) -> str:
    """The last verdict of a text: "A", "B" or "TIE".

    Raises:
        ValueError: there is none.
    """
    found = _VERDICT.findall(text)
    if not found:
        raise ValueError(f"no verdict in {text[-80:]!r}")
    return str(found[-1]).upper()


def outcome(first: str, second: str) -> float:
    """1 where the tuned answer wins both times, 0 where it loses both times, else 0.5. `first` is the verdict on
    (base, tuned), `second` on (tuned, base)."""
    points = {"A": 0.0, "TIE": 0.5, "B": 1.0}
    forward, backward = points[first], 1 - points[second]
    return forward if forward == backward else 0.5


def _pair(row: dict[str, Any], voice: str) -> list[str]:
    """The base's answer and the voice's."""
    return [row["answers"][name]["text"] for name in (next(iter(row["answers"])), voice)]


class Judge:
    """A model behind an OpenAI-compatible address.

    Args:
        address: of the API, ending in /v1.
        model: the judge's name there.
        key: sent as bearer token; kept nowhere.
    """

    def __init__(self, address: str, model: str, key: str) -> None:
        from openai import OpenAI

        self.model = model
        self.client = OpenAI(base_url=address, api_key=key, max_retries=3, timeout=120)

    def compare(self, row: dict[str, Any], voice: str) -> dict[str, Any]:
        """Both orders of one record: {"key", "voice", "verdicts", "outcome"}; no outcome where there was no verdict."""
        answers = _pair(row, voice)
        judged: dict[str, Any] = {"key": self.key(row, voice), "id": row["id"], "voice": voice}
        try:
            said = [self.ask(row, *pair) for pair in (answers, answers[::-1])]
        except ValueError as e:
            return judged | {"verdicts": [str(e)], "outcome": None}
        return judged | {"verdicts": said, "outcome": outcome(*said)}

    def key(self, row: dict[str, Any], voice: str) -> str:
        """Of this judge, this request and these answers."""
        what = [self.model, str(self.client.base_url), row["id"], row["messages"], row["reference"], *_pair(row, voice)]
        return hashlib.sha256(json.dumps([*what, voice], ensure_ascii=False).encode()).hexdigest()[:16]

    def ask(self, row: dict[str, Any], a: str, b: str) -> str:
        """One verdict."""
        asked = "\n".join(f"{m['role']}: {m['content']}" for m in row["messages"])
        text = PROMPT.format(asked=asked, reference=row["reference"] or "(none)", a=a, b=b)
        reply = self.client.chat.completions.create(
            model=self.model, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=512
        )
        return verdict(reply.choices[0].message.content or "")


def run(folder: Path, judge: Judge, parallel: int) -> dict[str, Any]:
    """Judges what is not judged yet; win rates with their 95 % interval.

    Raises:
        UserError: there is nothing to judge.
        ResourceError: the judge cannot be reached, or gives no verdict at all.
    """
    from openai import OpenAIError

    found = list(read_rows(folder / PREDICTIONS))
    if not found or len(found[0]["answers"]) < 2:
        raise UserError(f"{folder}: holds no predictions of a base and a tuned voice; glmft predict makes them")
    done = {r["key"] for r in read_rows(folder / JUDGEMENTS)}
    voices = list(found[0]["answers"])[1:]
    wanted = {judge.key(row, voice): (row, voice) for row in found for voice in voices}
    left = [pair for key, pair in wanted.items() if key not in done]
    try:
        with ThreadPoolExecutor(parallel) as pool:
            for judged in pool.map(lambda pair: judge.compare(*pair), left):
                append_jsonl(folder / JUDGEMENTS, judged)
    except OpenAIError as e:
        told = f"{type(e).__name__}: {str(e).splitlines()[0][:300]}"
        raise ResourceError(f"the judge failed ({told}); the same command goes on") from None
    rows = [r for r in read_rows(folder / JUDGEMENTS) if r["key"] in wanted]
    result: dict[str, Any] = {"judge": judge.model, "win_rate": {}}
    for voice in voices:
        outcomes = [r["outcome"] for r in rows if r["voice"] == voice]
        points = np.array([o for o in outcomes if o is not None])
        if not len(points):
            raise ResourceError(
                f"the judge gave no verdict on any of {len(outcomes)} records: {rows[0]['verdicts'][0]}"
            )
        low, high = bootstrap(points)
        result["win_rate"][voice] = {
            **{"mean": float(points.mean()), "interval": [low, high], "records": len(points)},
            "undecided": len(outcomes) - len(points),
            **{name: int((points == value).sum()) for name, value in (("won", 1), ("lost", 0), ("even", 0.5))},
        }
    write_json(folder / RESULT, result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or that of the error."""
    parser = argparse.ArgumentParser(prog="glmft judge", description=__doc__)
    parser.add_argument("folder", type=Path, help="what glmft predict wrote")
    parser.add_argument(
        "--endpoint", required=True, help="an OpenAI-compatible address, such as http://127.0.0.1:8000/v1"
    )
    parser.add_argument("--judge", required=True, help="the model's name there")
    parser.add_argument("--parallel", type=int, default=4, help="requests at a time")
    options = parser.parse_args(arguments)

    def command() -> None:
        if importlib.util.find_spec("openai") is None:
            raise ResourceError("glmft judge needs the openai package: pip install 'glmft[eval]'")
        if options.parallel < 1:
            raise UserError("--parallel must be 1 or more")
        key = os.environ.get("GLMFT_JUDGE_KEY") or os.environ.get("OPENAI_API_KEY") or "none"
        result = run(options.folder, Judge(options.endpoint, options.judge, key), options.parallel)
        for voice, told in result["win_rate"].items():
            low, high = told["interval"]
            counts = f"won {told['won']}, even {told['even']}, lost {told['lost']}, undecided {told['undecided']}"
            print(f"{voice} against the base: {told['mean']:.1%} [{low:.1%}, {high:.1%}]; {counts}")

    return console.run(command)


if __name__ == "__main__":
    sys.exit(main())
