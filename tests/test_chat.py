"""Chat, and the engine under it: base and adapters answer side by side as they do alone."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from glmft.artefacts import write_folder
from glmft.chat import Chat, changed, command, main
from glmft.engine import BASE, Engine, Sampling, find_tuned
from glmft.errors import UserError
from glmft.messages import Message
from glmft.models import load_model
from glmft.models.generation import generate_ids
from glmft.strategies.adapter import load_adapter, save_adapter
from glmft.strategies.lora import LoRA

pytestmark = pytest.mark.share("use")
QUESTIONS = ("你是谁？", "Who are you?", "法国的首都是哪里？")


def adapter(tiny: Path, folder: Path, seed: int, **options: object) -> Path:
    """An adapter that changes what is said."""
    torch.manual_seed(seed)
    tuned = LoRA(r=4, **options).apply(load_model(tiny, dtype="float32"))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    base = tuned.get_base_model().base_fingerprint
    write_folder(folder, lambda part: save_adapter(tuned, part, "card"), {"base": base})
    return folder


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [
        adapter(tiny, root / "one", 1),
        adapter(tiny, root / "two.2", 2),
        adapter(tiny, root / "dora", 3, use_dora=True),
    ]


def alone(tiny: Path, folder: Path | None, engine: Engine, question: str) -> list[int]:
    """What a process says that knows only this voice."""
    model = load_model(tiny, dtype="float32").eval()
    if folder is not None:
        model = load_adapter(model, folder)
    prompt = engine.tokenizer.encode_prompt([Message("user", question)])
    return generate_ids(model, [prompt], engine.tokenizer, 24)[0]


@pytest.mark.parametrize("which", [[0], [0, 1], [2]])
def test_side_by_side_is_what_each_says_alone(tiny, folders, which):
    chosen = [folders[i] for i in which]
    engine = Engine([find_tuned(str(f), str(tiny)) for f in chosen], "float32", "cpu")
    assert engine.names == [BASE, *(f.name for f in chosen)]
    asked = [(voice, [Message("user", q)]) for q in QUESTIONS for voice in engine.names]
    replies = engine.reply(asked, Sampling(max_new_tokens=24))
    expected = [alone(tiny, f, engine, q) for q in QUESTIONS for f in (None, *chosen)]
    assert [r.ids for r in replies] == expected
    assert [r.voice for r in replies] == [v for v, _ in asked]


def test_the_base_stays_the_base(tiny, folders):
    engine = Engine([find_tuned(str(folders[0]), str(tiny))], "float32", "cpu")
    before = engine.reply([(BASE, [Message("user", q)]) for q in QUESTIONS], Sampling(max_new_tokens=24))
    engine.reply([("one", [Message("user", q)]) for q in QUESTIONS], Sampling(max_new_tokens=24))
    after = engine.reply([(BASE, [Message("user", q)]) for q in QUESTIONS], Sampling(max_new_tokens=24))
    assert [r.ids for r in before] == [r.ids for r in after] == [alone(tiny, None, engine, q) for q in QUESTIONS]


@pytest.fixture(scope="module")
def engine(tiny, folders) -> Engine:
    return Engine([find_tuned(str(folders[0]), str(tiny))], "float32", "cpu")


def test_sampling_follows_the_seed(engine):
    asked = [("one", [Message("user", "你好")])]

    def said(seed: int) -> list[int]:
        return engine.reply(asked, Sampling(max_new_tokens=16, temperature=1.5, top_p=1.0, seed=seed))[0].ids

    assert said(1) == said(1)
    assert said(1) != said(2)


def test_an_answer_is_heard_as_it_comes_and_can_be_ended(engine):
    heard: list[str] = []
    (whole,) = engine.reply(
        [(BASE, [Message("user", "你是谁？")])], Sampling(), lambda i, m: heard.append(m.content) or True
    )
    assert heard[-1] == whole.message.content
    assert all(whole.message.content.startswith(h.rstrip("\ufffd")) for h in heard)
    rows = [(BASE, [Message("user", "你是谁？")]), ("one", [Message("user", "你是谁？")])]
    ended, other = engine.reply(rows, Sampling(max_new_tokens=24), lambda i, m: i != 0 or len(m.content) < 3)
    assert (ended.stopped, len(ended.message.content) < len(whole.message.content)) == ("cancelled", True)
    assert other.ids == engine.reply([rows[1]], Sampling(max_new_tokens=24))[0].ids
    assert engine.reply([(BASE, rows[0][1])], Sampling(max_new_tokens=2))[0].stopped == "length"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"temperature": -1}, "temperature must be 0 to 5"),
        ({"temperature": float("nan")}, "temperature must be 0 to 5"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be 0 or more"),
    ],
)
def test_sampling_out_of_range(options, says):
    with pytest.raises(UserError, match=says):
        Sampling(**options)


def test_what_cannot_be_asked(engine):
    with pytest.raises(UserError, match="'nobody' is not loaded; there are base, one"):
        engine.reply([("nobody", [Message("user", "你好")])], Sampling())
    with pytest.raises(UserError, match=r"the conversation is \d+ tokens long, the model reads 512"):
        engine.reply([(BASE, [Message("user", "你好" * 400)])], Sampling())


def test_commands_of_a_conversation(engine, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = Chat(engine, Sampling(max_new_tokens=16))
    first = chat.ask("你是谁？")
    assert [r.voice for r in first] == [BASE, "one"]
    assert [m.content for m in chat.messages("one", "再见")] == ["你是谁？", first[1].message.content, "再见"]
    command(chat, "/base")
    assert [r.voice for r in chat.ask("你好")] == [BASE]
    assert [m.content for m in chat.messages("one", "x")] == ["你是谁？", first[1].message.content, "x"]
    assert command(chat, "/retry") == "你好"
    command(chat, "/both")
    command(chat, "/system 你是助手")
    assert chat.messages(BASE, "x")[0] == Message("system", "你是助手")
    command(chat, "/save talk.json")
    saved = json.loads(Path("talk.json").read_text(encoding="utf-8"))
    assert [m["role"] for m in saved["messages"]["one"]] == ["system", "user", "assistant"]
    command(chat, "/set temperature=0.5 seed=3")
    assert (chat.sampling.temperature, chat.sampling.seed) == (0.5, 3)
    command(chat, "/undo")
    for line, says in {
        "/undo": "nothing was asked yet",
        "/adapter two": "'two' is not loaded",
        "/sing": "/sing is unknown; /help",
        "/save": "needs a file name",
        "/set heat=1": "'heat' is unknown",
        "/set seed=x": "seed=x: not a number",
    }.items():
        with pytest.raises(UserError, match=says):
            command(chat, line)
    with pytest.raises(EOFError):
        command(chat, "/quit")
    assert changed(Sampling(), "top_p=0.5").top_p == 0.5


def test_one_question_from_the_command_line(tiny, folders, capsys, monkeypatch):
    source = [str(folders[0]), "--model", str(tiny), "--dtype", "float32", "--device", "cpu", "--max-new-tokens", "24"]
    assert main([*source, "--prompt", "你是谁？", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [t["voice"] for t in told] == [BASE, "one"]
    assert told[0]["answer"] == "我是glmft自带的微型模型。"
    monkeypatch.setattr(sys, "stdin", io.StringIO("你是谁？\n"))
    assert main([*source, "--prompt", "-"]) == 0
    assert "base: 我是glmft自带的微型模型。" in capsys.readouterr().out
    assert main([str(folders[0] / "nowhere"), "--prompt", "x"]) == 2
    assert main([str(tiny), "--prompt", " "]) == 2
    assert "there is nothing to ask" in capsys.readouterr().err


def test_a_conversation_in_the_terminal(tiny, folders, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("你是谁？\n/base\n/nope\n\n/quit\n"))
    assert main([str(folders[0]), "--model", str(tiny), "--device", "cpu", "--max-new-tokens", "24"]) == 0
    out = capsys.readouterr().out
    assert "voices: base, one" in out
    assert "我是glmft自带的微型模型。" in out
    assert "/nope is unknown" in out


def test_what_is_found_under_a_name(tiny, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_tuned(str(tiny)).adapter is None
    assert find_tuned(str(folders[0])).base == str(tiny)
    run = Path("runs/mine/.hydra")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"model:\n  path: {tiny}\n")
    with pytest.raises(UserError, match="this run left no adapter/ or model/ yet"):
        find_tuned("mine")
    Path("runs/mine/model").mkdir()
    assert find_tuned("mine").model == Path("runs/mine/model")
    with pytest.raises(UserError, match="neither a run, nor an adapter folder"):
        find_tuned(str(tmp_path))
    with pytest.raises(UserError, match="no run, adapter or model of this name"):
        find_tuned("nothing")
    with pytest.raises(UserError, match="no run, adapter or model of this name in runs"):
        find_tuned("runs/typo")


def test_what_would_move_the_base_is_not_put_beside_it(tiny, tmp_path):
    folder = adapter(tiny, tmp_path / "moved", 1, init_weights="pissa")
    with pytest.raises(UserError, match=r"init_lora_weights=pissa moves the base's weights.*glmft export"):
        Engine([find_tuned(str(folder), str(tiny))], "float32", "cpu")


def test_a_run_called_base_and_devices_that_are_not_there(tiny, tmp_path):
    folder = adapter(tiny, tmp_path / "base", 1)
    assert Engine([find_tuned(str(folder), str(tiny))], "float32", "cpu").names == [BASE, "base (tuned)"]
    for device in ("foo", "cuda:63"):
        with pytest.raises(UserError, match=f"device '{device}'"):
            Engine([find_tuned(str(folder), str(tiny))], "float32", device)
