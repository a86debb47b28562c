"""Predictions that go on where they stopped, and scores with the conventions that they are named after."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from test_chat import QUESTIONS, adapter

from glmft.engine import Engine, Tuned
from glmft.files import read_rows as rows
from glmft.messages import Message
from glmft.models import load_model, load_tokenizer
from glmft.models.scoring import score_answers
from glmft.predict.__main__ import main
from glmft.predict.asked import read_prompts
from glmft.scores import PREDICTIONS, Answer, bootstrap, corpus_bleu, per_answer, repetition, tokens
from glmft.strategies.adapter import load_adapter
from glmft.tables import as_latex

pytestmark = pytest.mark.share("use")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return adapter(tiny, tmp_path_factory.mktemp("predicted") / "mine", 1)


@pytest.fixture
def run(tiny, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        options = ["--model", str(tiny), "--dtype", "float32", "--device", "cpu", "--max-new-tokens", "12"]
        code = main([str(folder), *options, *arguments])
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def test_a_data_set_with_scores(tiny, folder, run):
    code, out, err = run("--data", "tiny_identity_test", "--max-samples", "6", "--batch-size", "4")
    assert code == 0, err
    found = list(rows(Path("predictions") / PREDICTIONS))
    assert sorted(r["id"] for r in found) == list(range(6))
    engine = Engine([Tuned("mine", str(tiny), folder)], "float32", "cpu")
    from glmft.engine import Sampling

    for row in found[:3]:
        for voice in ("base", "mine"):
            (alone,) = engine.reply([(voice, [Message(**m) for m in row["messages"]])], Sampling(12))
            assert row["answers"][voice]["text"] == alone.message.content
    model = load_adapter(load_model(tiny, dtype="float32").eval(), folder)
    tokenizer = load_tokenizer(tiny)
    pair = (
        tokenizer.encode_prompt(found[0]["messages"]),
        tokenizer.encode_answer(Message("assistant", found[0]["reference"])),
    )
    assert found[0]["answers"]["mine"]["loss"] == pytest.approx(score_answers(model, [pair], 0).loss.sum(), rel=1e-5)
    told = json.loads(Path("predictions/scores.json").read_text())
    total = sum(r["answers"]["base"]["loss"] for r in found) / sum(
        r["answers"]["base"]["reference_tokens"] for r in found
    )
    assert told["scores"]["base"]["loss"] == pytest.approx(total)
    assert told["scores"]["base"]["perplexity"] == pytest.approx(np.exp(total))
    low, high = told["against_base"]["mine"]["loss of a record"]["interval"]
    assert low <= told["against_base"]["mine"]["loss of a record"]["difference"] <= high
    for name in ("exact", "chrF", "ROUGE-L (LLaMA-Factory)", "BLEU-4 (THUDM)", "ended", "repetition", "perplexity"):
        assert name in out
    with Path("predictions/scores.csv").open(encoding="utf-8") as f:
        assert next(csv.reader(f)) == ["", "base", "mine", "mine - base"]
    page = Path("predictions/report.html").read_text()
    assert "Changed most" in page
    assert "<script" not in page


def test_blanks_are_filled_as_in_the_run(tiny, folder, run):
    (folder.parent / ".hydra").mkdir()
    (folder.parent / ".hydra" / "config.yaml").write_text("data:\n  fill: {name: 小智, author: 开源社区}\n")
    assert run("--data", "tiny_identity_test", "--max-samples", "4")[0] == 0
    assert run("--data", "tiny_identity_test", "--max-samples", "4", "--fill", "name=Ada", "--out", "b")[0] == 0
    references = [[r["reference"] for r in rows(Path(out) / PREDICTIONS)] for out in ("predictions", "b")]
    assert any("小智" in r for r in references[0])
    assert any("Ada" in r for r in references[1])
    assert not any("{{" in r for group in references for r in group)
    assert run("--data", "tiny_identity_test", "--fill", "name")[0] == 2


def test_a_stopped_prediction_goes_on(run, monkeypatch):
    Path("p.txt").write_text("\n".join([*QUESTIONS, "", "1+1=", "<b>&"]))
    original, calls = Engine.reply, []

    def stopping(self, *a):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *a)

    with monkeypatch.context() as m:
        m.setattr(Engine, "reply", stopping)
        code, _, err = run("--prompts", "p.txt", "--batch-size", "2")
    assert code == 130
    assert "the same command goes on" in err
    file = Path("predictions") / PREDICTIONS
    before = file.read_text()
    assert before.count("\n") == 2
    file.write_text(before + '{"id": 3, "cut o')
    assert run("--prompts", "p.txt", "--batch-size", "2")[0] == 0
    assert file.read_text().startswith(before)
    assert sorted(r["id"] for r in rows(file)) == [0, 1, 2, 3, 4]
    assert "&lt;b&gt;&amp;" in Path("predictions/report.html").read_text()
    code, _, err = run("--prompts", "p.txt", "--temperature", "0.5")
    assert code == 2
    assert "holds predictions made otherwise (sampling" in err
    Path("p.txt").write_text(Path("p.txt").read_text().replace("1+1", "1+2"))
    code, _, err = run("--prompts", "p.txt", "--batch-size", "2")
    assert code == 2
    assert "content of what is asked" in err


def test_a_call_as_reference_and_an_empty_prompt(tiny, run):
    """The tool's name belongs to what is scored."""
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]}
    Path("a.json").write_text(
        json.dumps([{"messages": [{"role": "user", "content": "hi"}, call], "tools": [{"name": "weather"}]}])
    )
    assert run("--data", "a.json")[0] == 0
    (row,) = rows(Path("predictions") / PREDICTIONS)
    tokenizer = load_tokenizer(tiny)
    answer = tokenizer.encode_answer(Message("assistant", row["reference"], "weather"))
    assert row["answers"]["base"]["reference_tokens"] == len(answer)
    Path("p.jsonl").write_text('{"prompt": ""}\n')
    assert run("--prompts", "p.jsonl", "--out", "b")[0] == 0


