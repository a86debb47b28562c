"""transformers' own tokenizer files give the ids of SentencePiece, and the template those of the published rule."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
from conftest import reference

from glmft.models import load_model, load_tokenizer, save_model
from glmft.models.fast import fast_tokenizer
from glmft.models.tokenizer import TOOLS_PROMPT

pytestmark = pytest.mark.share("use")
PARTS = (
    *(
        "philosophy people sop eop soporific",
        " ",
        "  ",
        "    ",
        "\n",
        "\r\n",
        "\t",
        "你好",
        "，",
        "。",
        "中文 English 混排",
    ),
    *(
        "<|user|>",
        "<|assistant|>",
        "[gMASK]",
        "</s>",
        "<unk>",
        "<0x0A>",
        "\u2581",
        "🙂",
        "👨\u200d👩\u200d👧",
        "é",
        "ñ",
        "Ω",
    ),
    *(
        "русский",
        "العربية",
        "हिन्दी",
        "日本語",
        "한국어",
        "\u200b",
        "\ufeff",
        "123",
        "3.14",
        "def f(x):\n    return x",
        "\x01",
    ),
    *("http://a.b/c?d=e", "'", '"', "\\", "ﬁ", "\u0301", "𠮷", "a" * 50, "soppy", "eop.", "sop"),
)


def strings(texts: list[str], count: int):
    """Mixed scripts, spaces, control text, emoji, cuts of real text, any character."""
    rng = random.Random(0)
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 12)):
            kind, text = rng.random(), rng.choice(texts)
            at = rng.randrange(max(1, len(text)))
            own = text[at : at + rng.randrange(1, 25)] if kind < 0.25 else chr(rng.randrange(1, 0x3000))
            parts.append(rng.choice(PARTS) if kind > 0.4 else own)
        yield "".join(parts)


@pytest.mark.parametrize(("which", "count"), [("tiny", 20_000), ("published", 100_000)])
def test_ids_are_those_of_sentencepiece(tiny, which, count):
    tokenizer = load_tokenizer(tiny if which == "tiny" else reference("data/chatglm3-tokenizer"))
    fast = fast_tokenizer(tokenizer, 8192)
    texts = list(PARTS)
    if which == "published":
        records = json.loads(reference("data/alpaca_zh_demo.json").read_text(encoding="utf-8"))
        records += json.loads(reference("data/identity.json").read_text(encoding="utf-8"))
        texts = [r[k] for r in records for k in ("instruction", "input", "output")]
        assert len(texts) > 3000
    wrong = []
    for text in (*texts, *strings(texts, count)):
        ids = fast(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if ids != tokenizer.encode(text):
            wrong.append(text)
    assert wrong == []


def test_control_tokens_have_their_ids_and_words_stay_words(tiny):
    tokenizer = load_tokenizer(tiny)
    fast = fast_tokenizer(tokenizer, 512)
    for name, i in tokenizer.control_ids.items():
        assert fast.convert_tokens_to_ids(name) == i
    assert (fast.eos_token_id, fast.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert fast("philosophy", add_special_tokens=False)["input_ids"] == tokenizer.encode("philosophy")
    assert len(fast) == len(tokenizer)
    assert fast("hi")["input_ids"] == [
        tokenizer.control_ids["[gMASK]"],
        tokenizer.control_ids["sop"],
        *tokenizer.encode("hi"),
    ]
    for text in ("你好 world", "  a  b\nc", "🙂x"):
        assert fast.decode(tokenizer.encode(text)) == text


def test_the_template_gives_the_published_ids():
    golden = json.loads(reference("golden/chat-template/expected.json").read_text(encoding="utf-8"))
    fast = fast_tokenizer(load_tokenizer(reference("data/chatglm3-tokenizer")), 8192)
    compared = 0
    for section, cases in golden.items():
        for name, case in cases.items():
            if name == "special_text_is_plain_text":  # what a text format cannot keep apart
                continue
            asks = section != "training"
            ids = fast.apply_chat_template(case["messages"], add_generation_prompt=asks, return_dict=False)
            assert ids == (case["input_ids"] if asks else case["input_ids"][:-1]), name
            compared += 1
    assert compared >= 12


def test_tools_as_programs_hand_them_over(tiny):
    """OpenAI's form, put before the conversation or into its system message."""
    tokenizer = load_tokenizer(tiny)
    fast = fast_tokenizer(tokenizer, 512)
    own = {"name": "weather", "parameters": {"type": "object"}}
    asked = [{"role": "user", "content": "hi"}]
    tools = [{"type": "function", "function": own}]
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        ids = fast.apply_chat_template([*system, *asked], tools=tools, add_generation_prompt=True, return_dict=False)
        first = {"role": "system", "content": system[0]["content"] if system else TOOLS_PROMPT, "tools": [own]}
        assert ids == tokenizer.encode_prompt([first, *asked])


@pytest.mark.parametrize("layout", ["glm_hf", "chatglm"])
def test_a_process_without_glmft_reads_it(tiny, tmp_path, layout):
    tokenizer = load_tokenizer(tiny)
    save_model(load_model(tiny, dtype="float32"), tmp_path / "m", layout, tokenizer)
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == tokenizer.model_file.read_bytes()
    assert "auto_map" not in (tmp_path / "m" / "tokenizer_config.json").read_text()
    code = (
        "import sys, json; from transformers import AutoTokenizer, GenerationConfig\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); asked = [{'role': 'user', 'content': '你是谁？'}]\n"
        "ids = t.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)\n"
        "print(json.dumps([ids, GenerationConfig.from_pretrained(sys.argv[1]).eos_token_id]))\n"
        "assert 'glmft' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    ids, stops = json.loads(done.stdout.splitlines()[-1])
    assert ids == tokenizer.encode_prompt([{"role": "user", "content": "你是谁？"}])
    assert stops == tokenizer.stop_ids
