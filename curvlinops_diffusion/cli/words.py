"""The words of a command line: options of files put in front, spellings made alike."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from curvlinops_diffusion.cli.config_files import read_config

_TRUE, _FALSE = {"true", "yes", "on", "1", "y"}, {"false", "no", "off", "0", "n"}
_NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)
# dashes that word processors and web pages make of two hyphens
_OTHER_DASHES = re.compile("^[\u2010-\u2015\u2212]+")


def spelled(words: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """Spell a command's words as its parser takes them.

    Options of ``--config`` files come first, so that flags replace them wherever they stand; a
    later file replaces options of an earlier one. Underscores in flags, unique beginnings of flags,
    values of switches (``--quiet=true``) and negative numbers are rewritten.

    Args:
        words: The words after the command.
        types: The type of each option, by the name of its field.

    Raises:
        ValueError: If a file cannot be read, a switch has no value of truth, a list is given twice,
            or a flag begins with another dash.
    """
    configs, own = _own_words([word.rstrip("\r") for word in words], types)
    options: dict[str, list[str] | None] = {}
    for path in configs:
        options |= read_config(Path(path).expanduser(), types)
    return [*_as_words(options, types), *own]


def _own_words(words: list[str], types: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The files of ``--config``, and the other words."""
    configs: list[str] = []
    found: list[str] = []
    lists: set[str] = set()
    waiting = list(reversed(words))
    while waiting:
        word = waiting.pop()
        if _OTHER_DASHES.match(word) and len(word.split()) == 1 and not _NEGATIVE.match(word):
            meant = _OTHER_DASHES.sub("--", word)
            raise ValueError(f"'{word}' begins with a dash where two hyphens are meant: {meant}.")
        flag, equals, value = word.partition("=")
        name = _name(flag, types)
        if name is None:
            found.append(word)
            continue
        following = waiting[-1] if waiting else None
        if types.get(name) is bool:
            if not equals and following is not None and following.lower() in {"true", "false"}:
                equals, value = "=", waiting.pop()
            found.append(_switch(name, value) if equals else _flag(name))
        elif name == "config":
            if not equals and (following is None or following.startswith("--")):
                raise ValueError("--config needs the name of a YAML file.")
            configs.append(value if equals else waiting.pop())
        elif is_list(types[name]):
            if name in lists:
                raise ValueError(
                    f"{_flag(name)} is given twice. Pass all of its values after one: "
                    f"{_flag(name)} A B."
                )
            lists.add(name)
            values = [value] if equals else []
            while waiting and not waiting[-1].startswith("-"):
                values.append(waiting.pop())
            found += [_flag(name), *(_read(name, types[name], value) for value in values)]
        elif equals or (following is not None and _is_value(following)):
            value = value if equals else waiting.pop()
            found.append(f"{_flag(name)}={_read(name, types[name], value)}")
            if "file" not in types and waiting and not waiting[-1].startswith("-"):
                raise ValueError(
                    f"{_flag(name)} is given '{value}' and '{waiting[-1]}', and takes one value. "
                    "Pass the folder in place of its files, and put what has spaces into quotes."
                )
        else:
            found.append(_flag(name))
    return configs, found


def _as_words(options: Mapping[str, list[str] | None], types: Mapping[str, Any]) -> Iterable[str]:
    """The words that options of a file stand for."""
    for name, values in options.items():
        if values is None:  # null: the default
            continue
        if types[name] is bool:
            yield _switch(name, values[0])
        elif is_list(types[name]):
            yield from (_flag(name), *(_read(name, types[name], value) for value in values))
        else:
            value = _read(name, types[name], values[0])
            yield value if name == "file" else f"{_flag(name)}={value}"


# lists of files, each perhaps as name=file
_NAMED_FILES = {"lora", "scores"}


def _read(name: str, type_: Any, value: str) -> str:
    """A value with the home folder for ``~`` and the values of environment variables in paths.

    Raises:
        ValueError: If a path is empty, or a variable in it is not set.
    """
    if is_list(type_):
        if name not in _NAMED_FILES:
            return value
        own, equals, path = value.rpartition("=")
        return f"{own}{equals}{_path(name, path)}"
    return _path(name, value) if type_ in (Path, Path | None) else value


def _path(name: str, value: str) -> str:
    if not value.strip():
        raise ValueError(f"{_flag(name)} is empty. Pass the path of a file or folder.")
    path = os.path.expandvars(os.path.expanduser(value))
    unset = re.search(r"\$(\w+|\{\w+\})", path)
    if unset is not None and not Path(path).exists():
        raise ValueError(f"{_flag(name)} is '{value}', and the variable {unset[0]} is not set.")
    return path


def is_list(type_: Any) -> bool:
    """Whether an option takes several values."""
    return bool(type_ == list[str] | None)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _name(flag: str, types: Mapping[str, Any]) -> str | None:
    """The option that a flag or the beginning of one names, if it is a single one."""
    if not flag.startswith("--") or flag == "--":
        return None
    meant = flag[2:].replace("-", "_")
    known = [*types, "config"]
    if meant in known:
        return meant
    others = ["help", "print_config", *(f"no_{name}" for name in types if types[name] is bool)]
    found = [name for name in (*known, *others) if name.startswith(meant) and name != "file"]
    return found[0] if len(found) == 1 and found[0] in known else None


def _is_value(word: str) -> bool:
    """Whether a word after an option is its value, though it may begin with a hyphen."""
    return not word.startswith("--") and word != "-h"


def _switch(name: str, value: str) -> str:
    """A switch as one word.

    Raises:
        ValueError: If the value is neither true nor false.
    """
    if value.strip().lower() in _TRUE:
        return _flag(name)
    if value.strip().lower() in _FALSE:
        return _flag(f"no_{name}")
    raise ValueError(f"{_flag(name)} is {value!r}. Pass true or false.")
