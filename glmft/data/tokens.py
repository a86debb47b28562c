"""Token files: a data set as flat arrays in one safetensors file, memory-mapped, so that size is no matter.

Arrays: ids int32 [tokens], supervised bool [tokens]; and for each sample lengths, num_supervised int32, records int64
(position of its record in the data set) and hashes uint64 [samples, 2] (all ids; the prompt's ids).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from glmft.caches import cache_dir
from glmft.data.encoding import Chunk
from glmft.errors import DamagedError, ResourceError

DTYPES = {"I32": np.int32, "I64": np.int64, "U64": np.uint64, "BOOL": np.bool_}
BIG = ("ids", "supervised")  # written as they come, read where they lie
SMALL = ("lengths", "num_supervised", "records", "hashes")


class NotWritable(ResourceError):
    """The token folder cannot be written."""


def token_dir() -> Path:
    """Where token files lie."""
    return cache_dir() / "tokens"


class TokenStore:
    """The samples of a token file. Pickles as its path."""

    def __init__(self, file: Path) -> None:
        self.file = file
        tensors, start, self.metadata = _header(file)
        self.arrays = {
            name: np.memmap(file, DTYPES[t["dtype"]], "r", start + t["data_offsets"][0], tuple(t["shape"]))
            if 0 not in t["shape"]
            else np.empty(t["shape"], DTYPES[t["dtype"]])
            for name, t in tensors.items()
        }
        small = {name: np.array(self.arrays[name]) for name in SMALL}
        self.lengths, self.num_supervised = small["lengths"], small["num_supervised"]
        self.records, self.hashes = small["records"], small["hashes"]
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]).astype(np.int64)
        self.ids, self.supervised = (np.asarray(self.arrays[name]) for name in BIG)

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [T], supervised [T]) of sample i."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[span], self.supervised[span]


class TokenWriter:
    """Takes chunks and leaves a token file, whole or not at all. Holds 32 bytes a sample, whatever their length."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.small: dict[str, list[np.ndarray]] = {name: [] for name in SMALL}
        self.big: dict[str, IO[bytes]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> TokenWriter:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            for name in BIG:
                self.big[name] = self._stack.enter_context(tempfile.TemporaryFile(dir=self.file.parent))
        except OSError as e:
            raise NotWritable(f"{self.file.parent}: token files cannot be written ({e.strerror})") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, chunk: Chunk) -> None:
        """Appends the samples of a chunk."""
        for name, file in self.big.items():
            try:
                file.write(memoryview(getattr(chunk, name)).cast("B"))
            except OSError as e:
                raise NotWritable(f"{self.file.parent}: {e.strerror}") from None
        for name, parts in self.small.items():
            parts.append(getattr(chunk, name))

    def close(self, metadata: dict[str, Any]) -> None:
        """Writes the file: header, then the arrays, in the safetensors layout."""
        small = {name: np.concatenate(parts) for name, parts in self.small.items()}
        tokens = int(small["lengths"].sum(dtype=np.int64))
        shapes = {"ids": ("I32", [tokens]), "supervised": ("BOOL", [tokens])}
        shapes |= {name: (_name_of(a.dtype), list(a.shape)) for name, a in small.items()}
        order = ["hashes", "records", "ids", "lengths", "num_supervised", "supervised"]  # wide types first: aligned
        header: dict[str, Any] = {"__metadata__": {k: json.dumps(v) for k, v in metadata.items()}}
        at = 0
        for name in order:
            dtype, shape = shapes[name]
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(DTYPES[dtype]).itemsize
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        head = json.dumps(header, ensure_ascii=False).encode()
        head += b" " * (-len(head) % 8)
        part = self.file.with_name(f".{self.file.name}.part-{os.getpid()}")
        try:
            with part.open("wb") as out:
                out.write(struct.pack("<Q", len(head)) + head)
                for name in order:
                    if name in small:
                        out.write(np.ascontiguousarray(small[name]).tobytes())
                    else:
                        self.big[name].seek(0)
                        shutil.copyfileobj(self.big[name], out, 1 << 22)
            part.replace(self.file)
        except OSError as e:
            part.unlink(missing_ok=True)
            raise NotWritable(f"{self.file}: cannot be written ({e.strerror})") from None


def _name_of(dtype: np.dtype[Any]) -> str:
    return next(name for name, d in DTYPES.items() if dtype == d)


def _header(file: Path) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """(tensors, where the arrays begin, metadata).

    Raises:
        DamagedError: it is no whole token file.
        FileNotFoundError: there is none.
    """
    try:
        with file.open("rb") as f:
            length = struct.unpack("<Q", f.read(8))[0]
            header = json.loads(f.read(min(length, 1 << 26)))
            metadata = {k: json.loads(v) for k, v in header.pop("__metadata__").items()}
            end = 8 + length + max(t["data_offsets"][1] for t in header.values())
            whole = end == file.stat().st_size and set(header) == {*BIG, *SMALL}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, struct.error):
        whole = False
    if not whole:
        raise DamagedError(f"{file}: not a whole token file; it is made again")
    return header, 8 + length, metadata


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """One token file of the cache."""

    file: Path
    name: str
    samples: int
    tokens: int
    num_bytes: int
    used: float  # seconds since the epoch


def cached() -> list[CachedTokens]:
    """The token files that are there, the last used first; a damaged one is listed without a name."""
    out = []
    for file in token_dir().glob("*.safetensors") if token_dir().is_dir() else []:
        stat = file.stat()
        try:
            tensors, _, metadata = _header(file)
            found = (metadata["name"], tensors["lengths"]["shape"][0], tensors["ids"]["shape"][0])
        except DamagedError:
            found = ("(damaged)", 0, 0)
        out.append(CachedTokens(file, *found, stat.st_size, stat.st_mtime))
    return sorted(out, key=lambda c: -c.used)


def clear(files: Sequence[Path] | None = None) -> int:
    """Removes token files (all of them by default); the number of bytes freed."""
    freed = 0
    for file in [c.file for c in cached()] if files is None else files:
        freed += file.stat().st_size
        file.unlink()
    return freed
