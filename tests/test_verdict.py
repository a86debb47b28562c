"""The verdict says what happened: each kind of run that goes wrong gets its own grade, reason and next step."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from glmft.files import read_json
from glmft.messages import Conversation, Message, Sample
from glmft.models import load_model, load_tokenizer
from glmft.models.generation import generate_ids
from glmft.models.scoring import Scores, score_answers
from glmft.models.tokenizer import ChatGLM3Tokenizer
from glmft.verdict import Facts, Learned, compare_answers, compare_scores, is_right, judge, repetition

pytestmark = pytest.mark.share("fifteen minutes")
QUIET = ("callbacks.samples=null", "callbacks.compare=null", "data.val_datasets=[]")
FIVE = ("data.datasets=[tiny_identity]", "data.max_samples=5", "trainer.max_epochs=60", "optimizer.lr=1e-2")
seeds = pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])


@pytest.fixture
def verdict(train):
    """Runs a training and returns verdict.json and what was printed."""

    def run(*arguments: str) -> tuple[dict, str]:
        result = train(*QUIET, *arguments, "run.name=a")
        assert result.code == 0, result.err
        return read_json(result.folder / "runs" / "a" / "verdict.json"), result.out

    return run


@seeds
def test_a_rate_of_1e_7_learns_nothing(verdict, seed):
    found, out = verdict("optimizer.lr=1e-7", "trainer.max_epochs=2", f"seed={seed}", "data.max_samples=60")
    assert (found["learned"], found["kept"]) == ("no", "yes")
    assert "did not become likelier" in out
    assert any("trainer.max_epochs" in a["overrides"] for a in found["advice"])
    assert any(m.startswith("validation: there are no held-out records") for m in found["missing"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_default_learns_and_keeps(verdict, seed):
    """Its first seed is part of test_train.py."""
    found, _ = verdict("data.val_datasets=[tiny_identity_rephrased]", f"seed={seed}")
    assert (found["learned"], found["kept"]) == ("yes", "yes")


@seeds
def test_five_records_at_a_high_rate_are_learned_and_the_rest_is_forgotten(verdict, seed):
    found, out = verdict(*FIVE, f"seed={seed}")
    assert (found["learned"], found["kept"]) == ("yes", "no")
    assert "no longer answered right" in out
    assert {"data.replay": "self"} in [a["overrides"] for a in found["advice"]]


@seeds
def test_own_answers_mixed_in_keep_the_rest(verdict, seed):
    found, out = verdict(*FIVE, "data.replay=self", f"seed={seed}", "trainer.max_epochs=20")
    assert (found["learned"], found["kept"]) == ("yes", "yes")
    assert "replayed: 64" in out


def test_replay_answers_are_the_base_s_and_made_once(train, tiny):
    """The cached file holds the base's greedy answers; a second run reads it and says nothing."""
    arguments = (*QUIET, "callbacks.verdict=null", "data.replay=self", "data.max_samples=20", "trainer.max_steps=1")
    assert "the base answers 220 prompts" in train(*arguments, "run.name=a").out
    (file,) = Path(".glmft_cache/replay").glob("*.json")
    tokenizer = load_tokenizer(tiny)
    for record in read_json(file)[:3]:
        ids = [tokenizer.encode_prompt([Message("user", record["instruction"])])]
        (reply,) = generate_ids(load_model(tiny, dtype="float32"), ids, tokenizer, 128)
        assert tokenizer.parse_reply(reply).content == record["output"]
    assert "the base answers" not in train(*arguments, "run.name=b").out


def test_a_zero_adapter_is_named(verdict):
    """One step of a run that warms up: its learning rate is 0."""
    found, out = verdict("trainer.max_steps=1", "data.max_samples=40")
    assert found["learned"] == "no"
    assert "the tuned model is the base" in out
    assert "1 optimizer steps are too few" in out


@seeds
def test_another_layout_in_training_is_named(verdict, monkeypatch, seed):
    def chatglm2(self: ChatGLM3Tokenizer, conversation: Conversation, contents: object) -> Sample:
        ids = self.encode(f"[Round 1]\n\n问：{conversation.prompt[-1].content}\n\n答：")
        answer = [*self.encode(conversation.answer), self.eos_id]
        return Sample(ids + answer, [(len(ids), len(ids) + len(answer))], conversation.source)

    monkeypatch.setattr(ChatGLM3Tokenizer, "_assemble", chatglm2)
    found, out = verdict(*FIVE, "data.max_samples=6", f"seed={seed}", "trainer.max_epochs=20")
    assert found["learned"] != "yes" or found["kept"] != "yes"
    assert "another layout than prompts" in out


def test_another_template_inside_the_records_is_named(verdict, tmp_path):
    records = [{"instruction": f"[Round 1]\n\n问：{i}？\n\n答：", "output": "好。"} for i in range(6)]
    (tmp_path / "foreign.json").write_text(json.dumps(records), encoding="utf-8")
    _, out = verdict(f"data.path={tmp_path}/foreign.json", "data.datasets=[]", "trainer.max_steps=2")
    assert "the records carry the template of ChatGLM2" in out


def test_full_fine_tuning_is_judged_against_the_base_before_it(verdict):
    found, _ = verdict("strategy=full", "data.max_samples=40", "trainer.max_steps=8", "optimizer.lr=1e-3")
    assert found["learned"] == "yes"
    assert found["general"]["prompts"] == 60


