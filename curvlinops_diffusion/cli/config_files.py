"""Files of options: YAML or JSON, whose values are read as the same words on a command line."""

from __future__ import annotations

import codecs
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from curvlinops_diffusion.cli.options import is_list

# the same reader in C where there is one, which also takes a tab after a colon
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Options = dict[str, list[str] | None]
_Pairs = list[tuple[str, list[str | None] | None]]

_FORM = "A file of options has a line 'option: value' for each, and 'option: [a, b]' for a list"


def read_config(path: Path, types: Mapping[str, Any]) -> Options:
    """Read the options of a file as texts, by name; ``None`` for null.

    YAML would make 8 of 010, true of ``yes`` and a text of 1e-8: values are taken as they are
    written, and what they mean is left to the option's type, as for flags.

    Args:
        path: The file.
        types: The type of each option, by its name.

    Raises:
        ValueError: If the file is missing, neither YAML nor JSON, or has an option that is unknown,
            given twice, or of another form.
    """
    text = _text(path)
    pairs = _json_pairs(path, text) if text.lstrip().startswith("{") else None
    if pairs is None:
        pairs = _yaml_pairs(path, text)
    found: Options = {}
    for key, values in pairs:
        name = key.replace("-", "_")
        if name not in types:
            raise ValueError(f"'{path}' has an option '{key}'. {_advice(name, types)}")
        if name in found:
            raise ValueError(f"'{path}' has the option '{key}' twice. Leave one out.")
        if values is not None and None in values:
            raise ValueError(f"'{key}' in '{path}' has an empty entry. Leave it out.")
        if not is_list(types[name]) and values is not None and len(values) != 1:
            raise ValueError(
                f"'{key}' in '{path}' is a list of {len(values)} values, and takes one."
            )
        found[name] = [value for value in values or () if value is not None] or None
    return found


def _advice(name: str, types: Mapping[str, Any]) -> str:
    if name == "config":
        return "Files of options do not name others: pass --config for each."
    close = difflib.get_close_matches(name.lower(), types, 1, cutoff=0.75)
    return f"Did you mean '{close[0]}'?" if close else "It is unknown: --help lists what there is."


def _text(path: Path) -> str:
    """The text of a file, as editors of Windows write it, too.

    Raises:
        ValueError: If there is none.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"--config: '{path}' cannot be read: {error.strerror}.") from error
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        text = raw.decode("utf-16" if raw.startswith(marks) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--config: '{path}' is not text in UTF-8 (byte {error.start}). Save it as that."
        ) from error
    return text.replace("\r\n", "\n")


def _json_pairs(path: Path, text: str) -> _Pairs | None:
    """The options of JSON, numbers as written; ``None`` if it is none (YAML may have braces)."""
    try:
        pairs = json.loads(
            text, object_pairs_hook=list, parse_float=str, parse_int=str, parse_constant=str
        )
    except ValueError:
        return None

    def plain(key: str, value: Any) -> str | None:
        if isinstance(value, bool):
            return str(value).lower()
        if not isinstance(value, str | None):
            raise _nested(path, key)
        return value

    found: _Pairs = []
    for key, value in pairs:
        if value is None:
            found.append((key, None))
        else:
            values = value if isinstance(value, list) else [value]
            found.append((key, [plain(key, each) for each in values]))
    return found


def _yaml_pairs(path: Path, text: str) -> _Pairs:
    try:
        node = yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"--config: '{path}' cannot be parsed: {_told(error, text)}.") from error
    if node is None:  # nothing, or comments alone
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"--config: '{path}' holds no options. {_FORM}.")
    found: _Pairs = []
    for key, value in node.value:
        name = _scalar(path, str(getattr(key, "value", key)), key)
        if name is None:
            raise ValueError(f"'{path}' has an option without a name. {_FORM}.")
        if isinstance(value, yaml.SequenceNode):
            found.append((name, [_scalar(path, name, item) for item in value.value]))
        else:
            scalar = _scalar(path, name, value)
            found.append((name, None if scalar is None else [scalar]))
    return found


def _scalar(path: Path, name: str, node: Any) -> str | None:
    if not isinstance(node, yaml.ScalarNode):
        raise _nested(path, name)
    if node.tag == "tag:yaml.org,2002:null":
        return None
    return str(node.value)


def _nested(path: Path, name: str) -> ValueError:
    return ValueError(f"'{name}' in '{path}' holds options of its own or a list of lists. {_FORM}.")


def _told(error: yaml.YAMLError, text: str) -> str:
    """A parser's message, with the line and the usual reason for it."""
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error)
    if mark is None:
        return problem
    line = text.splitlines()[mark.line] if mark.line < len(text.splitlines()) else ""
    hint = ""
    if "alias" in str(error):
        hint = "; patterns that begin with * stand in quotes: '*attn*'"
    elif "\\" in line and "quoted" in str(error):
        hint = "; paths with backslashes stand in single quotes, or in none"
    elif "\t" in line:
        hint = "; YAML is indented by spaces, not by tabs"
    return f"line {mark.line + 1}, {problem}{hint}"
