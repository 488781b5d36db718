"""Signatures and docstrings of the library, read from its source.

Help and refusals need not wait for PyTorch, which importing the library's functions would import.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

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
    return {
        key: Parameter(*_type_and_default(module, annotation, default), texts.get(key, ""))
        for key, annotation, default in _declared(node)
    }


def _declared(node: Any) -> list[tuple[str, Any, Any]]:
    """Names, annotations and defaults."""
    if isinstance(node, ast.ClassDef):
        fields = [entry for entry in node.body if isinstance(entry, ast.AnnAssign)]
        return [(ast.unparse(field.target), field.annotation, field.value) for field in fields]
    own = node.args
    missing = [None] * (len(own.args) - len(own.defaults))
    defaults = [*missing, *own.defaults, *own.kw_defaults]
    every = zip([*own.args, *own.kwonlyargs], defaults, strict=True)
    return [(each.arg, each.annotation, default) for each, default in every]


def _type_and_default(module: str, annotation: Any, default: Any) -> tuple[Any, Any]:
    if default is None:
        return None, REQUIRED
    members = _members(module, default)
    if members is not None:
        return Literal[tuple(members.values())], members[default.attr]
    kind = _type(annotation)
    try:
        return kind, _value(module, default)
    except ValueError:  # of an object, which no command line has
        return None, REQUIRED


_PLAIN_TYPES = {kind.__name__: kind for kind in (bool, float, int, str, Path)}


def _type(node: Any) -> Any:
    """The type that an annotation of plain types is; ``None`` for any other."""
    if isinstance(node, ast.Constant) and node.value is None:
        return type(None)
    if isinstance(node, ast.Name):
        return _PLAIN_TYPES.get(node.id)
    if isinstance(node, ast.BinOp):
        left, right = _type(node.left), _type(node.right)
        return None if left is None or right is None else left | right
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
        values = ast.literal_eval(node.slice)
        return Literal[values]
    return None


def _value(module: str, node: Any) -> Any:
    """A literal, or a constant of this module or of one that it imports from."""
    if not isinstance(node, ast.Name):
        return ast.literal_eval(node)
    own = _module(module)
    for entry in own.body:
        if isinstance(entry, ast.Assign) and ast.unparse(entry.targets[0]) == node.id:
            return _value(module, entry.value)
    return _value(_imported_from(own, node.id), node)


def _members(module: str, node: Any) -> dict[str, Any] | None:
    """The members of the enumeration that a default is one of; ``None`` if it is of none."""
    if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
        return None
    own, name = _module(module), node.value.id
    if not any(getattr(entry, "name", None) == name for entry in own.body):
        return _members(_imported_from(own, name), node)
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
