"""Record formats, one module each: record -> messages.

A format is a module here with `convert(record, columns, tags)`, found by its name in the registry entry's
`formatting`, and `recognises(record)`, asked where a file is named directly. `columns` and `tags` hold what the entry
says; what it leaves out keeps the format's own names.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol

from glmft.messages import Message


class RecordFormat(Protocol):
    """What a module here offers."""

    def convert(self, record: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, str]) -> list[Message]:
        """The messages of a record; raises RecordError."""

    def recognises(self, record: Mapping[str, Any]) -> bool:
        """Whether a record looks like this format."""


FORMATS: dict[str, Any] = {
    m.name: importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
}
