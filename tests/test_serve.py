"""A real server, asked by the openai package: the same tokens as alone, whoever asks beside, and clear refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import APIStatusError, OpenAI
from test_chat import QUESTIONS, adapter

from glmft.engine import Engine, Sampling, Tuned
from glmft.messages import Message
from glmft.serve.__main__ import main
from glmft.serve.app import Server, _message
from glmft.serve.requests import messages_of, parse
from glmft.serve.worker import Done

pytestmark = pytest.mark.share("use")
KEY = "k3y-that-no-log-may-hold"


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    return [adapter(tiny, root / "one", 1), adapter(tiny, root / "two", 2)]


@pytest.fixture(scope="module")
def engine(tiny, folders) -> Engine:
    return Engine([Tuned(f.name, str(tiny), f) for f in folders], "float32", "cpu")


@pytest.fixture(scope="module")
def server(tiny, folders):
    """(address, process) of a server of its own, which asks for a key."""
    command = [*(sys.executable, "-m", "glmft.serve", *map(str, folders), "--model", str(tiny), "--port", "0")]
    environment = os.environ | {"GLMFT_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--dtype", "float32", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    heard = []
    for line in process.stdout:
        heard.append(line)
        if found := re.search(r"(http://127.0.0.1:\d+)/v1 answers as base, one, two", line):
            break
    else:
        pytest.fail("".join(heard))
    rest: list[str] = []
    reader = threading.Thread(target=lambda: rest.extend(process.stdout), daemon=True)
    reader.start()
    yield found[1], process
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM  # after a clean end uvicorn lets the signal through
    reader.join(5)
    assert KEY not in "".join(heard + rest)
    assert "Traceback" not in "".join(rest)


@pytest.fixture
def client(server) -> OpenAI:
    return OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0, timeout=60)


def alone(engine: Engine, voice: str, question: str, most: int = 24) -> str:
    return engine.reply([(voice, [Message("user", question)])], Sampling(most))[0].message.content


def ask(client: OpenAI, voice: str, question: str, **more):
    asked = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=voice, messages=asked, **{"temperature": 0, "max_tokens": 24, **more})


def test_voices_are_models(client):
    assert [m.id for m in client.models.list()] == ["base", "one", "two"]


@pytest.mark.parametrize("voice", ["base", "one", "two"])
def test_at_once_and_as_it_comes(client, engine, voice):
    expected = alone(engine, voice, QUESTIONS[0])
    whole = ask(client, voice, QUESTIONS[0])
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.prompt_tokens == len(engine.tokenizer.encode_prompt([Message("user", QUESTIONS[0])]))
    chunks = list(ask(client, voice, QUESTIONS[0], stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_32_clients_at_a_time_get_what_they_would_get_alone(client, engine):
    asked = [(["base", "one", "two"][i % 3], QUESTIONS[i % len(QUESTIONS)], 4 + i % 5) for i in range(32)]
    expected = {a: alone(engine, *a) for a in set(asked)}
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda a: ask(client, a[0], a[1], max_tokens=a[2]), asked))
    assert [f.choices[0].message.content for f in found] == [expected[a] for a in asked]


def test_seed_and_stop(client, engine):
    one, same = (ask(client, "one", QUESTIONS[0], temperature=1.0, seed=5).choices[0].message.content for _ in "ab")
    assert one == same
    whole = alone(engine, "base", QUESTIONS[1])
    word = whole[len(whole) // 2 : len(whole) // 2 + 3]
    for stream in (False, True):
        found = ask(client, "base", QUESTIONS[1], stop=[word], stream=stream)
        text = "".join(c.choices[0].delta.content or "" for c in found) if stream else found.choices[0].message.content
        assert text == whole[: whole.find(word)]


def test_tools_are_taken_and_calls_given(engine):
    """What the model says as a call arrives as one; the tiny model has never seen one, so its words are given."""
    from glmft.data.tools import call

    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "天气"}]},
        {
            "role": "assistant",
            "tool_calls": [{"id": "a", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "晴"},
    ]
    request = parse(json.dumps({"model": "base", "messages": messages, "tools": [tool]}).encode())
    roles = [m.role for m in messages_of(request)]
    assert roles == ["system", "user", "assistant", "observation"]
    assert messages_of(request)[0].tools == [tool["function"]]
    message, reason = _message(Done("", "stop", 9, call("weather", {"city": "北京"})), True)
    assert reason == "tool_calls"
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "北京"}


def test_a_long_question_shortens_nobody_elses_answer(client, engine):
    """Asked at the same time, one has room for two tokens only."""
    long = "好" * (engine.limit - 9)
    while len(engine.tokenizer.encode_prompt([Message("user", long)])) > engine.limit - 2:
        long = long[:-1]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(ask, client, "base", q) for q in (long, QUESTIONS[1])]
        cut, whole = (j.result().choices[0] for j in jobs)
    assert cut.finish_reason in ("length", "stop")
    assert whole.message.content == alone(engine, "base", QUESTIONS[1])


def test_almost_no_temperature_is_greedy(client, engine):
    found = ask(client, "one", QUESTIONS[0], temperature=1e-40)
    assert found.choices[0].message.content == alone(engine, "one", QUESTIONS[0])


def test_nothing_is_sent_before_the_first_line_has_ended(engine):
    """That line may be a tool's name, which is no part of the answer."""
    ids = engine.tokenizer.encode("get_weather\n 晴天")
    beginnings = [engine.tokenizer.parse_beginning(ids[: n + 1]) for n in range(len(ids))]
    assert beginnings[0].content == ""
    assert beginnings[-1].metadata == "get_weather"
    assert beginnings[-1].content == "晴天"
    assert all("get" not in b.content for b in beginnings)


