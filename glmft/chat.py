"""glmft chat: talk to the base and to what was trained, side by side."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmft import console
from glmft.caches import use_cache_dir
from glmft.errors import GlmftError, UserError
from glmft.files import write_json
from glmft.messages import Message
from glmft.quiet import quiet_libraries

if TYPE_CHECKING:
    from glmft.engine import Engine, Reply, Sampling

HELP = """\
/both            every voice answers          /base, /adapter NAME   only that one
/system TEXT     set or clear (no text)       /undo                  forget the last question and its answers
/retry           ask the last question again  /new                   a new conversation
/save FILE       the conversations as JSON    /set temperature=0.8   also top_p, top_k, max_new_tokens, seed
/help            this                         /quit                  or Ctrl-D; Ctrl-C ends an answer"""


class Chat:
    """A conversation with each voice: they hear the same questions, and each its own answers.

    Args:
        engine: the voices.
        sampling: how tokens are chosen.
        system: the system message, or an empty text.
    """

    def __init__(self, engine: Engine, sampling: Sampling, system: str = "") -> None:
        self.engine, self.sampling, self.system = engine, sampling, system
        self.speaking = engine.names
        self.turns: list[tuple[str, dict[str, Reply]]] = []

    def messages(self, voice: str, question: str) -> list[Message]:
        """What a voice is asked: its own history, then the question."""
        out = [Message("system", self.system)] if self.system else []
        for asked, replies in self.turns:
            if voice in replies:
                out += [Message("user", asked), replies[voice].message]
        return [*out, Message("user", question)]

    def ask(self, question: str, watch: Any = None) -> list[Reply]:
        """The answers of those that speak; they become history."""
        asked = [(voice, self.messages(voice, question)) for voice in self.speaking]
        replies = self.engine.reply(asked, self.sampling, watch)
        self.turns.append((question, {r.voice: r for r in replies}))
        return replies

    def undo(self) -> str:
        """Forgets the last question; returns it.

        Raises:
            UserError: there is none.
        """
        if not self.turns:
            raise UserError("nothing was asked yet")
        return self.turns.pop()[0]

    def to_json(self) -> dict[str, Any]:
        """The conversation of each voice, in OpenAI's messages."""
        out = {}
        for voice in self.engine.names:
            heard = [m for asked, r in self.turns if voice in r for m in (Message("user", asked), r[voice].message)]
            system = [Message("system", self.system)] if self.system and heard else []
            out[voice] = [{"role": m.role, "content": m.content} for m in (*system, *heard)]
        return {"messages": out, "sampling": vars(self.sampling)}


def command(chat: Chat, line: str) -> str | None:
    """Does what a line beginning with / says; returns a question to ask again, or None.

    Raises:
        UserError: unknown, or something is wrong with it.
        EOFError: to end.
    """
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name == "quit":
        raise EOFError
    if name == "retry":
        return chat.undo()
    if name in ("both", "base"):
        chat.speaking = chat.engine.names if name == "both" else ["base"]
    elif name == "adapter":
        if rest not in chat.engine.names:
            raise UserError(f"'{rest}' is not loaded; there are {', '.join(chat.engine.names)}")
        chat.speaking = [rest]
    elif name == "system":
        chat.system = rest
    elif name == "undo":
        chat.undo()
    elif name == "new":
        chat.turns.clear()
    elif name == "save":
        if not rest:
            raise UserError("/save needs a file name")
        try:
            write_json(Path(rest).expanduser(), chat.to_json())
        except OSError as e:
            raise UserError(f"{rest}: cannot be written ({e.strerror})") from None
        print(f"saved to {rest}")
    elif name == "set":
        chat.sampling = changed(chat.sampling, rest)
    elif name == "help":
        print(HELP)
    else:
        raise UserError(f"/{name} is unknown; /help lists what there is")
    return None


def changed(sampling: Sampling, text: str) -> Sampling:
    """The sampling with `name=value` pairs set anew.

    Raises:
        UserError: an unknown name, or a value out of range.
    """
    values: dict[str, Any] = {}
    for pair in text.split():
        name, _, value = pair.partition("=")
        if name not in vars(sampling):
            raise UserError(f"'{name}' is unknown; there are {', '.join(vars(sampling))}")
        try:
            values[name] = float(value) if name in ("temperature", "top_p", "repetition_penalty") else int(value)
        except ValueError:
            raise UserError(f"{pair}: not a number") from None
    return replace(sampling, **values)


