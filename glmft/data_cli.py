"""glmft data: look at data sets, check them, convert them, and keep them in order."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import get_args

from glmft import console
from glmft.caches import use_cache_dir
from glmft.data import bench, tokens
from glmft.data.corpus import registered_records
from glmft.data.encoding import OnTooLong, Policies, TooLong, conversation_of, limit_length, supervise
from glmft.data.packing import Schedule
from glmft.data.preparation import places, prepare_set
from glmft.data.reading import READERS
from glmft.data.records import RecordError
from glmft.data.registry import REGISTRY, DatasetEntry, describe, direct_file, find_dataset, read_registry, registries
from glmft.data.report import lines, report
from glmft.data.tally import source
from glmft.data.writing import WRITERS
from glmft.errors import ProblemList, UserError
from glmft.files import write_json
from glmft.messages import Conversation
from glmft.models.hub import PACKAGED, find_local
from glmft.models.tokenizer import load_tokenizer

BASE = "zai-org/chatglm3-6b"


def tokenizer_file(model: str | None) -> Path:
    """tokenizer.model of a folder or hub id; the 6B's where it is here, else the packaged tiny model's, which is said.

    Raises:
        UserError: there is none.
    """
    if model is None:
        found = find_local(BASE)
        if found is None:
            print("glmft: no models/chatglm3-6b here: counted with the packaged tiny model (--model)", file=sys.stderr)
        found = found or PACKAGED / "tiny-chatglm3"
    else:
        found = find_local(model) or Path(model)
    return load_tokenizer(found).model_file


def find_entry(name: str, folder: str | None) -> DatasetEntry:
    """A data set by name, or a file or folder.

    Raises:
        UserError: neither is there.
    """
    named = any(name in read_registry(r) for r in registries(folder))
    if not named and (Path(name).exists() or "/" in name or Path(name).suffix.lower() in READERS):
        return direct_file(name)
    return find_dataset(name, folder)


def conversations(entry: DatasetEntry, fill: dict[str, str]) -> Iterator[Conversation]:
    """All conversations of a data set.

    Raises:
        ProblemList: records that cannot be used, after the last.
    """
    problems: list[str] = []
    kinds: Counter[str] = Counter()
    records = 0
    for _, place, value in places(entry):
        records += 1
        try:
            yield conversation_of(value, entry, source(entry, place), fill)
        except RecordError as e:
            kinds[e.kind] += 1
            problems += [f"{source(entry, place)}: {e}"] if len(problems) < ProblemList.SHOWN else []
    if kinds:
        raise ProblemList(f"{kinds.total()} of {records} records cannot be used", problems, kinds)


# ---- commands


def add(options: argparse.Namespace) -> int:
    """Checks every record, then writes the entry; a file outside the folder is copied into it.

    Raises:
        UserError: the file cannot be used, or the name is taken by another file.
        ProblemList: records that cannot be used.
    """
    folder, replace = options.dir, options.replace
    entry = direct_file(str(options.file))
    file = entry.files[0] if len(entry.files) == 1 and not options.file.is_dir() else options.file
    name = options.name or options.file.stem
    records = sum(1 for _ in conversations(entry, {}))
    registry = folder / REGISTRY
    entries = read_registry(registry) if registry.is_file() else {}
    target = file if file.resolve().is_relative_to(folder.resolve()) else folder / file.name
    file_name = target.resolve().relative_to(folder.resolve()).as_posix()
    old = entries.get(name)
    same = isinstance(old, dict) and old.get("file_name") == file_name
    if old is not None and not same and not replace:
        raise UserError(f"{registry}: '{name}' is there already: {json.dumps(old)}; --replace changes it")
    if target != file:
        if file.is_dir():
            raise UserError(f"{file}: a folder is not copied; put it below {folder}")
        if target.exists() and target.read_bytes() != file.read_bytes() and not replace:
            raise UserError(f"{target}: exists with other content; --replace overwrites it")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    formatting = {} if entry.formatting == "alpaca" else {"formatting": entry.formatting}
    write_json(registry, entries | {name: (dict(old or {}) if same else {}) | {"file_name": file_name, **formatting}})
    print(f"{records} records of {file} are '{name}' in {registry}\nuse them: data.datasets=[{name}]")
    return 0


def check(options: argparse.Namespace) -> int:
    """1 where a record is left out in training (--strict: 2)."""
    entry = find_entry(options.name, options.dir)
    policies = policies_of(options)
    Schedule(options.tokens_per_step, options.tokens_per_step, options.max_length)
    prepared = prepare_set(entry, tokenizer_file(options.model), policies)
    registered_records(prepared, 0)
    found = report(prepared, options.tokens_per_step)
    if options.json:
        print(json.dumps(found.to_json(), ensure_ascii=False, indent=2))
    else:
        print("\n".join(lines(found, options.tokens_per_step)))
    return 0 if found.complete else 2 if options.strict else 1


def policies_of(options: argparse.Namespace) -> Policies:
    """What training would do, with bad records counted instead of refused."""
    return Policies(
        max_length=options.max_length,
        on_too_long=options.on_too_long,
        on_bad_record="drop",
        train_on_prompt=options.train_on_prompt,
        mask_history=options.mask_history,
        fill=tuple(sorted(options.fill.items())),
    )


def show(options: argparse.Namespace) -> int:
    """A record as the model sees it: control tokens visible, what is learned in green or «».

    Raises:
        UserError: there is no such record, or it cannot be used.
    """
    entry, policies = find_entry(options.name, options.dir), policies_of(options)
    found = next(((place, value) for i, place, value in places(entry) if i == options.number - 1), None)
    if found is None:
        raise UserError(f"{entry.name}: there is no record {options.number}; {sum(1 for _ in places(entry))} are there")
    place, value = found
    tokenizer = load_tokenizer(tokenizer_file(options.model))
    try:
        conversation = conversation_of(value, entry, source(entry, place), options.fill)
        conversation = supervise(conversation, policies.train_on_prompt, policies.mask_history)
        sample = tokenizer.encode_conversation(conversation)
        limits = (tokenizer, policies.max_length, policies.on_too_long)
        samples, event = limit_length(sample, conversation, *limits)
    except (RecordError, TooLong) as e:
        raise UserError(f"{source(entry, place)}: {e}") from None
    color = options.color == "always" or (
        options.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    print(conversation.source + (f": {event}" if event else ""))
    for one in samples:
        print(f"{len(one)} tokens, {one.num_supervised} learned\n{tokenizer.render(one, color)}")
    return 0


def convert(options: argparse.Namespace) -> int:
    """Writes the set as one JSON list, or as JSONL where the file is named so; whole or not at all.

    Raises:
        UserError: the file exists, a record cannot be read, or cannot be said in the other format.
    """
    entry = find_entry(options.name, options.dir)
    target: Path = options.output
    if target.exists() and not options.replace:
        raise UserError(f"{target}: exists; --replace overwrites it")
    as_lines = target.suffix == ".jsonl"
    if target.suffix not in (".json", ".jsonl"):
        raise UserError(f"{target}: is written as .json or .jsonl")
    write = WRITERS[options.to]
    written = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as out:
            for written, conversation in enumerate(conversations(entry, options.fill), start=1):
                try:
                    text = json.dumps(write(conversation), ensure_ascii=False)
                except RecordError as e:
                    raise UserError(f"{conversation.source}: {e}") from None
                out.write(f"{text}\n" if as_lines else ("[\n" if written == 1 else ",\n") + text)
            out.write("" if as_lines else "\n]\n" if written else "[]\n")
            out.flush()
            os.fsync(out.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    print(f"{written} records of {entry.name} ({entry.formatting}) are in {target} ({options.to})")
    return 0


def list_sets(options: argparse.Namespace) -> int:
    """Every data set that a registry names, and whether it can be used."""
    found = {str(r): describe(r) for r in registries(options.dir)}
    if options.json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
        return 0
    for registry, entries in found.items():
        print(registry)
        for name, (status, why) in entries.items():
            print(f"  {name:28} {status:14} {why.splitlines()[0]}")
        counts = Counter(status for status, _ in entries.values())
        print("  " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    return 0


def cache(options: argparse.Namespace) -> int:
    """Lists the token files, or removes them."""
    found = tokens.cached()
    if options.action == "clear":
        chosen = [c for c in found if options.name in (None, c.name)]
        print(f"{len(chosen)} token files removed, {tokens.clear([c.file for c in chosen]) / 1e6:.1f} MB freed")
        return 0
    for c in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(c.used))
        print(f"{c.name:24} {c.samples:>10,} samples {c.tokens:>14,} tokens {c.num_bytes / 1e6:>9.1f} MB  {used}")
    print(f"{tokens.token_dir()}: {len(found)} token files, {sum(c.num_bytes for c in found) / 1e6:.1f} MB")
    return 0


def measure(options: argparse.Namespace) -> int:
    """Prints the result of `glmft.data.bench.run` as JSON."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.environ["GLMFT_CACHE"] = f"{folder}/cache"
        size = int(options.read_gb * 1e9)
        result = bench.run(Path(folder), tokenizer_file(options.model), options.records, size, options.processes)
    print(json.dumps(result, indent=2))
    return 0


