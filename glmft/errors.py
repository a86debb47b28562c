"""Exceptions that end a program, with the exit code each one stands for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


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
    """Several problems that are reported together, so that one run shows them all."""

    def __init__(self, title: str, problems: Sequence[str], shown: int = 20) -> None:
        self.problems = list(problems)
        lines = [f"  - {p}" for p in self.problems[:shown]]
        if len(self.problems) > shown:
            lines.append(f"  ... and {len(self.problems) - shown} more")
        super().__init__("\n".join([title, *lines]))


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the closest candidate, or an empty string."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f", did you mean '{close[0]}'?" if close else ""
