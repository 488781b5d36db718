"""The page *Refused, and why*, from the checks themselves: every message of the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import curvlinops_diffusion

PACKAGE = Path(curvlinops_diffusion.__file__).parent
#: The parts of the package in the order of the page, with what their messages are about
PARTS = {
    "diffusion": "Network, noise, data and draws",
    "layers": "Layers and hooks",
    "curvature": "Curvature operators",
    "linalg": "Operators, inverses and their files",
    "influence": "Gradients, scores and measurements",
    "runtime": "Passes, checkpoints and files",
    "loading": "Images, captions, adapters and pipelines on disk",
    "page": "The page of scores",
    "cli": "The program",
    "attributor.py": "The door",
    "attribution.py": "The door's results",
}


@dataclass(frozen=True)
class Check:
    """A function that refuses something, or warns of it.

    Attributes:
        where: Its module's name within the package.
        purpose: The first paragraph of its docstring, or of the class or module that it is in.
        reason: The second one, if it explains; else nothing.
        refused: What it says in errors, with ``…`` for what depends on the case.
        warned: What it says in warnings.
    """

    where: str
    purpose: str
    reason: str
    refused: tuple[str, ...]
    warned: tuple[str, ...]


def checks() -> list[Check]:
    """Every function with messages, in the order of the sources."""
    found = []
    for path in sorted(path for part in PARTS for path in _files(PACKAGE / part)):
        where = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        for function, owners in _functions(tree, (tree,)):
            refused = tuple(text for text in map(_raised, _own_nodes(function)) if text)
            warned = tuple(text for text in map(_warned, _own_nodes(function)) if text)
            if refused or warned:
                purpose, reason = _documented((function, *reversed(owners)))
                found.append(Check(where, purpose, reason, refused, warned))
    return found


def page() -> str:
    """The checks as reStructuredText."""
    lines = []
    known = checks()
    for part, title in PARTS.items():
        lines += [title, "-" * len(title), ""]
        for check in known:
            if check.where.split(".")[0] != part.removesuffix(".py"):
                continue
            lines += [f"{check.purpose} {check.reason}".strip() + f" (``{check.where}``)", ""]
            lines += [f"- {literal(message)}" for message in check.refused]
            lines += [f"- Warned: {literal(message)}" for message in check.warned]
            lines += [""]
    return "\n".join(lines) + "\n"


def literal(message: str) -> str:
    """A message as an inline literal, which cannot begin or end with a backtick."""
    return "``{}``".format(message.replace("`", "'"))


def _files(part: Path) -> Iterator[Path]:
    return iter([part]) if part.suffix else part.rglob("*.py")


def _functions(
    node: ast.AST, owners: tuple[ast.AST, ...]
) -> Iterator[tuple[ast.FunctionDef, tuple[ast.AST, ...]]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield child, owners
        inside = isinstance(child, ast.FunctionDef | ast.ClassDef)
        yield from _functions(child, (*owners, child) if inside else owners)


def _own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function, without those of functions within it."""
    waiting: list[ast.AST] = [*function.body]
    while waiting:
        node = waiting.pop(0)
        yield node
        children = ast.iter_child_nodes(node)
        waiting = [c for c in children if not isinstance(c, ast.FunctionDef)] + waiting


def _raised(node: ast.AST) -> str:
    raised = isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
    return _text(node.exc.args[0]) if raised else ""  # type: ignore[attr-defined]


def _warned(node: ast.AST) -> str:
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return _text(node.args[0]) if called and node.func.id == "warn" else ""  # type: ignore[attr-defined]


def _text(node: ast.AST) -> str:
    """The words of an expression, with ``…`` for the rest; nothing if it has none."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_text(value) or "…" for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return (_text(left) or "…") + (_text(right) or "…")
    return ""


def _plain(text: str) -> str:
    """A docstring's paragraph without what only the API's page resolves."""
    return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"``\1``", text)


def _documented(nodes: Sequence[ast.AST]) -> tuple[str, str]:
    """Purpose and reason from the nearest docstring."""
    for node in nodes:
        text = ast.get_docstring(node)  # type: ignore[arg-type]
        if text:
            first, *others = [" ".join(part.split()) for part in text.split("\n\n")]
            explains = others and not others[0].startswith(
                ("Args:", "Raises:", "Returns:", "Attributes:", "Source:", "Yields:", "With ", "::")
            )
            plain = explains and "::" not in others[0]
            return _plain(first), _plain(others[0]) if plain else ""
    return "", ""
