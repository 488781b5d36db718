"""The words of a command line: options of files put in front, spellings made alike.

Files are YAML or JSON, whose values are read as the same words on a command line.
"""

from __future__ import annotations

import codecs
import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from curvlinops_diffusion.cli.options import Option, flag
from curvlinops_diffusion.runtime.files import named_path

# the same reader in C where there is one, which also takes a tab after a colon
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Options = dict[str, list[str] | None]

_FORM = "A file of options has a line 'option: value' for each, and 'option: [a, b]' for a list"
_TRUE, _FALSE = {"true", "yes", "on", "1", "y"}, {"false", "no", "off", "0", "n"}
_NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)
# dashes that word processors and web pages make of two hyphens
_OTHER_DASHES = re.compile("^[\u2010-\u2015\u2212]+")


def spelled(words: Sequence[str], known: Mapping[str, Option]) -> list[str]:
    """Spell a command's words as its parser takes them.

    Options of ``--config`` files come first, so that flags replace them wherever they stand; a
    later file replaces options of an earlier one. Underscores in flags, unique beginnings of flags,
    values of switches (``--quiet=true``) and negative numbers are rewritten.

    Args:
        words: The words after the command.
        known: The command's options by name.

    Raises:
        ValueError: If a file cannot be read, a switch has no value of truth, a list is given twice,
            or a flag begins with another dash.
    """
    configs, own, lists = _own_words([word.rstrip("\r") for word in words], known)
    options: Options = {}
    for path in configs:
        options |= read_config(Path(path).expanduser(), known)
    options |= dict.fromkeys(lists)  # whose values are replaced, not added to
    found = []
    for name, values in options.items():
        if values is None:  # null: the default
            continue
        if known[name].type is bool:
            found.append(_switch(name, values[0]))
        elif name == "file":
            found.append(_read(name, known[name], values[0]))
        else:  # of a list a word each: one that begins with a hyphen is a value, too
            found += [f"{flag(name)}={_read(name, known[name], value)}" for value in values]
    return [*found, *own]


def _own_words(
    words: list[str], known: Mapping[str, Option]
) -> tuple[list[str], list[str], set[str]]:
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
        name = _name(word_flag, known)
        if name is None:
            found.append(word)
            continue
        following = waiting[-1] if waiting else None
        if name == "config":
            if not equals and (following is None or following.startswith("--")):
                raise ValueError("--config needs the name of a YAML file.")
            configs.append(value if equals else waiting.pop())
        elif known[name].type is bool:
            if not equals and following is not None and following.lower() in {"true", "false"}:
                equals, value = "=", waiting.pop()
            found.append(_switch(name, value) if equals else flag(name))
        elif known[name].several:
            if name in lists:
                raise ValueError(
                    f"{flag(name)} is given twice. Pass all of its values after one: "
                    f"{flag(name)} A B."
                )
            lists.add(name)
            values = [value] if equals else []
            while waiting and not waiting[-1].startswith("-"):
                values.append(waiting.pop())
            found += [f"{flag(name)}={_read(name, known[name], v)}" for v in values] or [flag(name)]
        elif equals or (following is not None and following != "-h" and following[:2] != "--"):
            value = value if equals else waiting.pop()
            found.append(f"{flag(name)}={_read(name, known[name], value)}")
            if "file" not in known and waiting and not waiting[-1].startswith("-"):
                raise ValueError(
                    f"{flag(name)} is given '{value}' and '{waiting[-1]}', and takes one value. "
                    "Pass the folder in place of its files, and put what has spaces into quotes."
                )
        else:
            found.append(flag(name))
    return configs, found, lists


# lists of files, each perhaps as name=file
_NAMED_FILES = {"lora", "checkpoints", "scores"}


def _read(name: str, option: Option, value: str) -> str:
    """A value; of a path with the home folder for ``~`` and the values of variables."""
    if option.several and name in _NAMED_FILES:
        own = named_path(value)[0]
        start = 0 if own is None else len(f"{own}=")
        return value[:start] + _path(name, value[start:])
    return _path(name, value) if option.type is Path else value


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


def _name(word: str, known: Mapping[str, Option]) -> str | None:
    """The option that a flag or the beginning of one names, if it is a single one."""
    if not word.startswith("--") or word == "--":
        return None
    meant = word[2:].replace("-", "_")
    taken = [*known, "config"]
    if meant in taken:
        return meant
    others = ["help", "print_config", *(f"no_{n}" for n, own in known.items() if own.type is bool)]
    found = [name for name in (*taken, *others) if name.startswith(meant) and name != "file"]
    return found[0] if len(found) == 1 and found[0] in taken else None


def _switch(name: str, value: str) -> str:
    """A switch as one word."""
    if value.strip().lower() in _TRUE:
        return flag(name)
    if value.strip().lower() in _FALSE:
        return flag(f"no_{name}")
    raise ValueError(f"{flag(name)} is {value!r}. Pass true or false.")


# ---------------------------------------------------------------------------------------------
# Files of options
# ---------------------------------------------------------------------------------------------


def read_config(path: Path, known: Mapping[str, Option]) -> Options:
    """Read the options of a file as texts, by name; ``None`` for null.

    YAML would make 8 of 010, true of ``yes`` and a text of 1e-8: values are taken as they are
    written, and what they mean is left to the option's type, as for flags.

    Args:
        path: The file.
        known: The command's options by name.

    Raises:
        ValueError: If the file is missing, neither YAML nor JSON, or has an option that is unknown,
            given twice, or of another form.
    """
    found: Options = {}
    for key, values in _pairs(path, _text(path)):
        name = key.replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name.lower(), known, 1, cutoff=0.75)
            advice = f"Did you mean '{close[0]}'?" if close else "--help lists what there is."
            if name == "config":
                advice = "Files of options do not name others: pass --config for each."
            raise ValueError(f"'{path}' has an option '{key}', which is unknown. {advice}")
        if name in found:
            raise ValueError(f"'{path}' has the option '{key}' twice. Leave one out.")
        if values is not None and None in values:
            raise ValueError(f"'{key}' in '{path}' has an empty entry. Leave it out.")
        if not known[name].several and values is not None and len(values) != 1:
            raise ValueError(
                f"'{key}' in '{path}' is a list of {len(values)} values, and takes one."
            )
        found[name] = [value for value in values or () if value is not None] or None
    return found


def _text(path: Path) -> str:
    """The text of a file, as editors of Windows write it, too."""
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


def _pairs(path: Path, text: str) -> Iterator[tuple[str, list[str | None] | None]]:
    """Yield keys, and values as they are written, of which ``None`` is null."""
    try:
        node = yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"--config: '{path}' cannot be parsed: {_told(error, text)}.") from error
    if not isinstance(node, yaml.MappingNode | None):
        raise ValueError(f"--config: '{path}' holds no options. {_FORM}.")

    def scalar(name: str, node: Any) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            raise ValueError(
                f"'{name}' in '{path}' holds options of its own or a list of lists. {_FORM}."
            )
        return None if node.tag == "tag:yaml.org,2002:null" else str(node.value)

    for key, value in () if node is None else node.value:  # nothing, or comments alone
        name = scalar(str(getattr(key, "value", key)), key)
        if name is None:
            raise ValueError(f"'{path}' has an option without a name. {_FORM}.")
        if isinstance(value, yaml.SequenceNode):
            yield name, [scalar(name, item) for item in value.value]
        else:
            own = scalar(name, value)
            yield name, None if own is None else [own]


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
