"""What was noticed while a data set was read: counted by kind, the first in full, each with its place."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from dataclasses import astuple
from typing import Any

from glmft.data.encoding import DROPPED, Chunk, Place
from glmft.data.registry import DatasetEntry
from glmft.errors import ProblemList

BAD = "bad record: "
NUMBERS = 1000  # record numbers kept for each reason


def source(entry: DatasetEntry, place: Place) -> str:
    """`mine.jsonl: record 7 (line 8)`."""
    line = f" (line {place.line})" if place.line else ""
    return f"{entry.files[place.file]}: record {place.number}{line}"


class Tally:
    """Counts over the chunks of a data set, and the first messages in full."""

    def __init__(self, entry: DatasetEntry) -> None:
        self.entry = entry
        self.problems: Counter[str] = Counter()  # kind -> records
        self.events: Counter[str] = Counter()  # what -> records
        self.numbers: dict[str, list[list[int]]] = {}  # kind or what -> [file, number], the first thousand
        self.messages: list[list[Any]] = []  # [file, number, line, message], the first twenty
        self.files: Counter[int] = Counter()  # file -> records

    @property
    def records(self) -> int:
        """All that were seen."""
        return self.files.total()

    def add(self, chunk: Chunk) -> None:
        """Takes what a chunk noticed."""
        self.files.update(chunk.files)
        for place, kind, message in chunk.problems:
            self._count(self.problems, kind, place)
            if message and len(self.messages) < ProblemList.SHOWN:
                self.messages.append([*astuple(place), message])
        for place, what in chunk.events:
            self._count(self.events, what, place)

    def _count(self, counter: Counter[str], what: str, place: Place) -> None:
        counter[what] += 1
        numbers = self.numbers.setdefault(what, [])
        if len(numbers) < NUMBERS:
            numbers.append([place.file, place.number])

    def report(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "records": self.records,
            "files": [self.files[i] for i in range(len(self.entry.files))],
            "problems": dict(self.problems),
            "events": dict(self.events),
            "numbers": self.numbers,
            "messages": self.messages,
        }

    def refusal(self) -> ProblemList:
        """All problems in one message."""
        bad = self.problems.total()
        title = f"{bad} of {self.records} records cannot be used (data.on_bad_record=drop leaves them out)"
        return ProblemList(title, messages(self.entry, self.report()), kinds=self.problems)


def messages(entry: DatasetEntry, report: dict[str, Any]) -> list[str]:
    """The first problems of a report in full, with their places."""
    return [f"{source(entry, Place(*place))}: {text}" for *place, text in report["messages"]]


def numbers(entry: DatasetEntry, report: dict[str, Any]) -> dict[str, list[str]]:
    """Record numbers of each finding, with the file's name where there are several."""
    several = len(entry.files) > 1
    return {
        what: [f"{entry.files[file].name}:{number}" if several else str(number) for file, number in found]
        for what, found in report["numbers"].items()
    }


def place_of(report: dict[str, Any], position: int) -> list[int]:
    """[file, number] of a record by its position in the data set."""
    ends = list(itertools.accumulate(report["files"]))
    file = bisect.bisect_right(ends, position)
    return [file, position - (ends[file - 1] if file else 0) + 1]


def dropped(report: dict[str, Any]) -> dict[str, int]:
    """Records that no sample was made of, by reason."""
    bad = {BAD + kind: n for kind, n in report["problems"].items()}
    return bad | {k.removeprefix(DROPPED): n for k, n in report["events"].items() if k.startswith(DROPPED)}