# ---- the command line


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r}: expected name=value")
    return name, value


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of 1 or more")
    return value


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="glmft data", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], does: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=does, description=does)
        made.set_defaults(run=run)
        return made

    def named(made: argparse.ArgumentParser) -> None:
        made.add_argument("name", metavar="NAME_OR_FILE", help=f"a name in {REGISTRY}, or a file or folder")
        made.add_argument("--dir", help=f"folder of {REGISTRY}")
        made.add_argument(
            "--fill", type=_pair, action="append", default=[], metavar="NAME=VALUE", help="value of a {{NAME}} blank"
        )

    def encoded(made: argparse.ArgumentParser) -> None:
        made.add_argument("--model", help=f"whose tokenizer counts: folder or hub id (default: {BASE} if here)")
        made.add_argument("--max-length", type=_positive, default=2048, help="tokens of a record (%(default)s)")
        made.add_argument("--on-too-long", choices=get_args(OnTooLong)[:-1], default="truncate")
        made.add_argument("--train-on-prompt", action="store_true", help="learn the questions too")
        made.add_argument("--mask-history", action="store_true", help="learn only what follows the last question")

    checking = command("check", check, "what is in a data set, and what training would leave out")
    named(checking)
    encoded(checking)
    checking.add_argument("--tokens-per-step", type=_positive, default=2048, help="of an optimizer step (%(default)s)")
    checking.add_argument("--json", action="store_true")
    checking.add_argument("--strict", action="store_true", help="exit with 2 instead of 1 where a record is left out")
    showing = command("show", show, "a record as the model sees it, learned tokens marked")
    named(showing)
    encoded(showing)
    showing.add_argument("number", nargs="?", type=_positive, default=1, help="of the record (%(default)s)")
    showing.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    converting = command("convert", convert, "write a data set in another format")
    named(converting)
    converting.add_argument("--to", choices=WRITERS, required=True)
    converting.add_argument("--output", type=Path, required=True, help="a .json or .jsonl file")
    converting.add_argument("--replace", action="store_true", help="overwrite the file")
    listing = command("list", list_sets, "all data sets that are named, and whether they can be used")
    listing.add_argument("--dir", help=f"folder of {REGISTRY}")
    listing.add_argument("--json", action="store_true")
    adding = command("add", add, f"check a file and name it in {REGISTRY}")
    adding.add_argument("file", type=Path)
    adding.add_argument("--name", help="of the data set (default: the file's)")
    adding.add_argument("--dir", type=Path, default=Path("data"), help=f"folder of {REGISTRY} (%(default)s)")
    adding.add_argument("--replace", action="store_true", help="an entry of this name or a file may be overwritten")
    caching = command("cache", cache, "token files: made once, found again by content")
    caching.add_argument("action", choices=("list", "clear"))
    caching.add_argument("name", nargs="?", help="clear only those of this data set")
    benching = command("bench", measure, "speed of reading, tokenising, cache and loader on this machine")
    benching.add_argument("--model", help="whose tokenizer is used")
    benching.add_argument("--records", type=_positive, default=1_000_000, help="generated (%(default)s)")
    benching.add_argument("--read-gb", type=float, default=2.0, help="size of the file that is only read (%(default)s)")
    benching.add_argument("--processes", type=_positive, help="that tokenise (default: one a core)")
    benching.add_argument("--folder", help="where the files are made (default: the system's)")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, that of the command, or that of the error."""
    options = parser().parse_args(arguments)
    use_cache_dir()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold bytes that are no text
    if hasattr(options, "fill"):
        options.fill = dict(options.fill)

    def command() -> int:
        try:
            return int(options.run(options))
        except OSError as e:
            if isinstance(e, BrokenPipeError):
                raise
            raise UserError(f"{e.filename or options.command}: {e.strerror}") from None

    return console.run(command)


if __name__ == "__main__":
    sys.exit(main())