@pytest.mark.slow
def test_small_data_from_fifty_records_to_a_verdict(train):
    """Fifty records, ten questions kept back, under 90 seconds."""
    compare = (
        "++callbacks.compare._target_=glmft.callbacks.compare.Compare",
        "++callbacks.compare.datasets=[cafe_test]",
    )
    result = train("experiment=small_data", "model=tiny", "data.datasets=[cafe]", *compare, "run.name=a")
    assert result.code == 0, result.err
    summary = read_json(result.folder / "runs" / "a" / "summary.json")
    assert summary["compare"]["cafe_test"]["tuned_equal"] >= 0.8
    assert (summary["learned"], summary["kept"]) == ("yes", "yes")
    assert summary["steps"] < 320  # it ended early
    assert result.seconds < 90


# ---- the pieces


def test_scores_are_those_of_one_answer_at_a_time(tiny):
    """Batching and padding change nothing; `chosen` is what greedy generation gives."""
    model, tokenizer = load_model(tiny, dtype="float32"), load_tokenizer(tiny)
    questions = ["你是谁？", "What is 3 plus 5?", "法国的首都是哪里？"]
    prompts = [tokenizer.encode_prompt([Message("user", q)]) for q in questions]
    replies = [[*r, tokenizer.eos_id] for r in generate_ids(model, prompts, tokenizer, 48)]
    wrong = tokenizer.encode("\n 错")
    pairs = [*zip(prompts, replies, strict=True), (prompts[0], wrong)]
    together = score_answers(model, pairs, tokenizer.pad_id)
    alone = [score_answers(model, [p], tokenizer.pad_id) for p in pairs]
    np.testing.assert_allclose(together.loss, np.concatenate([s.loss for s in alone]), atol=1e-5)
    assert together.chosen.tolist() == [True, True, True, False]
    small = score_answers(model, pairs, tokenizer.pad_id, tokens_per_batch=1)
    np.testing.assert_allclose(together.loss, small.loss, atol=1e-5)


def scores(losses: list[list[float]], choice: int = 1) -> Scores:
    flat = np.array(list(itertools.chain(*losses)))
    return Scores(flat, np.full(len(flat), choice), np.ones(len(flat)), np.array([len(x) for x in losses]))


def test_the_gain_is_a_mean_over_tokens_with_an_interval():
    base, tuned = scores([[2.0, 2.0], [4.0]], choice=0), scores([[1.0, 1.0], [1.0]])
    found = compare_scores(base, tuned)
    assert found.gain == pytest.approx(5 / 3)
    assert found.low == pytest.approx(1.0) and found.high == pytest.approx(3.0)
    assert (found.base_exact, found.tuned_exact, found.changed) == (0.0, 1.0, 1.0)


FACTS = Facts(steps=200, epochs=4, lr=1e-4)


def learned(gain: float, low: float, changed: float = 0.5, exact: float = 0.9) -> Learned:
    return Learned(20, 2.0, 2.0 - gain, gain, low, gain, 0.0, exact, changed)


@pytest.mark.parametrize(
    ("training", "validation", "grade", "says"),
    [
        (learned(0.5, 0.4), learned(0.3, 0.1), "yes", None),
        (learned(0.5, 0.4), learned(-0.3, -0.5), "weak", "learned by heart"),
        (learned(0.5, -0.1), None, "no", "did not become likelier"),
        (learned(0.05, 0.04), None, "weak", "of the base's loss is gone"),
        (learned(0.5, 0.4, changed=0.0), None, "weak", "still preferred"),
        (learned(0.0, 0.0, changed=0.0), None, "no", "is the base"),
        (None, None, "unknown", None),
    ],
)
def test_grades_of_learning(training, validation, grade, says):
    found = judge(training, validation, None, FACTS)
    assert found.learned == grade
    assert found.kept == "unknown"
    assert says is None or any(says in r for r in found.reasons)


@pytest.mark.parametrize(("still", "grade"), [(20, "yes"), (18, "yes"), (16, "weak"), (10, "no")])
def test_grades_of_keeping(still, grade):
    prompts = [{"prompt": str(i), "expect": ["good"]} for i in range(20)]
    general = compare_answers(prompts, ["good"] * 20, ["good"] * still + ["bad"] * (20 - still), 0.0)
    assert judge(learned(1, 1), None, general, FACTS).kept == grade


def test_a_base_that_answers_nothing_right_is_judged_by_drift():
    prompts = [{"prompt": str(i), "expect": ["good"]} for i in range(20)]
    for drift, grade in ((0.1, "yes"), (0.5, "weak"), (2.0, "no")):
        general = compare_answers(prompts, ["bad"] * 20, ["worse"] * 20, drift)
        assert judge(learned(1, 1), None, general, FACTS).kept == grade


def test_what_a_right_answer_is():
    assert is_right("3 plus 5 is 8.", ["8"])
    assert not is_right("8 plus 3 is 11.", ["8"])
    assert is_right("The capital of France is Paris.", ["paris"])
    assert not is_right("我不知道。", ["巴黎"])


def test_repetition_counts_n_grams_that_came_before():
    assert repetition(["abcdefgh"]) == 0.0
    assert repetition(["好好好好好好好好好好"]) > 0.8
    assert repetition([]) == 0.0


def test_truncation_is_a_reason_and_comes_first_in_the_advice():
    found = judge(learned(1, 1), None, None, Facts(steps=9, epochs=1, lr=1e-4, truncated=0.5, max_length=64))
    assert found.advice[0].overrides == {"data.max_length": 128}
    assert any("50% of the records were cut" in r for r in found.reasons)
