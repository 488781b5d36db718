"""The command line: what each command does, and what becomes of errors."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import docstring_parser
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser

from curvlinops_diffusion.cli import lacking
from curvlinops_diffusion.cli.events import event, say, start_log
from curvlinops_diffusion.cli.options import (
    FitOptions,
    InspectOptions,
    ReportOptions,
    ScoreOptions,
    flag,
)
from curvlinops_diffusion.linalg.operator_files import OPERATOR

#: The options of each command; the command itself is the function of its name in a module of its
#: name in ``commands/``, imported when it is run: help and refusals need not wait for PyTorch.
COMMANDS: dict[str, type[Any]] = {
    "fit": FitOptions,
    "score": ScoreOptions,
    "report": ReportOptions,
    "inspect": InspectOptions,
}


def parser() -> ArgumentParser:
    """Flags of all commands, each of which may also come from ``--config FILE.yaml``."""
    top = ArgumentParser(
        prog="curvlinops-diffusion",
        exit_on_error=False,
        description="Which training images made a diffusion model generate this?",
        version=version("curvlinops-diffusion"),
    )
    commands = top.add_subcommands(required=True, dest="command")
    for name, options in COMMANDS.items():
        title = docstring_parser.parse(options.__doc__ or "").short_description
        own = ArgumentParser(description=title, exit_on_error=False)
        own.add_argument("--config", action="config", help="YAML file of options")
        types, texts = get_type_hints(options), _texts(options)
        for field in fields(options):
            _add_flag(own, field, types[field.name], texts[field.name])
        commands.add_subcommand(name, own, help=title)
    return top


def _add_flag(own: ArgumentParser, field: Any, type_: Any, text: str) -> None:
    """A flag for a field of an options class; ``file`` is positional.

    A field's metadata may have ``choices``, and a function that returns its ``help``.
    """
    if "choices" in field.metadata:
        own.add_argument(
            flag(field.name),
            choices=list(field.metadata["choices"]),
            default=field.default,
            help=field.metadata["help"](),
        )
        return
    if type_ == list[str] | None:
        own.add_argument(flag(field.name), nargs="+", type=str, default=field.default, help=text)
        return
    if type_ is bool:
        own.add_argument(
            flag(field.name), action=ActionYesNo(no_prefix="no-"), default=field.default, help=text
        )
    elif field.default is MISSING:
        if field.name == "file":
            own.add_argument("file", type=type_, help=text)
        else:
            own.add_argument(flag(field.name), type=type_, required=True, help=text)
    else:
        own.add_argument(flag(field.name), type=type_, default=field.default, help=text)


def _texts(options: type[Any]) -> dict[str, str]:
    """Collect what the docstrings of an options class and its parents say of each field."""
    return {
        entry.arg_name: " ".join((entry.description or "").split())
        for cls in reversed(options.__mro__)
        for entry in docstring_parser.parse(cls.__doc__ or "").params
    }


def run(arguments: Sequence[str]) -> int:
    """Run a command.

    Returns:
        The exit code: 0, 2 for an error (told in one line), 130 if interrupted.
    """
    words = list(arguments)
    if not words:  # somebody looks at it for the first time
        parser().print_help()
        return 0
    debug = "--debug" in words
    start = time.monotonic()
    try:
        name, options = _understood(words)
        debug = options.debug
        if _first_process():
            start_log(options.log)
        event("start", command=words[0], options={k: str(v) for k, v in vars(options).items()})
        with warnings.catch_warnings():
            # of libraries that the user cannot do anything about
            warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = lambda message, *rest, **kw: say(f"warning: {message}")
            _command(name)(options)
    except KeyboardInterrupt:
        say("interrupted; start again with the same options to go on")
        event("interrupted")
        return 130
    except Exception as error:  # told in one line, whatever it is
        if debug:
            traceback.print_exc()
        expected = isinstance(error, ValueError)
        text = " ".join(str(error).split()) or type(error).__name__
        text = text.replace(OPERATOR.advice, "Make it by curvlinops-diffusion fit.")
        hint = "" if expected else f" ({type(error).__name__}; --debug shows where)"
        say(f"error: {text}{hint}")
        event("error", message=text)
        return 2
    event("end", seconds=round(time.monotonic() - start, 3))
    return 0


def _command(name: str) -> Callable[[Any], None]:
    """The function that a command is.

    Raises:
        ValueError: If a package is missing that it needs.
    """
    try:
        module = import_module(f"curvlinops_diffusion.cli.commands.{name}")
    except ModuleNotFoundError as error:
        raise ValueError(lacking(error)) from error
    command: Callable[[Any], None] = getattr(module, name)
    return command


def _understood(words: list[str]) -> tuple[str, Any]:
    """The command's name, and its options.

    Raises:
        ValueError: If there is no such command or option, or an option is of another kind.
    """
    try:
        parsed = parser().parse_args(words)
        options_of = COMMANDS[parsed.command]
        known = {field.name for field in fields(options_of)}
        chosen = vars(parsed[parsed.command])
        return parsed.command, options_of(**{key: chosen[key] for key in known & chosen.keys()})
    except (ArgumentError, OSError, ValueError) as error:
        if _first_process():
            start_log(_named_log(words))
        event("start", words=words)
        if isinstance(error, ValueError):
            raise
        about = [words[0]] if words and words[0] in COMMANDS else []
        shown = " ".join(["curvlinops-diffusion", *about, "--help"])
        raise ValueError(f"{_plain(str(error))}. '{shown}' shows what there is.") from error


def _plain(text: str) -> str:
    """A parser's message in one line, with flags for its keys and kinds for its types."""
    text = " ".join(text.split()).rstrip(".")
    text = re.sub(r'Parser key "(\w+)"', lambda match: flag(match[1]), text)
    text = re.sub(rf"\b(?:{'|'.join(COMMANDS)})\.(\w+)", lambda match: flag(match[1]), text)
    return re.sub(r"(?:a )?<class '(\w+)'>", r"\1", text).replace("a typing.Literal", "one of ")


def _named_log(words: list[str]) -> Path | None:
    """The file that ``--log`` names among words that are not understood otherwise."""
    for word, following in pairwise([*words, ""]):
        if word.startswith("--log="):
            return Path(word.removeprefix("--log="))
        if word == "--log" and following:
            return Path(following)
    return None


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # as torchrun numbers them


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