def test_words_of_a_model_that_are_no_call():
    from glmft.data.tools import arguments_of

    for content in ("tool_call(x={1, 2})", "tool_call(x={[1]: 2})", "tool_call(x=1e999)", "tool_call(" + "[" * 500):
        assert arguments_of(content) is None


def test_a_client_that_is_gone_leaves_no_slot(server, client):
    """As after kill -9: the connection is closed in the middle of an answer."""
    host, port = server[0].removeprefix("http://").split(":")
    body = json.dumps(
        {
            "model": "one",
            "messages": [{"role": "user", "content": "数"}],
            "stream": True,
            "temperature": 1.7,
            "max_tokens": 400,
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as s:
        s.sendall(head.encode() + body)
        assert b"200 OK" in s.recv(1000)
    end = time.monotonic() + 5
    while httpx.get(f"{server[0]}/health").json()["active"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert ask(client, "base", QUESTIONS[0], max_tokens=2).choices


MESSAGES = [{"role": "user", "content": "hi"}]
REFUSED = {
    "an unknown model": ({"model": "gpt-4"}, 404, "the model 'gpt-4' does not exist; there are base, one, two"),
    "no messages": ({"messages": []}, 400, "messages"),
    "a role that is unknown": ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "wizard"),
    "content that is a number": ({"messages": [{"role": "user", "content": 3}]}, 400, "content"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only parts of type text"),
    "ends with the assistant": ({"messages": [*MESSAGES, {"role": "assistant", "content": "x"}]}, 400, "the last one"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "fewer than none": ({"max_tokens": -1}, 400, "max_tokens"),
    "10^9 tokens": ({"max_tokens": 10**9}, 400, "max_tokens"),
    "several answers": ({"n": 2}, 400, "n: "),
    "too hot": ({"temperature": 3}, 400, "temperature"),
    "a temperature of words": ({"temperature": "hot"}, 400, "temperature"),
    "1,000 stop words": ({"stop": ["x"] * 1000}, 400, "stop"),
    "tools that are none": ({"tools": [{"type": "function"}]}, 400, "expected an object with 'name'"),
    "tools that are text": ({"tools": "weather"}, 400, "tools"),
    "half a character": ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "half a character"),
    "a conversation too long": ({"messages": [{"role": "user", "content": "hello " * 3000}]}, 400, "tokens long"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_request_that_cannot_be_answered(server, kind):
    change, status, says = REFUSED[kind]
    body = {"model": "base", "messages": MESSAGES} | change
    sent = json.dumps(body).encode()
    found = httpx.post(f"{server[0]}/v1/chat/completions", content=sent, headers={"Authorization": f"Bearer {KEY}"})
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "Traceback" not in found.text


def test_bodies_keys_hosts_and_origins(server, client):
    url, key = f"{server[0]}/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(url, content=b"{", headers=key).json()["error"]["message"].startswith("the body is not JSON")
    assert httpx.post(url, content=b"[" * 200_000, headers=key).status_code == 400
    assert httpx.post(url, content=b"x" * 10_000_000, headers=key).status_code == 413
    for wrong in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Bearer {KEY}x"}):
        found = httpx.post(url, json={"model": "base", "messages": MESSAGES}, headers=wrong)
        assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{server[0]}/health", headers={"Host": "evil.example"}).status_code == 400
    assert httpx.get(f"{server[0]}/v1/models", headers=key | {"Origin": "http://evil.example"}).status_code == 403
    assert httpx.get(f"{server[0]}/nothing").json()["error"]["message"] == "there is no GET /nothing"
    with pytest.raises(APIStatusError) as caught:
        ask(client, "nobody", "hi")
    assert caught.value.status_code == 404


def test_a_full_queue_is_said(engine, monkeypatch):
    """One request is answered, one waits, the others get 429; then all is well again."""
    import asyncio

    go = threading.Event()
    original = engine.reply
    monkeypatch.setattr(engine, "reply", lambda *a: (go.wait(20), original(*a))[1])
    monkeypatch.setattr("glmft.serve.worker.TOGETHER", 0)

    async def flood() -> list[int]:
        app = Server(engine, waiting=1, rows=1).app(["*"])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", timeout=60) as c:
            body = {"model": "base", "messages": MESSAGES, "temperature": 0, "max_tokens": 2}
            sent = []
            for _ in range(8):
                sent.append(asyncio.create_task(c.post("/v1/chat/completions", json=body)))
                await asyncio.sleep(0.1)
            go.set()
            return [r.status_code for r in await asyncio.gather(*sent)]

    codes = asyncio.run(flood())
    assert codes.count(429) >= 4
    assert codes.count(200) == 8 - codes.count(429) >= 2


def test_another_host_needs_a_key_and_a_port_may_be_taken(tiny, folders, capsys, monkeypatch):
    monkeypatch.delenv("GLMFT_API_KEY", raising=False)
    assert main([str(folders[0]), "--model", str(tiny), "--host", "0.0.0.0"]) == 2
    assert "needs --api-key" in capsys.readouterr().err
    assert main([str(folders[0]), "--model", str(tiny), "--port", "70000"]) == 2
    assert "--port 70000: must be 0 to 65535" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main([str(folders[0]), "--model", str(tiny), "--port", port]) == 2
    assert "Address already in use; another port" in capsys.readouterr().err
