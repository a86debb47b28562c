"""Bad data, one line a kind: file name, content, further overrides, exit code, what the message holds.

Content is text, bytes, a list of records (written as JSON), or a function that makes the files. Every message names
the file, the record or key, what came, and what is allowed or what to do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Q, A = ("human", "问"), ("gpt", "答")


class Bad(NamedTuple):
    file: str
    content: Any
    says: list[str]
    overrides: tuple[str, ...] = ()
    code: int = 2


def alpaca(**fields: Any) -> list[dict[str, Any]]:
    """A good record, then a bad one."""
    good = {"instruction": "问", "input": "", "output": "答"}
    return [good, {k: v for k, v in (good | fields).items() if v is not ...}]


def sharegpt(*turns: tuple[str, Any], **more: Any) -> list[dict[str, Any]]:
    good = {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}
    return [good, {"conversations": [{"from": r, "value": t} for r, t in turns], **more}]


def openai(*messages: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    good = {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}
    return [good, {"messages": list(messages), **more}]


def call(name: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": name, "arguments": "{}", **more}}]}


def files(**contents: str | bytes) -> Callable[[], None]:
    """Several files; `__` stands for a slash, `_DOT_` for a dot."""

    def write() -> None:
        for name, content in contents.items():
            path = Path(name.replace("__", "/").replace("_DOT_", "."))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


GOOD = json.dumps(alpaca())
USER = {"role": "user", "content": "问"}
TOOLS = [{"name": "weather"}]
REGISTRY = ("data.path=null", "data.datasets=[mine]")
BAD: dict[str, Bad] = {
    # ---- files
    "missing file": Bad("no.json", files(), ["data.path=no.json: no such file", "tried no.json, data/no.json"]),
    "empty folder": Bad("folder", files(folder__a_DOT_md="x"), ["folder: no data file (.json, .jsonl"]),
    "mixed types in a folder": Bad(
        "folder",
        files(folder__a_DOT_json=GOOD, folder__b_DOT_csv="a,b\n1,2"),
        ["folder holds files of several types: .csv, .json; keep one of them"],
    ),
    "empty file": Bad("a.json", "", ["a.json: empty; expected a JSON list of records"]),
    "only spaces": Bad("a.jsonl", " \n\n ", ["a.jsonl: no record in it; every line is blank"]),
    "empty list": Bad("a.json", "[]", ["a.json: an empty list, there is nothing to train on"]),
    "top level null": Bad("a.json", "null", ["a.json: holds null, expected a list of records"]),
    "top level text": Bad("a.json", '"a"', ["a.json: holds text, expected a list of records"]),
    "top level object": Bad("a.json", '{"a": []}', ["a.json: holds an object, expected a list of records"]),
    "not JSON": Bad("a.json", "[{]", ["a.json:1:3: not valid JSON: Expecting property name"]),
    "truncated JSON": Bad(
        "a.json", GOOD[:-20] + '"', ["a.json:1:", "not valid JSON", "the file ends here: it is cut off"]
    ),
    "trailing comma": Bad("a.json", GOOD[:-1] + ",]", ["a.json:1:", "not valid JSON: Expecting value"]),
    "no comma between records": Bad("a.json", GOOD.replace("}, {", "} {"), ["a.json:1:", "Expecting ',' or ']'"]),
    "text after the list": Bad("a.json", GOOD + "\nmore", ["a.json:2:1: not valid JSON: text after the end"]),
    "single quotes": Bad("a.json", "[{'a': 1}]", ["a.json:1:3: not valid JSON", "a text stands in \", not in '"]),
    "JSONL named .json": Bad("a.json", '{"a": 1}\n{"a": 2}', ["a.json: one object after the other is JSONL", ".jsonl"]),
    "UTF-16": Bad("a.json", GOOD.encode("utf-16"), ["a.json: UTF-16, expected UTF-8", "iconv -f UTF-16 -t UTF-8"]),
    "GBK": Bad("a.json", "问".encode("gbk"), ["a.json: not UTF-8 (byte 0)", "iconv -f GBK -t UTF-8"]),
    "NUL bytes": Bad("a.json", GOOD.encode() + b"\0", [f"a.json: byte {len(GOOD)} is NUL, so this is no text"]),
    "an archive": Bad("a.zip", b"PK", ["a.zip: an archive (.zip) is not opened; unpack it"]),
    "a pickle": Bad("a.pkl", b"\x80", ["a.pkl: .pkl files can run code and are not read; save the records as JSON"]),
    "another kind of file": Bad("a.jsonn", GOOD, ["a.jsonn: '.jsonn' files are not read, did you mean '.json'"]),
    "plain text": Bad("a.txt", "一行", ["a.txt: plain text, which holds no answers to learn"]),
    "nested too deeply": Bad("a.json", "[" * 100_000, ["a.json: nested too deeply to be a list of records"]),
    "a number of 5,000 digits": Bad(
        "a.json", f"[{'1' * 5000}]", ["a.json:1:2: not valid JSON: a number of more digits"]
    ),
    "not a Parquet file": Bad("a.parquet", b"PAR1", ["a.parquet: not a readable Parquet file"]),
    "not an Arrow file": Bad("a.arrow", b"ARROW", ["a.arrow: not a readable Arrow file"]),
    "a format that is not known": Bad(
        "a.json", [{"frage": "a", "antwort": "b"}], ["a.json: the first record looks like no known format", "'frage'"]
    ),
    "CSV without a header": Bad("a.csv", "a,a\n1,2", ["a.csv:1: column names must be there and differ: a, a"]),
    "CSV with a quote left open": Bad("a.csv", 'instruction,output\n"a,b', ["a.csv:2: not valid CSV: unexpected end"]),
    # ---- records
    "ragged row": Bad(
        "a.csv", "instruction,output\na,b\nc\n", ["a.csv: record 2 (line 3): 1 cells, but the header names 2 columns"]
    ),
    "a bad line": Bad(
        "a.jsonl", GOOD[1:-1].split(", {")[0] + '\n{"a"', ["a.jsonl: record 2 (line 2): not valid JSON", "(column 5)"]
    ),
    "two records on a line": Bad(
        "a.jsonl", json.dumps(alpaca()[0]) + " {}", ["a.jsonl: record 1 (line 1): goes on after its record"]
    ),
    "record not an object": Bad("a.json", [*alpaca(), 1], ["a.json: record 3: is a number, expected an object"]),
    "missing key": Bad(
        "a.json", alpaca(output=..., ouput="b"), ["record 2: 'output' is missing, did you mean 'ouput'?"]
    ),
    "null": Bad("a.json", alpaca(output=None), ["a.json: record 2: 'output' is null, expected text"]),
    "number": Bad("a.json", alpaca(instruction=3), ["record 2: 'instruction' is a number (3), expected text"]),
    "list": Bad("a.json", alpaca(output=["a"]), ["record 2: 'output' is a list ([\"a\"]), expected text"]),
    "nested object": Bad(
        "a.json", alpaca(input={"a": 1}), ["record 2: 'input' is an object ({\"a\": 1}), expected text"]
    ),
    "true": Bad("a.json", alpaca(output=True), ["record 2: 'output' is true or false (true), expected text"]),
    "NaN": Bad("a.json", GOOD.replace('"input": ""', '"input": NaN', 1), ["record 1: NaN is not JSON, and no text"]),
    "infinite number": Bad(
        "a.json", alpaca() and GOOD.replace('""', "1e400", 1), ["record 1: the number 1e400 is too large"]
    ),
    "repeated key": Bad(
        "a.json", GOOD.replace('"input"', '"output"', 1), ["record 1: 'output' stands there twice; only one value"]
    ),
    "nothing asked": Bad("a.json", alpaca(instruction=""), ["record 2: 'instruction' and 'input' are both empty"]),
    "empty output": Bad("a.json", alpaca(output=" \n"), ["record 2: 'output' is empty: there is no answer to learn"]),
    "history not a list": Bad(
        "a.json", alpaca(history="a"), ["record 2: 'history' must be a list of [question, answer] pairs of text"]
    ),
    "history not pairs": Bad(
        "a.json", alpaca(history=[["a", "b"], ["c"]]), ["record 2: 'history' must", "see history[1]"]
    ),
    "lone surrogate": Bad(
        "a.json",
        alpaca(output="\ud800"),
        ["record 2: message 2 (assistant), character 1: half of a surrogate pair (U+D800)"],
    ),
    "control character": Bad(
        "a.json", alpaca(instruction="a\0"), ["record 2: message 1 (user), character 2: a control character (U+0000)"]
    ),
    "unknown role": Bad(
        "a.json",
        sharegpt(("humann", "问"), A),
        ["conversations[0].'from' is 'humann', did you mean 'human'?", "allowed: "],
    ),
    "two questions in a row": Bad(
        "a.json", sharegpt(Q, Q, A), ["record 2: message 2 is the user's, after the user; an answer"]
    ),
    "answer first": Bad("a.json", sharegpt(A, Q, A), ["record 2: message 1 is an answer to nothing; a user message"]),
    "odd number of turns": Bad(
        "a.json", sharegpt(Q, A, Q), ["record 2: ends with the user: the last message must be an answer"]
    ),
    "system not first": Bad(
        "a.json", sharegpt(Q, A, ("system", "s"), Q, A), ["record 2: conversations[2].'from' is a system message"]
    ),
    "openai system not first": Bad(
        "a.json",
        openai(USER, {"role": "assistant", "content": "答"}, {"role": "system", "content": "s"}),
        ["record 2: message 3 is a system message, allowed only as the first"],
    ),
    "empty question": Bad("a.json", sharegpt(("human", " "), A), ["record 2: message 1 is an empty question"]),
    "empty answer": Bad("a.json", sharegpt(Q, ("gpt", "")), ["record 2: message 2 is an empty answer"]),
    "no messages": Bad(
        "a.json", [*sharegpt(Q, A), {"conversations": []}], ["record 3: 'conversations' is an empty list"]
    ),
    "messages not a list": Bad(
        "a.json",
        [*sharegpt(Q, A), {"conversations": "a"}],
        ["record 3: 'conversations' is text, expected a list of messages"],
    ),
    "message not an object": Bad(
        "a.json",
        [*sharegpt(Q, A), {"conversations": [1]}],
        ["record 3: conversations[0] is a number, expected an object"],
    ),
    "training flag": Bad(
        "a.json",
        [*sharegpt(Q, A), {"conversations": [{"from": "human", "value": "a", "train": "yes"}]}],
        ["record 3: conversations[0].'train' is \"yes\", expected true or false"],
    ),
    "tool call without tools": Bad(
        "a.json",
        sharegpt(Q, ("function_call", '{"name": "weather", "arguments": {}}'), ("observation", "晴"), A),
        ["record 2: message 2 calls 'weather', but the record declares no 'tools'"],
    ),
    "unknown tool": Bad(
        "a.json",
        sharegpt(Q, ("function_call", '{"name": "wether"}'), ("observation", "晴"), A, tools='[{"name": "weather"}]'),
        ["record 2: message 3 calls 'wether', did you mean 'weather'?; declared: weather"],
    ),
    "tools not JSON": Bad("a.json", sharegpt(Q, A, tools="[{"), ["record 2: 'tools' is not valid JSON"]),
    "tools not a list": Bad(
        "a.json", sharegpt(Q, A, tools={"a": 1}), ["record 2: 'tools' is an object, expected a list of tools"]
    ),
    "tool without a name": Bad(
        "a.json",
        sharegpt(Q, A, tools=[{"a": 1}]),
        ["record 2: 'tools' holds {\"a\": 1}, expected an object with 'name'"],
    ),
    "call not JSON": Bad(
        "a.json", sharegpt(Q, ("function_call", "weather()"), A), ["record 2: conversations[1].value is not valid JSON"]
    ),
    "call without a name": Bad(
        "a.json", sharegpt(Q, ("function_call", "{}"), A), ['record 2: conversations[1].value: {}, expected {"name"']
    ),
    "arguments not an object": Bad(
        "a.json",
        openai(USER, call("weather", arguments="[1]"), tools=TOOLS),
        ["record 2: messages[1].tool_calls: arguments of 'weather' are a list, expected an object"],
    ),
    "argument that is no name": Bad(
        "a.json",
        openai(USER, call("weather", arguments='{"a b": 1}'), tools=TOOLS),
        ["record 2: tool 'weather': argument \"a b\" is not a plain name"],
    ),
    "observation without a call": Bad(
        "a.json",
        sharegpt(Q, ("observation", "晴"), A),
        ["record 2: message 2 is an observation, but no tool was called"],
    ),
    "result without a call": Bad(
        "a.json",
        openai(USER, {"role": "tool", "content": "晴"}),
        ["record 2: messages[1].'role' is a result, but no tool was called"],
    ),
    "result of another call": Bad(
        "a.json",
        openai(USER, call("weather"), {"role": "tool", "content": "晴", "tool_call_id": "7"}, tools=TOOLS),
        ["record 2: messages[2].'tool_call_id' is '7', which was not called (1)"],
    ),
    "call without a result": Bad(
        "a.json",
        openai(USER, call("weather"), USER, tools=TOOLS),
        ["record 2: messages[2]: the call of 'weather' has no result"],
    ),
    "tool_calls not a list": Bad(
        "a.json",
        openai(USER, {"role": "assistant", "tool_calls": "a"}),
        ["record 2: messages[1].'tool_calls' is text, expected a list"],
    ),
    "a record of 5 MB": Bad(
        "a.json",
        alpaca(output="谢谢" * 800_000),
        ["a.json: record 2: 1600", "tokens, data.max_length=128; raise it, or choose another on_too_long"],
        ("data.on_too_long=error",),
    ),
    "half a character in a tool": Bad(
        "a.json",
        sharegpt(Q, A, tools=[{"name": "a\ud800"}]),
        ["record 2: tools, character 13: half of a surrogate pair (U+D800)"],
    ),
    "tools nested too deeply": Bad(
        "a.json", sharegpt(Q, A, tools="[" * 100_000), ["record 2: 'tools' is not valid JSON (maximum recursion depth"]
    ),
    # ---- nothing left
    "no usable record": Bad(
        "a.json",
        alpaca(output=None)[1:],
        ["no record is left to train on (1 bad record: null)"],
        ("data.on_bad_record=drop",),
    ),
    "the prompt alone is too long": Bad(
        "a.json",
        alpaca(instruction="你好" * 200)[1:],
        ["no record is left", "1 no answer token left within max_length"],
    ),
    "a single turn too long": Bad(
        "a.json",
        alpaca(instruction="你好" * 200)[1:],
        ["no record is left to train on (1 a single turn is longer than max_length)"],
        ("data.on_too_long=split_turns",),
    ),
    # ---- registries and mixes
    "a name twice in the registry": Bad(
        "",
        files(dataset_info_DOT_json='{"mine": {}, "mine": {}}'),
        ["dataset_info.json: 'mine' stands there twice"],
        REGISTRY,
    ),
    "a registry that is no JSON": Bad(
        "", files(dataset_info_DOT_json="{"), ["dataset_info.json: not valid JSON"], REGISTRY
    ),
    "a registry that is a list": Bad(
        "", files(dataset_info_DOT_json="[]"), ["dataset_info.json: expected an object of data sets"], REGISTRY
    ),
    "a path out of its folder": Bad(
        "",
        files(dataset_info_DOT_json='{"mine": {"file_name": "../a.json"}}'),
        ["'mine': file_name '../a.json' lies outside the registry's folder"],
        REGISTRY,
    ),
    "num_samples larger than the set": Bad(
        "",
        files(dataset_info_DOT_json='{"mine": {"file_name": "a.json", "num_samples": 9}}', a_DOT_json=GOOD),
        ["'mine': num_samples is 9, but there are 2 records"],
        REGISTRY,
    ),
    "a validation set of which nothing is left": Bad(
        "",
        files(
            dataset_info_DOT_json='{"mine": {"file_name": "a.json"}}',
            a_DOT_json=json.dumps(alpaca(instruction="你好" * 200)[1:]),
        ),
        ["data.val_datasets: no record of 'mine' is left to validate on (1 longer than max_length)"],
        ("data.path=null", "data.datasets=[tiny_keep]", "data.val_datasets=[mine]", "data.on_too_long=drop"),
    ),
    "policies that contradict": Bad(
        "a.json",
        GOOD,
        ["data.train_on_prompt and data.mask_history contradict each other; choose one"],
        ("data.train_on_prompt=true", "data.mask_history=true"),
    ),
    "weights that do not sum": Bad(
        "",
        files(),
        ["data.mix_weights: the weights sum to 0.9, expected 1"],
        (
            "data.path=null",
            "data.datasets=[tiny_identity,tiny_keep]",
            "data.mix=interleave",
            "data.mix_weights=[0.5,0.4]",
        ),
    ),
    "a weight too few": Bad(
        "",
        files(),
        ["data.mix_weights: 1 weights for 2 data sets"],
        ("data.path=null", "data.datasets=[tiny_identity,tiny_keep]", "data.mix=interleave", "data.mix_weights=[1]"),
    ),
    "a weight for no set": Bad(
        "",
        files(),
        ["data.mix_weights: 'tiny_kept' is none of data.datasets, did you mean 'tiny_keep'?"],
        ("data.path=null", "data.datasets=[tiny_keep]", "data.mix=interleave", "+data.mix_weights={tiny_kept:1}"),
    ),
    "max_samples of no set": Bad(
        "a.json", GOOD, ["data.max_samples: 'b' is none of the data sets"], ("+data.max_samples={b:1}",)
    ),
    "a set named twice": Bad(
        "",
        files(),
        ["data: two sets are called 'tiny'; leave one out or rename it"],
        ("data.path=null", "data.datasets=[tiny,tiny]"),
    ),
}
