"""Every format: what a record becomes, as the model sees it. Learned tokens stand in «»."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmft.data.encoding import conversation_of
from glmft.data.formats import FORMATS
from glmft.data.records import RecordError
from glmft.data.registry import DatasetEntry, detect_format
from glmft.data.writing import WRITERS
from glmft.messages import Conversation, Message
from glmft.models import load_tokenizer

pytestmark = pytest.mark.share("data")
TOOL = {"name": "weather", "description": "查天气", "parameters": {"city": {"type": "string"}}}
CALL = "```python\ntool_call(city='北京', days=2)\n```"
ONE = "[gMASK]sop<|user|>▁⏎▁你好<|assistant|>«▁⏎▁谢谢</s>»"
TWO = "[gMASK]sop<|user|>▁⏎▁早<|assistant|>«▁⏎▁你好<|user|>»▁⏎▁你好<|assistant|>«▁⏎▁谢谢</s>»"
SYSTEM = "[gMASK]sop<|system|>▁⏎▁你是谁<|user|>▁⏎▁你好<|assistant|>«▁⏎▁谢谢</s>»"
NAMES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def entry(formatting: str, columns=None, tags=None) -> DatasetEntry:
    return DatasetEntry("x", (Path("x.json"),), formatting, columns or {}, tags or {})


def turns(*pairs: tuple[str, str], role: str = "from", text: str = "value") -> list[dict]:
    return [{role: r, text: t} for r, t in pairs]


def messages(*pairs: tuple[str, str]) -> list[dict]:
    return turns(*pairs, role="role", text="content")


CASES = {  # name: (entry, record, what the model sees)
    "alpaca": (entry("alpaca"), {"instruction": "你好", "output": "谢谢"}, ONE),
    "alpaca with history": (
        entry("alpaca"),
        {"instruction": "你好", "input": "", "output": "谢谢", "history": [["早", "你好"]]},
        TWO,
    ),
    "alpaca with a system": (entry("alpaca"), {"instruction": "你好", "output": "谢谢", "system": "你是谁"}, SYSTEM),
    "alpaca, one column renamed": (
        entry("alpaca", {"response": "a"}),
        {"instruction": "你好", "a": "谢谢", "system": "你是谁"},
        SYSTEM,
    ),
    "sharegpt": (entry("sharegpt"), {"conversations": turns(("human", "你好"), ("gpt", "谢谢"))}, ONE),
    "sharegpt with a system turn": (
        entry("sharegpt"),
        {"conversations": turns(("system", "你是谁"), ("human", "你好"), ("gpt", "谢谢"))},
        SYSTEM,
    ),
    "sharegpt with a system column": (
        entry("sharegpt", {"messages": "m", "system": "s"}),
        {"m": turns(("human", "你好"), ("gpt", "谢谢")), "s": "你是谁"},
        SYSTEM,
    ),
    "sharegpt with tags": (
        entry("sharegpt", {"messages": "messages"}, NAMES),
        {"messages": messages(("user", "早"), ("assistant", "你好"), ("user", "你好"), ("assistant", "谢谢"))},
        TWO,
    ),
    "sharegpt, one answer not learned": (
        entry("sharegpt"),
        {
            "conversations": [
                {"from": "human", "value": "早"},
                {"from": "gpt", "value": "你好", "train": False},
                *turns(("human", "你好"), ("gpt", "谢谢")),
            ]
        },
        "[gMASK]sop<|user|>▁⏎▁早<|assistant|>▁⏎▁你好<|user|>▁⏎▁你好<|assistant|>«▁⏎▁谢谢</s>»",
    ),
    "openai": (entry("openai"), {"messages": messages(("user", "你好"), ("assistant", "谢谢"))}, ONE),
    "openai with a system": (
        entry("openai"),
        {"messages": messages(("system", "你是谁"), ("user", "你好"), ("assistant", "谢谢"))},
        SYSTEM,
    ),
    "openai, a weight of 0": (
        entry("openai"),
        {
            "messages": [
                {"role": "user", "content": "早"},
                {"role": "assistant", "content": "你好", "weight": 0},
                *messages(("user", "你好"), ("assistant", "谢谢")),
            ]
        },
        "[gMASK]sop<|user|>▁⏎▁早<|assistant|>▁⏎▁你好<|user|>▁⏎▁你好<|assistant|>«▁⏎▁谢谢</s>»",
    ),
    "thudm": (entry("thudm"), {"conversations": messages(("user", "你好"), ("assistant", "谢谢"))}, ONE),
    "thudm, a question is learned": (
        entry("thudm"),
        {"conversations": [{"role": "user", "content": "你好", "loss": True}, *messages(("assistant", "谢谢"))]},
        "[gMASK]sop<|user|>«▁⏎▁你好<|assistant|>▁⏎▁谢谢</s>»",
    ),
}
WITH_TOOLS = {  # the same conversation in every format that has tools
    "sharegpt": {
        "conversations": turns(
            ("human", "天气"),
            ("function_call", json.dumps({"name": "weather", "arguments": {"city": "北京", "days": 2}})),
            ("observation", "晴"),
            ("gpt", "谢谢"),
        ),
        "tools": json.dumps([TOOL]),
    },
    "openai": {
        "messages": [
            {"role": "user", "content": "天气"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "function": {"name": "weather", "arguments": '{"city": "北京", "days": 2}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "晴"},
            {"role": "assistant", "content": "谢谢"},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    },
    "thudm": {
        "conversations": [
            {"role": "user", "content": "天气"},
            {"role": "tool", "name": "weather", "parameters": {"city": "北京", "days": 2}, "observation": "晴"},
            {"role": "assistant", "content": "谢谢"},
        ],
        "tools": [TOOL],
    },
}


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


def seen(tokenizer, conversation) -> str:
    return tokenizer.render(tokenizer.encode_conversation(conversation), color=False).replace("<0x0A>", "⏎")


@pytest.mark.parametrize("name", CASES)
def test_what_the_model_sees(tokenizer, name):
    kind, record, expected = CASES[name]
    conversation = conversation_of(record, kind, "")
    assert seen(tokenizer, conversation) == expected
    sample = tokenizer.encode_conversation(conversation)
    body = {role: tokenizer.role_ids[role] for role in ("user", "assistant")}
    assert sample.input_ids[:2] == [tokenizer.control_ids["[gMASK]"], tokenizer.control_ids["sop"]]
    assert [i for i in sample.input_ids if i in body.values()].count(body["assistant"]) == expected.count(
        "<|assistant|>"
    )
    assert len(sample.labels) == len(sample.input_ids)


@pytest.mark.parametrize("formatting", WITH_TOOLS)
def test_tools_in_chatglm3s_own_form(formatting):
    conversation = conversation_of(WITH_TOOLS[formatting], entry(formatting), "")
    system, *rest = conversation.messages
    assert system.tools == [TOOL]
    assert system.content.startswith("Answer the following questions")
    assert rest == [
        Message("user", "天气"),
        Message("assistant", CALL, "weather"),
        Message("observation", "晴"),
        Message("assistant", "谢谢"),
    ]


def test_calls_made_together_are_put_before_their_results():
    def call(i: str) -> dict:
        return {"id": i, "function": {"name": "weather", "arguments": json.dumps({"city": i})}}

    record = {
        "messages": [
            {"role": "user", "content": "天气"},
            {"role": "assistant", "content": "我查一下", "tool_calls": [call("a"), call("b")]},
            {"role": "tool", "tool_call_id": "b", "content": "雨"},
            {"role": "tool", "tool_call_id": "a", "content": "晴"},
            {"role": "assistant", "content": "谢谢"},
        ],
        "tools": [TOOL],
    }
    found = conversation_of(record, entry("openai"), "").messages[2:]
    assert [(m.role, m.metadata) for m in found] == [
        ("assistant", ""),
        ("assistant", "weather"),
        ("observation", ""),
        ("assistant", "weather"),
        ("observation", ""),
        ("assistant", ""),
    ]
    assert ("'b'" in found[1].content, found[2].content) == (True, "雨")


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("name", CASES)
def test_written_in_another_format_and_read_again(name, to):
    kind, record, _ = CASES[name]
    conversation = conversation_of(record, kind, "")
    if to == "alpaca" and any(m.learn is not None for m in conversation.messages):
        with pytest.raises(RecordError, match="no train flag per message"):
            WRITERS[to](conversation)
        return
    assert conversation_of(WRITERS[to](conversation), entry(to), "") == conversation


@pytest.mark.parametrize("to", ["sharegpt", "openai"])
@pytest.mark.parametrize("formatting", WITH_TOOLS)
def test_tools_survive_a_change_of_format(formatting, to):
    conversation = conversation_of(WITH_TOOLS[formatting], entry(formatting), "")
    assert conversation_of(WRITERS[to](conversation), entry(to), "") == conversation


def test_the_format_of_a_file_is_found(tmp_path):
    records = {
        "alpaca": CASES["alpaca"][1],
        "sharegpt": CASES["sharegpt"][1],
        "openai": CASES["openai"][1],
        "thudm": CASES["thudm"][1],
    }
    assert set(records) == set(FORMATS)
    for name, record in records.items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps([record]))
        assert detect_format(file) == name


def test_what_another_format_cannot_say_is_refused():
    calls = [Message("assistant", CALL, "weather"), Message("assistant", CALL, "weather"), Message("observation", "晴")]
    tools = Message("system", "s", tools=[TOOL])
    for to in ("sharegpt", "openai"):
        with pytest.raises(RecordError, match="the call of 'weather' has no result"):
            WRITERS[to](Conversation((tools, Message("user", "天气"), *calls, Message("assistant", "谢谢"))))


@pytest.mark.parametrize("to", ["sharegpt", "openai"])
@pytest.mark.parametrize("system", [Message("system", "", tools=[TOOL]), Message("system", "s", learn=True)])
def test_a_system_message_that_is_more_than_text(to, system):
    conversation = Conversation((system, Message("user", "你好"), Message("assistant", "谢谢")))
    assert conversation_of(WRITERS[to](conversation), entry(to), "") == conversation


def test_a_filled_blank_is_checked():
    with pytest.raises(RecordError, match="message 2 is an empty answer"):
        conversation_of({"instruction": "你好", "output": "{{name}}"}, entry("alpaca"), "", {"name": ""})
