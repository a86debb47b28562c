"""Overrides on the command line: made readable for Hydra's parser, and back."""

from __future__ import annotations

import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from glmft.errors import ProblemList, nearest
from glmft.recipes import options


def prepare_argv(argv: list[str]) -> list[str]:
    """The command line as Hydra wants it; applying it twice changes nothing.

    Values that Hydra's lexer rejects (Chinese, spaces, a leading ~) are quoted. Keys that are no config group get
    `++`, so that an unknown one reaches our own check instead of stopping at the first.

    Raises:
        ProblemList: choices of groups that do not exist, all together, each with the nearest name.
    """
    multirun = any(a in ("-m", "--multirun") for a in argv)
    problems: list[str] = []
    out = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or key.startswith("-"):
            out.append(argument)
            continue
        value = _quote(key, value, multirun)
        group = key.lstrip("+~").partition("@")[0]
        if choices := options(group):
            problems += _unknown_choices(group, value, choices)
        elif re.match(r"^[A-Za-z]", key) and not key.startswith("hydra"):
            key = f"++{key}"
        out.append(f"{key}={value}")
    if problems:
        raise ProblemList("command line", problems)
    sweep = [a for a in out if a in ("-m", "--multirun")]  # Hydra takes it only before the overrides
    return sweep + [a for a in out if a not in sweep]


def _quote(key: str, value: str, multirun: bool) -> str:
    if _parses(f"{key}={value}"):
        return value
    if value.startswith("[") and value.endswith("]"):
        return "[" + ",".join(_quote_one(key, p.strip()) for p in value[1:-1].split(",")) + "]"
    return ",".join(_quote_one(key, p) for p in (value.split(",") if multirun else [value]))


def _quote_one(key: str, value: str) -> str:
    return value if _parses(f"{key}={value}") else "'" + value.replace("'", "\\'") + "'"


def _parses(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _unknown_choices(group: str, value: str, choices: list[str]) -> list[str]:
    asked = [v.strip() for v in value.split(",")] if re.match(r"^[\w, -]+$", value) else []
    return [
        f"{group}={v}: unknown{nearest(v, choices)} (there are {', '.join(choices)})"
        for v in asked
        if v not in (*choices, "null")
    ]


def unquote(override: str) -> str:
    """An override as the user wrote it, without the quotes that `prepare_argv` added."""
    key, equals, value = override.partition("=")
    if value.startswith("[") and value.endswith("]"):
        items = [unquote(f"={item}")[1:] for item in value[1:-1].split(",")]
        return f"{key}{equals}[{','.join(items)}]"
    quoted = len(value) > 1 and value[0] == value[-1] == "'"
    return f"{key}{equals}{value[1:-1]}".replace("\\'", "'") if quoted else override
