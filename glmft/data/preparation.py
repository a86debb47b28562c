"""A data set, ready to be trained on: read, checked and tokenised once, then found again by its content.

Small sets are prepared in this process, larger ones by as many processes as there are cores. The token file's name
follows from everything that decides its content: the data files, the tokenizer, the entry, the policies, the code.
"""

from __future__ import annotations

import atexit
import functools
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import queue
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from glmft.artefacts import file_hash
from glmft.data.encoding import Chunk, Place, Policies, conversation_of, encode_chunk, supervise
from glmft.data.reading import read_records
from glmft.data.registry import DatasetEntry
from glmft.data.tally import Tally, source
from glmft.data.tokens import NotWritable, TokenStore, TokenWriter, token_dir
from glmft.errors import DamagedError, GlmftError, ResourceError, UserError
from glmft.messages import Conversation
from glmft.models.tokenizer import load_tokenizer

CHUNK = 512  # records
QUEUED = 8  # chunks that wait for each process
SEVERAL_FROM = 16 << 20  # bytes of data files that are worth starting processes for
CODE = ("messages.py", "models/tokenizer.py", "data/reading.py", "data/records.py", "data/tools.py", "data/encoding.py")


@dataclass(frozen=True)
class PreparedSet:
    """A data set and its samples; `report` is what was counted when it was read."""

    entry: DatasetEntry
    policies: Policies
    store: TokenStore
    from_cache: bool

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.entry.name

    @cached_property
    def report(self) -> dict[str, Any]:
        """As `Tally.report` gave it."""
        return dict(self.store.metadata["report"])

    def conversations(self, samples: Iterable[int]) -> list[Conversation]:
        """The conversations that samples were made from, in the order asked for; the files are read once more."""
        fill = dict(self.policies.fill)
        read = self._read(samples)
        policies = (self.policies.train_on_prompt, self.policies.mask_history)
        found = [conversation_of(value, self.entry, source(self.entry, place), fill) for place, value in read]
        return [supervise(c, *policies) for c in found]

    def sources(self, samples: Iterable[int]) -> list[str]:
        """Where the records of samples stand."""
        return [source(self.entry, place) for place, _ in self._read(samples)]

    def _read(self, samples: Iterable[int]) -> list[tuple[Place, Any]]:
        wanted = [int(self.store.records[i]) for i in samples]
        missing = set(wanted)
        found: dict[int, tuple[Place, Any]] = {}
        for position, place, value in places(self.entry) if missing else ():
            if position in missing:
                found[position] = (place, value)
                missing.discard(position)
                if not missing:
                    break
        return [found[p] for p in wanted]


def places(entry: DatasetEntry) -> Iterator[tuple[int, Place, Any]]:
    """(position in the data set, place, record) of all records."""
    position = 0
    for file, path in enumerate(entry.files):
        for number, (line, value) in enumerate(read_records(path), start=1):
            yield position, Place(file, number, line), value
            position += 1


def prepare_set(
    entry: DatasetEntry, tokenizer: Path, policies: Policies, processes: int | None = None, cache: bool = True
) -> PreparedSet:
    """The token file of a data set, made where it is not there yet.

    Args:
        entry: the data set.
        tokenizer: tokenizer.model.
        policies: what is done with its records.
        processes: that read and tokenise; None for one a core where the set is large.
        cache: keep the file for later runs; without, or where the cache cannot be written, it ends with the process.

    Raises:
        UserError: a file cannot be read, or holds no record.
        ProblemList: records that cannot be used, unless `policies.on_bad_record` is "drop".
    """
    file = (token_dir() if cache else _scratch()) / f"{key_of(entry, tokenizer, policies)}.safetensors"
    store = _found(file)
    if store is not None:
        return PreparedSet(entry, policies, store, from_cache=True)
    try:
        _write(file, entry, tokenizer, policies, processes)
    except NotWritable as e:
        if not cache:
            raise
        file = _scratch() / file.name
        print(f"glmft: {e}; token files are kept in {file.parent} until this run ends", flush=True)
        _write(file, entry, tokenizer, policies, processes)
    return PreparedSet(entry, policies, TokenStore(file), from_cache=False)


def _found(file: Path) -> TokenStore | None:
    try:
        store = TokenStore(file)
    except FileNotFoundError:
        return None
    except DamagedError as e:
        print(f"glmft: {e}", flush=True)
        return None
    with suppress(OSError):  # another user's file keeps its time
        os.utime(file)
    return store


