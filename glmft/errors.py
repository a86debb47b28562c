"""Exceptions that end a program, with the exit code each one stands for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


class GlmftError(Exception):
    """Base of every expected failure. `exit_code` is what the process returns."""

    exit_code = 1


class UserError(GlmftError, ValueError):
    """What the user gave cannot be used: config, data, missing files."""

    exit_code = 2


class DamagedError(GlmftError):
    """A file exists but is broken: a truncated shard, a checkpoint that does not fit."""

    exit_code = 3


class ResourceError(GlmftError):
    """The machine cannot do it: memory, disk, device, a missing optional package."""

    exit_code = 4


class ProblemList(UserError):
    """Several problems that are reported together, so that one run shows them all.

    Args:
        title: what they are problems of.
        problems: the messages, or as many of them as were kept.
        kinds: how many there are of each kind, where not all messages were kept.
    """

    SHOWN = 20

    def __init__(self, title: str, problems: Sequence[str], kinds: Mapping[str, int] | None = None) -> None:
        self.problems, self.kinds = list(problems), dict(kinds or {})
        lines = [f"  - {p}" for p in self.problems[: self.SHOWN]]
        total = sum(self.kinds.values()) or len(self.problems)
        if total > self.SHOWN:
            by_kind = ", ".join(f"{n} {kind}" for kind, n in sorted(self.kinds.items(), key=lambda k: -k[1]))
            lines.append(f"  ... and {total - self.SHOWN} more" + (f"; in all: {by_kind}" if by_kind else ""))
        super().__init__("\n".join([title, *lines]))


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the closest candidate, or an empty string."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f", did you mean '{close[0]}'?" if close else ""
