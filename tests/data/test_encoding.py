"""Length policies, what is learned, and the marks of damaged text."""

from __future__ import annotations

import pytest

from glmft.data.encoding import CUT, SPLIT, SPLIT_LESS, TooLong, damage, limit_length, supervise
from glmft.messages import Conversation, Message
from glmft.models import load_tokenizer

pytestmark = pytest.mark.share("data")
THREE = Conversation(
    (
        Message("system", "你是谁"),
        Message("user", "早"),
        Message("assistant", "你好"),
        Message("user", "你好"),
        Message("assistant", "谢谢"),
        Message("user", "再见"),
        Message("assistant", "再见。" * 3),
    )
)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


def seen(tokenizer, sample) -> str:
    return tokenizer.render(sample, color=False).replace("<0x0A>", "⏎")


def limited(tokenizer, conversation, max_length, policy):
    sample = tokenizer.encode_conversation(conversation)
    return limit_length(sample, conversation, tokenizer, max_length, policy)


def test_a_cut_answer_does_not_teach_the_end(tokenizer):
    pair = Conversation((Message("user", "你好"), Message("assistant", "谢谢" * 20)))
    prompt = len(tokenizer.encode_prompt(pair.prompt))
    (cut,), event = limited(tokenizer, pair, prompt + 5, "truncate")
    assert (len(cut), cut.num_supervised, event) == (prompt + 5, 5, CUT)
    assert tokenizer.eos_id not in cut.input_ids
    assert limited(tokenizer, pair, prompt, "truncate") == ([], "dropped: no answer token left within max_length")
    assert limited(tokenizer, pair, 10, "drop") == ([], "dropped: longer than max_length")
    with pytest.raises(TooLong, match=r"data\.max_length=10"):
        limited(tokenizer, pair, 10, "error")


def test_nothing_stands_behind_the_last_learned_token(tokenizer):
    whole = tokenizer.encode_conversation(THREE)
    last_question = whole.supervised[-1][0] - 1
    (cut,), _ = limited(tokenizer, THREE, last_question, "truncate")
    assert cut.supervised[-1][1] == len(cut)
    assert seen(tokenizer, cut).endswith("<|assistant|>«▁⏎▁谢谢<|user|>»")


@pytest.mark.parametrize("policy", ["truncate", "drop", "split_turns"])
@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_no_sample_is_without_an_answer(tokenizer, policy, train_on_prompt):
    whole = len(tokenizer.encode_conversation(THREE))
    for max_length in range(1, whole + 1):
        conversation = supervise(THREE, train_on_prompt, False)
        for sample in limited(tokenizer, conversation, max_length, policy)[0]:
            answer = sample.input_ids.index(tokenizer.role_ids["assistant"])
            assert len(sample) <= max_length
            assert any(end > answer + 1 for _, end in sample.supervised)
            assert sample.num_supervised > 0


def test_split_between_turns_learns_every_answer_once(tokenizer):
    whole = tokenizer.encode_conversation(THREE)
    parts, event = limited(tokenizer, THREE, len(whole) - 1, "split_turns")
    assert event == SPLIT
    system = "[gMASK]sop<|system|>▁⏎▁你是谁"
    assert [seen(tokenizer, p) for p in parts] == [
        f"{system}<|user|>▁⏎▁早<|assistant|>«▁⏎▁你好<|user|>»▁⏎▁你好<|assistant|>«▁⏎▁谢谢</s>»",
        f"{system}<|user|>▁⏎▁再见<|assistant|>«▁⏎▁再见。再见。再见。</s>»",
    ]


def test_a_turn_that_is_too_long_is_left_out_of_a_split(tokenizer):
    long = Conversation((*THREE.messages[1:3], Message("user", "你好" * 40), Message("assistant", "谢谢")))
    parts, event = limited(tokenizer, long, 30, "split_turns")
    assert (len(parts), event) == (1, SPLIT_LESS)
    assert limited(tokenizer, Conversation(long.messages[2:]), 30, "split_turns")[1].startswith(
        "dropped: a single turn"
    )


def test_train_on_prompt_learns_everything_after_the_first_role(tokenizer):
    shown = seen(tokenizer, tokenizer.encode_conversation(supervise(THREE, True, False)))
    assert shown.startswith("[gMASK]sop<|system|>«▁⏎▁你是谁<|user|>▁⏎▁早<|assistant|>▁⏎▁你好")
    assert shown.count("«") == 1


def test_mask_history_learns_only_the_last_round(tokenizer):
    shown = seen(tokenizer, tokenizer.encode_conversation(supervise(THREE, False, True)))
    assert shown.count("«") == 1
    assert shown.endswith("<|assistant|>«▁⏎▁再见。再见。再见。</s>»")


def test_flags_of_a_record_stand_above_the_policies(tokenizer):
    messages = list(THREE.messages)
    messages[2] = Message("assistant", "你好", learn=True)
    shown = seen(tokenizer, tokenizer.encode_conversation(supervise(Conversation(tuple(messages)), False, True)))
    assert "«▁⏎▁你好<|user|>»" in shown
    messages[6] = Message("assistant", "再见。", learn=False)
    sample = tokenizer.encode_conversation(supervise(Conversation(tuple(messages)), False, True))
    assert len(sample.supervised) == 1


@pytest.mark.parametrize("text", ["ä½\u00a0å¥½", "itâ€™s", "cafÃ©", "锟斤拷", "a\ufffd"])
def test_damaged_text_is_noticed(text):
    assert damage(Conversation((Message("user", text),)))


@pytest.mark.parametrize(
    "text", ["你好，世界！", "it’s a café, à Paris — naïve", "«Ä», “quoted”", "Straße 5 €", "l'été à l'âge"]
)
def test_good_text_is_not(text):
    assert not damage(Conversation((Message("user", text),)))
