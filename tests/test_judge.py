"""Judging against a stand-in for the judge, on 127.0.0.1."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from glmft.files import append_jsonl, read_rows
from glmft.judge import main, outcome, verdict

pytestmark = pytest.mark.share("use")
KEY = "k3y-of-the-judge"


class StandIn(BaseHTTPRequestHandler):
    """Prefers the longer answer; where both are equally long, the first one, whatever it is."""

    asked: list[str] = []  # noqa: RUF012
    keys: set[str] = set()  # noqa: RUF012
    answer: str | None = None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        self.asked.append(text)
        self.keys.add(self.headers["Authorization"])
        a, b = (len(text.split(f"[Answer {x}]\n")[1].split("\n")[0]) for x in "AB")
        said = self.answer or f"Because. VERDICT: {'B' if b > a else 'A'}"
        told = {"id": "x", "object": "chat.completion", "created": 0, "model": "judge"}
        told["choices"] = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}]
        content = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("GLMFT_JUDGE_KEY", KEY)
    monkeypatch.setattr(StandIn, "asked", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def predicted(folder, pairs):
    folder.mkdir()
    for i, (base, tuned) in enumerate(pairs):
        answers = {v: {"text": t, "tokens": 1, "ended": True} for v, t in (("base", base), ("mine", tuned))}
        row = {"id": i, "messages": [{"role": "user", "content": "hi {x}"}], "reference": None, "answers": answers}
        append_jsonl(folder / "predictions.jsonl", row)


def test_both_orders_are_asked(tmp_path, endpoint, capsys):
    """Longer answers win both times; where the judge only likes the first place, nobody wins."""
    predicted(tmp_path / "p", [("a", "longer")] * 6 + [("longer", "a")] * 2 + [("same", "size")] * 2)
    assert main([str(tmp_path / "p"), "--endpoint", endpoint, "--judge", "judge"]) == 0
    out = capsys.readouterr().out
    assert "mine against the base: 70.0%" in out
    assert "won 6, even 2, lost 2" in out
    assert len(StandIn.asked) == 20
    assert {f"Bearer {KEY}"} == StandIn.keys
    assert not any(KEY.encode() in f.read_bytes() for f in (tmp_path / "p").iterdir())
    told = json.loads((tmp_path / "p" / "judged.json").read_text())["win_rate"]["mine"]
    assert told["interval"][0] < 0.7 < told["interval"][1]
    assert main([str(tmp_path / "p"), "--endpoint", endpoint, "--judge", "judge"]) == 0
    assert len(StandIn.asked) == 20  # nothing is asked again
    assert main([str(tmp_path / "p"), "--endpoint", endpoint, "--judge", "another"]) == 0
    assert len(StandIn.asked) == 40  # but another judge is


def test_a_judge_that_gives_no_verdict(tmp_path, endpoint, capsys, monkeypatch):
    predicted(tmp_path / "p", [("a", "b")])
    monkeypatch.setattr(StandIn, "answer", "I like both.")
    assert main([str(tmp_path / "p"), "--endpoint", endpoint, "--judge", "judge"]) == 4
    assert "no verdict on any of 1 records" in capsys.readouterr().err
    assert [r["outcome"] for r in read_rows(tmp_path / "p" / "judgements.jsonl")] == [None]
    assert main([str(tmp_path), "--endpoint", endpoint, "--judge", "judge"]) == 2


def test_verdicts_and_outcomes():
    assert verdict("VERDICT: A or VERDICT: B? VERDICT: **tie**") == "TIE"
    assert [outcome(*pair) for pair in (("B", "A"), ("A", "B"), ("A", "A"), ("TIE", "TIE"), ("B", "TIE"))] == [
        1,
        0,
        0.5,
        0.5,
        0.5,
    ]
