"""Files -> records, in a stream: memory does not grow with the file, and every problem has its place.

A reader yields (line or None, record); a record that the reader itself cannot use comes as a `RecordError`, so that
all problems of a file are reported together. What makes the rest of the file unreadable raises UserError.
"""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from glmft.data.records import RecordError, kind_of
from glmft.errors import ResourceError, UserError, nearest

Read = Iterator[tuple[int | None, Any]]
PIECE = 1 << 20  # bytes read at a time
RECORD_LIMIT = 1 << 26  # characters of one record
SPACE = re.compile(r"[ \t\n\r]*")
ARCHIVES = (".zip", ".gz", ".bz2", ".xz", ".zst", ".tar", ".tgz", ".7z", ".rar")
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz")


def read_records(file: Path) -> Read:
    """The records of a file, in order; each is any value, or a RecordError in place of one.

    Raises:
        UserError: missing, unreadable, of a kind that is not read, damaged (with line and column), or empty.
    """
    if not file.is_file():
        raise UserError(f"{file}: {'a folder, expected a file' if file.is_dir() else 'no such file'}")
    return READERS[_kind(file)](file)


def _kind(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in ARCHIVES:
        raise UserError(f"{file}: an archive ({suffix}) is not opened; unpack it and give the file inside")
    if suffix in PICKLES:
        raise UserError(f"{file}: {suffix} files can run code and are not read; save the records as JSON")
    if suffix not in READERS:
        near = nearest(suffix, READERS)
        raise UserError(f"{file}: '{suffix}' files are not read{near} (allowed: {', '.join(READERS)})")
    return suffix


# ---- text


def _text(file: Path) -> Iterator[str]:
    """UTF-8 text in pieces, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0  # bytes decoded, or held by the decoder
    try:
        with file.open("rb") as f:
            while piece := f.read(PIECE):
                if done == 0:
                    if piece[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                        raise UserError(f"{file}: UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
                    if piece.startswith(codecs.BOM_UTF8):
                        piece, done = piece[3:], 3
                if (at := piece.find(b"\0")) >= 0:
                    raise UserError(f"{file}: byte {done + at} is NUL, so this is no text (or UTF-16 without its mark)")
                yield _decode(file, decoder, piece, done)
                done += len(piece)
            yield _decode(file, decoder, b"", done, final=True)
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror})") from None


def _decode(file: Path, decoder: codecs.IncrementalDecoder, piece: bytes, done: int, final: bool = False) -> str:
    held = len(decoder.getstate()[0])
    try:
        return decoder.decode(piece, final)
    except UnicodeDecodeError as e:
        at = done - held + e.start
        raise UserError(f"{file}: not UTF-8 (byte {at}); convert it, for example: iconv -f GBK -t UTF-8") from None


def _lines(file: Path) -> Iterator[str]:
    """Lines with their ends. Only \\n ends a line: U+2028 may stand inside a JSON text."""
    rest = ""
    number = 1
    for piece in _text(file):
        *whole, rest = (rest + piece).split("\n")
        for line in whole:
            yield line + "\n"
        number += len(whole)
        if len(rest) > RECORD_LIMIT:
            raise UserError(f"{file}:{number}: a line longer than {RECORD_LIMIT >> 20} million characters")
    if rest:
        yield rest


# ---- JSON


class _Decoder:
    """json's decoder, strict: a repeated key, NaN or an infinite number is noted for the record at hand."""

    def __init__(self) -> None:
        self.found: list[RecordError] = []
        decoder = json.JSONDecoder(
            object_pairs_hook=self._pairs, parse_constant=self._constant, parse_float=self._number
        )
        self.decode = decoder.raw_decode

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [k for k, _ in pairs]
            key = next(k for k in keys if keys.count(k) > 1)
            self.found.append(RecordError("repeated key", f"'{key}' stands there twice; only one value can be meant"))
        return value

    def _constant(self, name: str) -> None:
        self.found.append(RecordError("NaN or Infinity", f"{name} is not JSON, and no text"))

    def _number(self, text: str) -> float:
        if math.isinf(float(text)):
            self.found.append(RecordError("infinite number", f"the number {text[:20]} is too large"))
        return float(text)

    def take(self, value: Any) -> Any:
        """The value, or what was noted about it."""
        if self.found:
            value = self.found[0]
            self.found.clear()
        return value


class _Scanner:
    """JSON values of a file one after the other; holds no more text than one value and one piece."""

    def __init__(self, file: Path) -> None:
        self.file, self.pieces = file, _text(file)
        self.buffer, self.pos, self.line, self.column = "", 0, 1, 1  # line and column of buffer[0]
        self.ended = False
        self.decoder = _Decoder()

    def next_char(self) -> str:
        """The next character that is no space, not taken yet; empty at the end."""
        while True:
            match = SPACE.match(self.buffer, self.pos)
            assert match is not None
            self.pos = match.end()
            if self.pos < len(self.buffer):
                return self.buffer[self.pos]
            if self.ended:
                return ""
            self._fill()

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, self.pos = self.decoder.decode(self.buffer, self.pos)
                return self.decoder.take(value)
            except JSONDecodeError as e:
                self.decoder.found.clear()
                incomplete = e.msg.startswith("Unterminated string") or e.pos >= len(self.buffer) - 8
                if self.ended or not incomplete:
                    raise self.error(e.msg, e.pos) from None
            except RecursionError:
                raise UserError(f"{self.file}: nested too deeply to be a list of records") from None
            except ValueError:
                raise self.error("a number of more digits than can be read", self.pos) from None
            if len(self.buffer) - self.pos > RECORD_LIMIT:
                raise self.error(f"one record of more than {RECORD_LIMIT >> 20} million characters", self.pos)
            self._fill()

    def error(self, message: str, pos: int | None = None) -> UserError:
        """With the place in the file."""
        pos = self.pos if pos is None else pos
        at_end = pos >= len(self.buffer) and self.ended
        line, column = self._place(pos)
        hint = " (the file ends here: it is cut off)" if at_end or message.startswith("Unterminated") else ""
        if self.buffer[pos : pos + 1] == "'":
            hint = " (a text stands in \", not in ')"
        return UserError(f"{self.file}:{line}:{column}: not valid JSON: {message}{hint}")

    def _place(self, pos: int) -> tuple[int, int]:
        newlines = self.buffer.count("\n", 0, pos)
        if not newlines:
            return self.line, self.column + pos
        return self.line + newlines, pos - self.buffer.rindex("\n", 0, pos)

    def _fill(self) -> None:
        self.line, self.column = self._place(self.pos)
        piece = next(self.pieces, None)
        self.ended = piece is None
        self.buffer, self.pos = self.buffer[self.pos :] + (piece or ""), 0


def _json(file: Path) -> Read:
    scanner = _Scanner(file)
    first = scanner.next_char()
    if not first:
        raise UserError(f"{file}: empty; expected a JSON list of records")
    if first != "[":
        raise _no_list(scanner, first)
    scanner.pos += 1
    number = 0
    while (char := scanner.next_char()) != "]":
        if number:
            if char != ",":
                raise scanner.error("Expecting ',' or ']'")
            scanner.pos += 1
            scanner.next_char()
        yield None, scanner.value()
        number += 1
    if not number:
        raise UserError(f"{file}: an empty list, there is nothing to train on")
    scanner.pos += 1
    if scanner.next_char():
        raise scanner.error("text after the end of the list")


def _no_list(scanner: _Scanner, first: str) -> UserError:
    value = scanner.value()
    what = str(value) if isinstance(value, RecordError) else kind_of(value)
    if first == "{" and scanner.next_char() == "{":
        return UserError(f"{scanner.file}: one object after the other is JSONL; name the file .jsonl")
    return UserError(f"{scanner.file}: holds {what}, expected a list of records: [ {{...}}, {{...}} ]")


def _jsonl(file: Path) -> Read:
    decoder = _Decoder()
    number = 0
    for number, line in enumerate(_lines(file), start=1):
        text = line.strip(" \t\n\r")
        if not text:
            continue
        try:
            value, end = decoder.decode(text)
        except JSONDecodeError as e:
            decoder.found.clear()
            yield number, RecordError("line not JSON", f"not valid JSON: {e.msg} (column {e.colno})")
        except RecursionError:
            yield number, RecordError("nested too deeply", "nested too deeply to be a record")
        except ValueError:
            yield number, RecordError("number too long", "holds a number of more digits than can be read")
        else:
            rest = RecordError("two values on a line", f"goes on after its record (column {end + 1})")
            yield number, decoder.take(value if end == len(text) else rest)
    if not number:
        raise UserError(f"{file}: empty; expected one JSON object a line")


# ---- tables and plain text


def _csv(file: Path) -> Read:
    csv.field_size_limit(RECORD_LIMIT)
    rows = csv.reader(_lines(file), delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        header = next((row for row in rows if row), None)
        if not header:
            raise UserError(f"{file}: empty; expected a row of column names, then records")
        if len(set(header)) != len(header) or not all(header):
            raise UserError(f"{file}:1: column names must be there and differ: {', '.join(header)}")
        line = rows.line_num + 1  # where a row begins: its cells may hold line ends
        for row in rows:
            if row and len(row) != len(header):
                problem = f"{len(row)} cells, but the header names {len(header)} columns"
                yield line, RecordError("ragged row", problem)
            elif row:
                yield line, dict(zip(header, row, strict=True))
            line = rows.line_num + 1
    except csv.Error as e:
        raise UserError(f"{file}:{rows.line_num}: not valid CSV: {e}") from None


def _txt(file: Path) -> Read:
    for number, line in enumerate(_lines(file), start=1):
        if text := line.strip():
            yield number, {"text": text}


def _parquet(file: Path) -> Read:
    pyarrow = _pyarrow(file)
    import pyarrow.parquet as parquet

    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            yield from ((None, record) for record in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{file}: not a readable Parquet file: {_first_line(e)}") from None


def _arrow(file: Path) -> Read:
    pyarrow = _pyarrow(file)
    try:
        with pyarrow.memory_map(str(file)) as source:
            try:
                batches: Any = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:  # the other of the two layouts
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            for batch in batches:
                for start in range(0, batch.num_rows, 1024):
                    yield from ((None, record) for record in batch.slice(start, 1024).to_pylist())
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{file}: not a readable Arrow file: {_first_line(e)}") from None


def _first_line(e: Exception) -> str:
    return str(e).splitlines()[0]


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ResourceError(f"{file}: {file.suffix} files need pyarrow: pip install pyarrow") from None
    return pyarrow


READERS: dict[str, Callable[[Path], Read]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _txt,
}
