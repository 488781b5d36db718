"""Signatures and docstrings of the library, read from its source.

Help and refusals need not wait for PyTorch, which importing the library's functions would import.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_type_hints

import docstring_parser

_PACKAGE = Path(__file__).parents[1]
#: What a parameter without a default has.
REQUIRED = object()


@dataclass(frozen=True)
class Parameter:
    """A parameter of a function, or a field of a dataclass.

    Attributes:
        type: Its annotation; ``None`` where that is more than plain types.
        default: Its default, :data:`REQUIRED` for none; that of an enumeration by its value.
        help: What the docstring says of it, in plain text.
    """

    type: Any
    default: Any
    help: str


@cache
def parameters(where: str) -> dict[str, Parameter]:
    """The parameters of a function or dataclass of the package.

    Args:
        where: Module and name, for instance ``'attributor:Attributor.fit'``.
    """
    module, _, path = where.partition(":")
    *outer, name = path.split(".")
    around = _module(module)
    for part in outer:
        around = _named(around, part)
    node = _named(around, name)
    described = around if name == "__init__" else node
    parsed = docstring_parser.parse(ast.get_docstring(described) or "")
    texts = {entry.arg_name: _plain(entry.description or "") for entry in parsed.params}
    if isinstance(node, ast.ClassDef):
        fields = [entry for entry in node.body if isinstance(entry, ast.AnnAssign)]
        declared = [(ast.unparse(each.target), each.annotation, each.value) for each in fields]
    else:
        every = [*node.args.args, *node.args.kwonlyargs]
        defaults = [*node.args.defaults, *node.args.kw_defaults]
        defaults = [None] * (len(every) - len(defaults)) + defaults
        declared = [(e.arg, e.annotation, z) for e, z in zip(every, defaults, strict=True)]
    return {
        key: Parameter(*_type_and_default(module, annotation, default), texts.get(key, ""))
        for key, annotation, default in declared
    }


def _type_and_default(module: str, annotation: Any, default: Any) -> tuple[Any, Any]:
    if default is None:
        return None, REQUIRED
    if isinstance(default, ast.Attribute):  # of an enumeration, as far as plain parameters go
        members = _members(module, ast.unparse(default.value))
        return Literal[tuple(members.values())], members[default.attr]
    try:
        value = _value(module, default)
    except ValueError:  # of an object, which no command line has
        return None, REQUIRED
    plain = SimpleNamespace(__annotations__={"it": ast.unparse(annotation)})
    try:
        return get_type_hints(plain, {"Literal": Literal, "Path": Path})["it"], value
    except NameError:  # more than plain types
        return None, value


def _value(module: str, node: Any) -> Any:
    """A literal, or a constant of this module or of one that it imports from."""
    if not isinstance(node, ast.Name):
        return ast.literal_eval(node)
    own = _module(module)
    for entry in own.body:
        if isinstance(entry, ast.Assign) and ast.unparse(entry.targets[0]) == node.id:
            return _value(module, entry.value)
    return _value(_imported_from(own, node.id), node)


def _members(module: str, name: str) -> dict[str, Any]:
    """Members of the enumeration of a name in a module, or where that imports it from."""
    own = _module(module)
    if not any(getattr(entry, "name", None) == name for entry in own.body):
        return _members(_imported_from(own, name), name)
    members = [entry for entry in _named(own, name).body if isinstance(entry, ast.Assign)]
    return {ast.unparse(e.targets[0]): ast.literal_eval(e.value) for e in members}


def _imported_from(module: ast.Module, name: str) -> str:
    for entry in module.body:
        if isinstance(entry, ast.ImportFrom) and any(alias.name == name for alias in entry.names):
            return (entry.module or "").partition(".")[2]
    raise NameError(name)


@cache
def _module(name: str) -> ast.Module:
    path = _PACKAGE / f"{name.replace('.', '/')}.py"
    return ast.parse(path.read_text(encoding="utf-8"))


def _named(around: Any, name: str) -> Any:
    return next(entry for entry in around.body if getattr(entry, "name", None) == name)


def _plain(text: str) -> str:
    """Text without the marks of reStructuredText, in one line.

    Names, and names with values, keep single backticks: which of them are options, is known above.
    """
    text = " ".join(text.split())
    text = re.sub(r",? see\s+:\w+:`[^`]+`", "", text)  # which a command line does not
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text)
    text = re.sub(r"(^|\. )``None`` (?:for|to)\b", r"\1By default", text)
    text = re.sub(r"``None`` (?:for|to)\b", "by default", text)
    text = re.sub(r"``(\w+(?:=[^`]+)?)``", r"`\1`", text)
    text = re.sub(r"``(['\"]?)([^`]+?)\1``", r"\2", text)
    return text[:1].upper() + text[1:]
