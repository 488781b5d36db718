"""The command line: what each command does, and what becomes of errors."""

from __future__ import annotations

import difflib
import re
import sys
import time
import traceback
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import docstring_parser
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser, DefaultHelpFormatter

from curvlinops_diffusion.cli import lacking
from curvlinops_diffusion.cli.events import event, first_process, say, start_log
from curvlinops_diffusion.cli.options import (
    AttributeOptions,
    FitOptions,
    InspectOptions,
    ReportOptions,
    ScoreOptions,
    ValidateJudgeOptions,
    ValidateMeasureOptions,
    ValidatePlanOptions,
    flag,
    is_list,
)
from curvlinops_diffusion.cli.paths import check_paths
from curvlinops_diffusion.cli.words import spelled
from curvlinops_diffusion.linalg.operator_files import OPERATOR

#: The options of each command; the command itself is the function of its name in a module of its
#: name in ``commands/``, imported when it is run: help and refusals need not wait for PyTorch.
COMMANDS: dict[str, type[Any]] = {
    "attribute": AttributeOptions,
    "fit": FitOptions,
    "score": ScoreOptions,
    "report": ReportOptions,
    "inspect": InspectOptions,
    "validate-plan": ValidatePlanOptions,
    "validate-measure": ValidateMeasureOptions,
    "validate-judge": ValidateJudgeOptions,
}
#: What may stand as two words.
_PAIRS = {tuple(name.split("-")): name for name in COMMANDS if "-" in name}


def parser() -> ArgumentParser:
    """Flags of all commands, each of which may also come from ``--config FILE.yaml``."""
    top = ArgumentParser(
        prog="curvlinops-diffusion",
        formatter_class=_Help,
        exit_on_error=False,
        description="Which training images made a diffusion model generate this?",
        version=version("curvlinops-diffusion"),
    )
    commands = top.add_subcommands(required=True, dest="command")
    for name, options in COMMANDS.items():
        title = _title(options)
        own = ArgumentParser(
            description=title,
            usage=_usage(name, options),
            exit_on_error=False,
            formatter_class=_Help,
        )
        own.add_argument("--config", action="config", help="A YAML or JSON file of options.")
        types, texts = get_type_hints(options), _texts(options)
        for cls in (options, *options.__bases__):
            group = own.add_argument_group(
                "Inputs and outputs" if cls is options else _title(cls)[:-1]
            )
            for field in fields(options):
                if field.name in vars(cls).get("__annotations__", {}):
                    _add_flag(group, field, types[field.name], texts[field.name])
        commands.add_subcommand(name, own, help=title)
    return top


class _Help(DefaultHelpFormatter):
    """Help in sentences, the default after them where there is one."""

    def _get_help_string(self, action: Any) -> str:
        text = action.help or ""
        without = any(action.default is value for value in (None, False, SUPPRESS))
        if without or not action.option_strings:
            return text
        return f"{text} [{action.default}]"


def _title(options: type[Any]) -> str:
    return docstring_parser.parse(options.__doc__ or "").short_description or ""


def _usage(name: str, options: type[Any]) -> str:
    """The flags that a command needs."""
    needed = [f for f in fields(options) if f.default is MISSING or f.name == "pipeline"]
    words = [
        "FILE" if f.name == "file" else f"{flag(f.name)} {_metavar(f.name, Path)}" for f in needed
    ]
    return f"curvlinops-diffusion {name} {' '.join(words)} [options]"


# what a flag is given, for help
_FOLDERS = {"pipeline", "model", "scheduler", "data", "queries", "latent_cache", "plan"}
_FOLDERS |= {"retrained"}
_LISTS = {"lora": "FILE", "scores": "FILE", "remove": "N"}
_KINDS = {int: "N", float: "X", str: "TEXT", Path: "FILE"}


def _metavar(name: str, type_: Any) -> str | None:
    if name in _FOLDERS:
        return "FOLDER"
    within = [type_, *get_args(type_)]
    for kind in within:
        if kind in _KINDS:
            return _KINDS[kind]
    words = [word for kind in within for word in (kind, *get_args(kind)) if isinstance(word, str)]
    return "{" + ",".join(dict.fromkeys(words)) + "}" if words else None


