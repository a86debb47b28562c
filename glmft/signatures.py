"""Reads constructor signatures from source files, without importing them.

A configuration is checked against the signatures that it will call. Importing torch and Lightning for that would take
seven seconds; parsing takes milliseconds. Annotations of glmft's own modules are understood (`glmft.schema`, Literal
aliases, unions, lists); others count as "anything".
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import annotated_types
from pydantic import ConfigDict, ValidationError, create_model

from glmft import schema
from glmft.errors import nearest

_BUILTINS: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument: its type (Any where it is not ours to read) and whether it must be given."""

    name: str
    type: Any
    required: bool


@dataclass(frozen=True, slots=True)
class Signature:
    """The arguments of a class or function; `open` where it takes **kwargs."""

    parameters: dict[str, Parameter]
    open: bool


@lru_cache(maxsize=256)
def signature(target: str) -> Signature:
    """Of a dotted path to a class or function, given by the module that defines it.

    Raises:
        LookupError: there is no such module, class or function.
    """
    module, _, name = target.rpartition(".")
    tree = _tree(module)
    node = next(
        (n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == name),
        None,
    )
    if node is None:
        raise LookupError(f"{module} defines no '{name}'")
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is None:
            return Signature({}, False)
        arguments, skip = init.args, 1
    else:
        arguments, skip = node.args, 0
    positional = arguments.args[skip:]
    required = len(positional) - len(arguments.defaults)
    parameters = {
        a.arg: Parameter(a.arg, _resolve(a.annotation, module), i < required) for i, a in enumerate(positional)
    }
    for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters[a.arg] = Parameter(a.arg, _resolve(a.annotation, module), default is None)
    return Signature(parameters, arguments.kwarg is not None)


def problems(target: str, values: Mapping[str, Any], where: str, partial: bool) -> list[str]:
    """What is wrong with calling `target` with these values; each line starts with the key's full name."""
    try:
        sig = signature(target)
    except LookupError as e:
        return [f"{where}._target_={target}: {e}"]
    found = []
    for key in values:
        if key not in sig.parameters and not sig.open:
            hint = nearest(key, sig.parameters) or f" (it has {', '.join(sig.parameters) or 'no options'})"
            found.append(f"{where}.{key}: unknown key{hint}")
    if not partial:
        missing = [p for p in sig.parameters.values() if p.required and p.name not in values]
        found += [f"{where}.{p.name}: must be given" for p in missing]
    fields = {k: (sig.parameters[k].type, ...) for k in values if k in sig.parameters}
    model = create_model("Values", __config__=ConfigDict(strict=True, arbitrary_types_allowed=True), **fields)  # type: ignore[call-overload]
    try:
        model(**{k: values[k] for k in fields})
    except ValidationError as e:
        reported: dict[str, list[str]] = {}
        for error in e.errors():
            reported.setdefault(str(error["loc"][0]), []).append(_say(error))
        for key, reasons in reported.items():
            found.append(f"{where}.{key}={values[key]}: {' or '.join(dict.fromkeys(reasons))}")
    return found


def _say(error: Any) -> str:
    message = error["msg"].removeprefix("Input should be ")
    return f"must be {message}" if message != error["msg"] else message


@lru_cache(maxsize=256)
def _tree(module: str) -> ast.Module:
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        raise LookupError(f"there is no package '{top}'")
    package = spec.submodule_search_locations is not None
    path = Path(spec.origin).parent.joinpath(*rest) if package or rest else Path(spec.origin)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file():
        raise LookupError(f"there is no module '{module}'")
    return ast.parse(file.read_text(encoding="utf-8"))


def _resolve(node: ast.expr | None, module: str) -> Any:
    """The type that an annotation means, or Any."""
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Name(id=name) if name in _BUILTINS:
            return _BUILTINS[name]
        case ast.Name(id=name):
            return _named(name, module)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union[_resolve(left, module), _resolve(right, module)]  # noqa: UP007 (built at run time)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            values = choices.elts if isinstance(choices, ast.Tuple) else [choices]
            return Literal[tuple(ast.literal_eval(v) for v in values)]  # type: ignore[misc]
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[kind, ast.Call() as limit])):
            return Annotated[_resolve(kind, module), _limit(limit)]
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return list[_resolve(item, module)]  # type: ignore[misc]
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[_, value])):
            return dict[str, _resolve(value, module)]  # type: ignore[misc]
    return Any


def _limit(call: ast.Call) -> Any:
    """`Ge(-1)` and the like."""
    kind = getattr(annotated_types, ast.unparse(call.func))
    return kind(*map(ast.literal_eval, call.args), **{k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg})


def _named(name: str, module: str) -> Any:
    """A name of glmft.schema, or an alias made in this or an imported glmft module."""
    if hasattr(schema, name):
        return getattr(schema, name)
    if not module.startswith("glmft"):
        return Any
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return _resolve(node.value, module)
        if isinstance(node, ast.ImportFrom) and node.module and any((a.asname or a.name) == name for a in node.names):
            return _named(name, node.module) if node.module.startswith("glmft") else Any
    return Any
