"""One line of the doctor's report, in two languages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Text(NamedTuple):
    """The same in English and Chinese."""

    en: str
    zh: str


def both(text: str) -> Text:
    """What reads the same in both: a path, a number, a command, another program's message."""
    return Text(text, text)


@dataclass(frozen=True)
class Finding:
    """`ok` is True, False, or None where there is nothing to judge. `fix` is a line to paste, or what to do."""

    name: Text
    ok: bool | None
    says: Text
    fix: Text | None = None

    def to_json(self, lang: str) -> dict[str, Any]:
        """For `--json`."""
        fix = None if self.fix is None else getattr(self.fix, lang)
        return {"name": getattr(self.name, lang), "ok": self.ok, "says": getattr(self.says, lang), "fix": fix}


Check = Callable[[], Iterable[Finding]]


def guarded(name: Text, check: Check) -> list[Finding]:
    """The findings of a check; a check that breaks is a finding itself."""
    try:
        return list(check())
    except Exception as e:
        reason = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        return [Finding(name, False, both(reason))]