def _add_flag(own: Any, field: Any, type_: Any, text: str) -> None:
    """A flag for a field of an options class; ``file`` is positional.

    A field's metadata may have ``choices``, and a function that returns its ``help``.
    """
    name = flag(field.name)
    shown: dict[str, Any] = {"help": text, "metavar": _metavar(field.name, type_)}
    if "choices" in field.metadata:
        choices, help_text = list(field.metadata["choices"]), field.metadata["help"]()
        own.add_argument(name, choices=choices, default=field.default, help=help_text)
    elif is_list(type_):
        shown["metavar"] = _LISTS.get(field.name, "PATTERN") + " ..."
        own.add_argument(name, action="append", type=str, default=field.default, **shown)
    elif type_ is bool:
        own.add_argument(
            name, action=ActionYesNo(no_prefix="no-"), default=field.default, help=text
        )
    elif field.name == "file":
        own.add_argument("file", type=type_, metavar="FILE", help=text)
    elif field.default is MISSING:
        own.add_argument(name, type=_taken(type_), required=True, **shown)
    else:
        own.add_argument(name, type=_taken(type_), default=field.default, **shown)


def _taken(type_: Any) -> Any:
    """How an option is read: text never as null, which would drop a prompt of that name."""
    return str if type_ == str | None else type_


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
    if tuple(words[:2]) in _PAIRS:
        words[:2] = [_PAIRS[words[0], words[1]]]
    if words in ([], ["help"]):  # somebody looks at it for the first time
        parser().print_help()
        return 0
    debug = "--debug" in words
    start = time.monotonic()
    try:
        name, options = understood(words)
        debug = options.debug
        if first_process():
            start_log(options.log)
        event("start", command=words[0], options={k: str(v) for k, v in vars(options).items()})
        with warnings.catch_warnings():
            # of libraries that the user cannot do anything about
            warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = lambda message, *rest, **kw: say(f"warning: {message}")
            check_paths(options)
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
        name = name.replace("-", "_")
        module = import_module(f"curvlinops_diffusion.cli.commands.{name}")
    except ModuleNotFoundError as error:
        raise ValueError(lacking(error)) from error
    command: Callable[[Any], None] = getattr(module, name)
    return command


def understood(words: list[str]) -> tuple[str, Any]:
    """The command's name, and its options.

    Raises:
        ValueError: If there is no such command or option, or an option is of another kind.
    """
    try:
        if words and words[0] in COMMANDS:
            words = [words[0], *spelled(words[1:], get_type_hints(COMMANDS[words[0]]))]
        parsed = parser().parse_args(words)
        options_of = COMMANDS[parsed.command]
        known = {field.name for field in fields(options_of)}
        chosen = vars(parsed[parsed.command])
        return parsed.command, options_of(**{key: chosen[key] for key in known & chosen.keys()})
    except (ArgumentError, OSError, ValueError) as error:
        if first_process():
            start_log(_named_log(words))
        event("start", words=words)
        if isinstance(error, ValueError):
            raise
        about = [words[0]] if words and words[0] in COMMANDS else []
        shown = " ".join(["curvlinops-diffusion", *about, "--help"])
        meant = _meant(words)
        raise ValueError(f"{_plain(str(error))}. {meant}'{shown}' shows what there is.") from error


def _meant(words: list[str]) -> str:
    """A guess at what was meant by the first word that is unknown."""
    if words[0] not in COMMANDS:
        unknown, known = words[0], list(COMMANDS)
    else:
        known = [flag(field.name) for field in fields(COMMANDS[words[0]])]
        flags = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
        unknown = next((word for word in flags if word not in known), "")
    found = difflib.get_close_matches(unknown.replace("_", "-"), known, 1, cutoff=0.75)
    return f"Did you mean {found[0]}? " if found else ""


def _plain(text: str) -> str:
    """A parser's message in one line, with flags for its keys and kinds for its types."""
    text = " ".join(text.split()).rstrip(".")
    text = re.sub(r'Parser key "(\w+)"', lambda match: flag(match[1]), text)
    text = re.sub(rf"\b(?:{'|'.join(COMMANDS)})\.(\w+)", lambda match: flag(match[1]), text)
    several = r"Does not validate .* Errors: - (.*) Given value type: .* Given value: "
    text = text.replace(" - Expected a <class 'NoneType'>", "")  # whose options have a default
    text = re.sub(several, lambda m: m[1].replace(" - E", " or e") + ". Got value: ", text)
    text = re.sub(r"(?:a )?<class '(\w+)'>", r"\1", text).replace("a typing.Literal", "one of ")
    return text.replace("required: --file", "required: FILE")


def _named_log(words: list[str]) -> Path | None:
    """The file that ``--log`` names among words that are not understood otherwise."""
    for word, following in pairwise([*words, ""]):
        if word.startswith("--log="):
            return Path(word.removeprefix("--log="))
        if word == "--log" and following:
            return Path(following)
    return None


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
