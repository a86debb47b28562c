"""lm-eval scores base and adapter as they are; a task of our own in its format, without a download."""

from __future__ import annotations

import json

import pytest
from test_chat import adapter

from glmft.benchmarks import main
from glmft.models import load_model, load_tokenizer
from glmft.models.scoring import score_answers
from glmft.strategies.adapter import load_adapter

pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.share("use"), pytest.mark.slow]
TASK = """\
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["巴黎", "北京", "伦敦"]
doc_to_target: answer
metric_list:
  - metric: acc
"""
QUESTIONS = [("法国的首都是哪里？", 0), ("中国的首都是哪里？", 1), ("英国的首都是哪里？", 2), ("你是谁？", 1)]


def test_base_and_adapter_on_a_task(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "capitals.json"
    data.write_text("\n".join(json.dumps({"question": q, "answer": a}, ensure_ascii=False) for q, a in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "capitals.yaml").write_text(TASK.replace("DATA", str(data)))
    folder = adapter(tiny, tmp_path / "mine", 1)
    options = ["--tasks", "capitals", "--include", str(tmp_path / "tasks"), "--model", str(tiny), "--device", "cpu"]
    assert main([str(folder), *options, "--dtype", "float32", "--out", str(tmp_path / "out.json")]) == 0
    assert "capitals acc" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    tokenizer = load_tokenizer(tiny)
    prefix = [tokenizer.control_ids["[gMASK]"], tokenizer.control_ids["sop"]]
    models = {"base": load_model(tiny, dtype="float32").eval()}
    models["mine"] = load_adapter(load_model(tiny, dtype="float32").eval(), folder)
    for voice, model in models.items():
        right = 0
        for question, answer in QUESTIONS:
            context = [*prefix, *tokenizer.encode(question)]
            choices = ["巴黎", "北京", "伦敦"]
            pairs = [(context, [*prefix, *tokenizer.encode(f"{question} {c}")][len(context) :]) for c in choices]
            scores = score_answers(model, pairs, tokenizer.pad_id)
            likely = scores.per_answer(-scores.loss)
            right += int(likely.argmax()) == answer
        assert found[voice]["capitals"]["acc,none"] == pytest.approx(right / len(QUESTIONS)), voice


def test_an_unknown_task(tiny, tmp_path, capsys):
    assert main([str(adapter(tiny, tmp_path / "mine", 1)), "--tasks", "nothing-of-this", "--model", str(tiny)]) == 2
    assert "lm-eval knows no 'nothing-of-this'" in capsys.readouterr().err