BAD = {
    "no such file": (None, "cannot be read"),
    "nothing in it": ("\n\n", "holds no prompt"),
    "a number": ("[1, 2]\n", "line 1: neither a text"),
    "no prompt": ('"a"\n{"question": "x"}\n', "line 2: neither a text, nor an object with prompt"),
    "a prompt that is a number": ('{"prompt": 5}\n', "line 1: neither a text"),
    "an unknown role": ('{"messages": [{"role": "wizard", "content": "x"}]}\n', "line 1: neither a text"),
    "a reference that is no text": ('{"prompt": "x", "reference": 3}\n', "line 1: neither a text"),
}


@pytest.mark.parametrize("kind", BAD)
def test_prompts_that_cannot_be_read(run, kind):
    content, says = BAD[kind]
    if content is not None:
        Path("p.jsonl").write_text(content)
    code, _, err = run("--prompts", "p.jsonl")
    assert code == 2
    assert says in err
    assert not Path("predictions").exists()


def test_prompt_lines_of_all_forms(tmp_path):
    file = tmp_path / "p.jsonl"
    lines = [
        '"a"',
        '{"prompt": "b", "reference": "c"}',
        '{"messages": [{"role": "system", "content": "d"}, {"role": "user", "content": "e"}]}',
    ]
    file.write_text("\ufeff" + "\n".join(lines))
    found = read_prompts(file)
    assert [(len(f["messages"]), f["reference"]) for f in found] == [(1, None), (1, "c"), (2, None)]


def test_a_folder_of_something_else_is_left_alone(run):
    Path("p.txt").write_text("hi")
    Path("predictions").mkdir()
    Path("predictions/thesis.txt").write_text("precious")
    code, _, err = run("--prompts", "p.txt")
    assert code == 2
    assert "holds something else" in err


# ---- scores


PAIRS = [("我爱北京天安门", "我爱北京的天安门"), ("你好，世界", "你好世界"), ("完全不同", "今天天气很好")]


def test_scores_are_those_of_their_libraries():
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge
    from sacrebleu.metrics import BLEU, CHRF

    answers = [Answer(a, len(a), True) for a, _ in PAIRS]
    found = per_answer(answers, [r for _, r in PAIRS])
    for i, (a, r) in enumerate(PAIRS):
        assert found["chrF"][i] == pytest.approx(CHRF().sentence_score(a, [r]).score)
        smooth = SmoothingFunction().method3
        assert found["BLEU-4 (LLaMA-Factory)"][i] == pytest.approx(
            100 * sentence_bleu([list(r)], list(a), smoothing_function=smooth)
        )
        rouge = Rouge().get_scores(" ".join(tokens(a)), " ".join(tokens(r)))[0]
        assert found["ROUGE-2 (characters, words)"][i] == pytest.approx(rouge["rouge-2"]["f"])
    expected = BLEU(tokenize="zh").corpus_score([a for a, _ in PAIRS], [[r for _, r in PAIRS]]).score
    assert corpus_bleu(PAIRS) == {"BLEU (sacrebleu, zh)": pytest.approx(expected)}
    english = [("the cat sat on the mat", "the cat is on the mat")]
    assert "BLEU (sacrebleu, 13a)" in corpus_bleu(english)


def test_scores_that_need_no_library():
    assert tokens("GLM 模型, v3!") == ["glm", "模", "型", ",", "v3", "!"]
    assert repetition("一二三四五六七八") == 0
    assert repetition("好" * 20) == pytest.approx(1 - 1 / 17)
    found = per_answer([Answer(" a ", 1, True), Answer("b", 2, False)], ["a", None])
    assert found["exact"][0] == 1
    assert np.isnan(found["exact"][1])
    assert found["ended"].tolist() == [1, 0]


def test_the_interval_covers_the_truth():
    """Of 200 experiments with a true difference of 0.3, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(0)
    held = 0
    for i in range(200):
        low, high = bootstrap(rng.normal(0.3, 1.0, 60), resamples=400, seed=i)
        held += low <= 0.3 <= high
    assert 0.89 <= held / 200 <= 0.99
    assert all(np.isnan(bootstrap(np.array([np.nan]))))


def test_latex_escapes():
    assert r"a\_b \& 5\%" in as_latex([["", "a_b & 5%"], ["x", "1"]])