def shown(reply: Reply | None) -> str:
    """An answer as text; a tool call with its tool's name in front."""
    if reply is None:
        return ""
    end = {"length": " …", "cancelled": " (stopped)"}.get(reply.stopped, "")
    return (
        f"[{reply.message.metadata}] {reply.message.content}{end}"
        if reply.message.metadata
        else reply.message.content + end
    )


def talk(chat: Chat) -> None:
    """Reads questions from the terminal until it ends."""
    from rich import box
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    with suppress(ImportError):
        import readline  # noqa: F401  arrow keys, history, wide characters
    console = Console()
    console.print(f"voices: {', '.join(chat.engine.names)}; /help lists commands", style="dim")
    while True:
        try:
            line = input("> ").strip()
            question = command(chat, line) if line.startswith("/") else line
            if not question:
                continue
            said = dict.fromkeys(range(len(chat.speaking)), "")
            stopped: list[int] = []  # signals

            def table(texts: dict[int, str]) -> Table:
                made = Table(box=box.SIMPLE, expand=True, show_header=len(texts) > 1)
                for voice in chat.speaking:
                    made.add_column(voice, ratio=1, overflow="fold")
                made.add_row(*(Text(t) for t in texts.values()))
                return made

            before = signal.signal(signal.SIGINT, lambda number, frame, stopped=stopped: stopped.append(number))  # type: ignore[misc]
            try:
                with Live(table(said), console=console, refresh_per_second=12, vertical_overflow="visible") as live:

                    def watch(
                        row: int, message: Message, live: Any = live, said: Any = said, stopped: Any = stopped
                    ) -> bool:
                        said[row] = f"[{message.metadata}] {message.content}" if message.metadata else message.content
                        live.update(table(said))
                        return not stopped

                    replies = chat.ask(question, watch)
                    live.update(table({i: shown(r) for i, r in enumerate(replies)}))
            finally:
                signal.signal(signal.SIGINT, before)
        except GlmftError as e:
            console.print(f"glmft: {e}", style="red")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or that of the error."""
    parser = argparse.ArgumentParser(prog="glmft chat", description=__doc__)
    parser.add_argument("sources", nargs="+", help="runs (folder or name), adapter folders, or a model")
    console.add_weights(parser)
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--prompt", help="ask this and leave; - reads it from stdin")
    parser.add_argument("--json", action="store_true", help="with --prompt: answers as JSON")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args(arguments)
    use_cache_dir()

    def command() -> None:
        chat = opened(options)
        if options.prompt is None:
            talk(chat)
            return
        replies = chat.ask(question_of(options.prompt))
        if options.json:
            told = [
                {"voice": r.voice, "answer": r.message.content, "tool": r.message.metadata, "stopped": r.stopped}
                for r in replies
            ]
            print(json.dumps(told, ensure_ascii=False, indent=2))
        else:
            print("\n\n".join(f"{r.voice}: {shown(r)}" for r in replies))

    return console.run(command)


def question_of(prompt: str) -> str:
    """--prompt, or what stdin says where it is `-`.

    Raises:
        UserError: there is none, or it is not UTF-8.
    """
    try:
        question = (sys.stdin.read() if prompt == "-" else prompt).strip()
    except UnicodeDecodeError as e:
        raise UserError(f"--prompt -: not UTF-8 (byte {e.start})") from None
    if not question:
        raise UserError("--prompt: there is nothing to ask")
    return question


def opened(options: argparse.Namespace) -> Chat:
    """Loads what was asked for."""
    quiet_libraries()
    from glmft.engine import Engine, Sampling, find_tuned

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
    sampling = Sampling(**{n: getattr(options, n) for n in names})
    tuned = [find_tuned(s, options.model) for s in options.sources]
    if any(t.model for t in tuned):
        print("glmft: a fully tuned model: two models are loaded", file=sys.stderr)
    return Chat(Engine(tuned, options.dtype, options.device), sampling, options.system)


if __name__ == "__main__":
    sys.exit(main())