@functools.cache
def _scratch() -> Path:
    """A folder that is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="glmft-tokens-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def key_of(entry: DatasetEntry, tokenizer: Path, policies: Policies) -> str:
    """The name of the token file: 24 hexadecimal digits."""
    package = Path(__file__).resolve().parent.parent
    code = [package / name for name in CODE] + [package / "data" / "formats" / f"{entry.formatting}.py"]
    what = {
        "data": [content_hash(f) for f in entry.files],
        "tokenizer": content_hash(tokenizer),
        "entry": [entry.formatting, dict(entry.columns), dict(entry.tags), [f.suffix for f in entry.files]],
        "policies": asdict(policies),
        "code": [content_hash(f) for f in code],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


def content_hash(file: Path) -> str:
    """sha256 of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return file_hash(file)
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror})") from None


# ---- making a token file


def _write(file: Path, entry: DatasetEntry, tokenizer: Path, policies: Policies, processes: int | None) -> None:
    if processes is None:
        large = sum(f.stat().st_size for f in entry.files) >= SEVERAL_FROM
        processes = len(os.sched_getaffinity(0)) if large else 1
    tally = Tally(entry)
    began = time.perf_counter()
    work = (entry, tokenizer, policies)
    encoded = _in_processes(*work, processes) if processes > 1 else _here(*work)
    first = next(encoded, None)
    if first is None:
        raise UserError(f"{entry.files[0]}: no record in it; every line is blank, or there is only a header")
    with TokenWriter(file) as writer:
        chunk: Chunk | None = first
        while chunk is not None:
            tally.add(chunk)
            writer.add(chunk)
            chunk = next(encoded, None)
        if tally.problems and policies.on_bad_record == "error":
            raise tally.refusal()
        writer.close({"name": entry.name, "report": tally.report()})
    if processes > 1:
        seconds = time.perf_counter() - began
        tokens = sum(int(n.sum()) for n in writer.small["lengths"])
        print(
            f"glmft: {entry.name}: {tally.records:,} records, {tokens:,} tokens in {seconds:.1f} s, kept",
            flush=True,
        )


def _chunks(entry: DatasetEntry) -> Iterator[list[tuple[int, Place, Any]]]:
    records = places(entry)
    while chunk := list(islice(records, CHUNK)):
        yield chunk


def _here(entry: DatasetEntry, tokenizer: Path, policies: Policies) -> Iterator[Chunk]:
    loaded = load_tokenizer(tokenizer)
    for records in _chunks(entry):
        yield encode_chunk(records, entry, policies, loaded)


def _in_processes(entry: DatasetEntry, tokenizer: Path, policies: Policies, processes: int) -> Iterator[Chunk]:
    """Chunks in order. Each process reads all records and encodes its share of them: parsing costs less than handing
    records over. A few chunks wait for each process, so that memory stays bounded.

    Raises:
        UserError: a file cannot be read.
        ResourceError: a process was killed.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process that runs threads may hang
    queues: list[Any] = [context.Queue(QUEUED) for _ in range(processes)]
    workers = [
        context.Process(target=_work, args=(q, entry, tokenizer, policies, i, processes), daemon=True)
        for i, q in enumerate(queues)
    ]
    try:
        for worker in workers:
            worker.start()
        for i in itertools.cycle(range(processes)):
            chunk = _next(queues[i], workers[i])
            if chunk is None:
                return
            yield chunk
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def _next(results: Any, worker: Any) -> Chunk | None:
    while True:
        try:
            result = results.get(timeout=1)
        except queue.Empty:
            if not worker.is_alive() and results.empty():
                raise ResourceError(
                    f"a process that tokenises was killed (exit code {worker.exitcode}): too little memory?"
                ) from None
        else:
            if isinstance(result, BaseException):
                raise result
            return result  # type: ignore[no-any-return]


def _work(results: Any, entry: DatasetEntry, tokenizer: Path, policies: Policies, mine: int, processes: int) -> None:
    gc.set_threshold(100_000)  # many small objects, hardly a cycle
    try:
        loaded = load_tokenizer(tokenizer)
        for i, records in enumerate(_chunks(entry)):
            if i % processes == mine:
                results.put(encode_chunk(records, entry, policies, loaded))
        results.put(None)
    except GlmftError as e:
        results.put(e)
