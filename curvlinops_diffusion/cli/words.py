"""The words of a command line: options of files put in front, spellings made alike."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from curvlinops_diffusion.cli.config_files import read_config
from curvlinops_diffusion.cli.options import flag, is_list
from curvlinops_diffusion.runtime.files import named_path

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
    configs, own, lists = _own_words([word.rstrip("\r") for word in words], types)
    options: dict[str, list[str] | None] = {}
    for path in configs:
        options |= read_config(Path(path).expanduser(), types)
    options |= dict.fromkeys(lists)  # whose values are replaced, not added to
    return [*_as_words(options, types), *own]


def _own_words(words: list[str], types: Mapping[str, Any]) -> tuple[list[str], list[str], set[str]]:
    """The files of ``--config``, the other words, and the lists that are among these."""
    configs: list[str] = []
    found: list[str] = []
    lists: set[str] = set()
    waiting = list(reversed(words))
    while waiting:
        word = waiting.pop()
        if _OTHER_DASHES.match(word) and len(word.split()) == 1 and not _NEGATIVE.match(word):
            meant = _OTHER_DASHES.sub("--", word)
            raise ValueError(f"'{word}' begins with a dash where two hyphens are meant: {meant}.")
        word_flag, equals, value = word.partition("=")
        name = _name(word_flag, types)
        if name is None:
            found.append(word)
            continue
        following = waiting[-1] if waiting else None
        if types.get(name) is bool:
            if not equals and following is not None and following.lower() in {"true", "false"}:
                equals, value = "=", waiting.pop()
            found.append(_switch(name, value) if equals else flag(name))
        elif name == "config":
            if not equals and (following is None or following.startswith("--")):
                raise ValueError("--config needs the name of a YAML file.")
            configs.append(value if equals else waiting.pop())
        elif is_list(types[name]):
            if name in lists:
                raise ValueError(
                    f"{flag(name)} is given twice. Pass all of its values after one: "
                    f"{flag(name)} A B."
                )
            lists.add(name)
            values = [value] if equals else []
            while waiting and not waiting[-1].startswith("-"):
                values.append(waiting.pop())
            found += _several(name, types[name], values) or [flag(name)]
        elif equals or (following is not None and _is_value(following)):
            value = value if equals else waiting.pop()
            found.append(f"{flag(name)}={_read(name, types[name], value)}")
            if "file" not in types and waiting and not waiting[-1].startswith("-"):
                raise ValueError(
                    f"{flag(name)} is given '{value}' and '{waiting[-1]}', and takes one value. "
                    "Pass the folder in place of its files, and put what has spaces into quotes."
                )
        else:
            found.append(flag(name))
    return configs, found, lists


def _as_words(options: Mapping[str, list[str] | None], types: Mapping[str, Any]) -> Iterable[str]:
    """The words that options of a file stand for."""
    for name, values in options.items():
        if values is None:  # null: the default
            continue
        if types[name] is bool:
            yield _switch(name, values[0])
        elif is_list(types[name]):
            yield from _several(name, types[name], values)
        else:
            value = _read(name, types[name], values[0])
            yield value if name == "file" else f"{flag(name)}={value}"


def _several(name: str, type_: Any, values: list[str]) -> list[str]:
    """The values of a list, a word each: one that begins with a hyphen is a value, too."""
    return [f"{flag(name)}={_read(name, type_, value)}" for value in values]


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
        own = named_path(value)[0]
        start = 0 if own is None else len(f"{own}=")
        return value[:start] + _path(name, value[start:])
    return _path(name, value) if type_ in (Path, Path | None) else value


def _path(name: str, value: str) -> str:
    if not value.strip():
        raise ValueError(f"{flag(name)} is empty. Pass the path of a file or folder.")
    if os.path.exists(value):  # whatever it is called
        return value
    path = os.path.expandvars(os.path.expanduser(value))
    unset = re.search(r"\$([A-Za-z_]\w*|\{\w+\})", path)
    if unset is not None and not os.path.exists(path):
        raise ValueError(f"{flag(name)} is '{value}', and the variable {unset[0]} is not set.")
    return path


def _name(word: str, types: Mapping[str, Any]) -> str | None:
    """The option that a flag or the beginning of one names, if it is a single one."""
    if not word.startswith("--") or word == "--":
        return None
    meant = word[2:].replace("-", "_")
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
        return flag(name)
    if value.strip().lower() in _FALSE:
        return flag(f"no_{name}")
    raise ValueError(f"{flag(name)} is {value!r}. Pass true or false.")
