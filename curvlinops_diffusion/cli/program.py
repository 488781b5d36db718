"""The command line: what each command does, and what becomes of errors."""

from __future__ import annotations

import difflib
import re
import sys
import time
import traceback
import warnings
from argparse import SUPPRESS
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser, DefaultHelpFormatter

from curvlinops_diffusion.cli import lacking
from curvlinops_diffusion.cli.decided import completed, read_recipe
from curvlinops_diffusion.cli.options import Option, commands, flag, in_flags
from curvlinops_diffusion.cli.paths import check_paths, find_paths
from curvlinops_diffusion.cli.running import event, say, start_log
from curvlinops_diffusion.cli.signatures import REQUIRED
from curvlinops_diffusion.cli.words import spelled
from curvlinops_diffusion.linalg.operator_files import OPERATOR

# the module of each command, in which it is the function of its name; imported when it is run: help
# and refusals need not wait for PyTorch
_MODULES = {
    **dict.fromkeys(("attribute", "fit", "score", "report", "validate-check"), "attribute"),
    "inspect": "inspect",
    **dict.fromkeys(("validate-plan", "validate-measure", "validate-judge"), "validate"),
}
# what may stand as two words
_PAIRS = [tuple(name.split("-")) for name in _MODULES if "-" in name]


def parser(only: str | None = None) -> ArgumentParser:
    """Flags of all commands, or of one; each may also come from ``--config FILE.yaml``."""
    top = ArgumentParser(
        prog="curvlinops-diffusion",
        formatter_class=_Help,
        exit_on_error=False,
        description="Which training images made a diffusion model generate this?",
        version=version("curvlinops-diffusion"),
    )
    below = top.add_subcommands(required=True, dest="command")
    for name, command in commands().items():
        known = command.options.items()
        shown = [(k, o) for k, o in known if o.default is REQUIRED or (k, name) in _SHOWN]
        needed = " ".join(
            f"{flag(k)} {_metavar(k, o)}" if k != "file" else "FILE" for k, o in shown
        )
        own = ArgumentParser(
            description=command.title,
            usage=f"curvlinops-diffusion {name.replace('-', ' ')} {needed} [options]",
            exit_on_error=False,
            formatter_class=_Help,
        )
        own.add_argument("--config", action="config", help="A YAML or JSON file of options.")
        for title, options in command.groups.items() if only in (None, name) else ():
            group = own.add_argument_group(title)
            for key, option in options.items():
                _add_flag(group, key, option)
        below.add_subcommand(name, own, help=command.title)
    return top


class _Help(DefaultHelpFormatter):
    """Help in sentences, the default after them where there is one."""

    def _get_help_string(self, action: Any) -> str:
        text = action.help or ""
        without = any(action.default is value for value in (None, False, SUPPRESS))
        if without or not action.option_strings:
            return text
        return f"{text} [{action.default}]"


# what most need, though there is another way
_SHOWN = {("pipeline", "attribute"), ("pipeline", "fit")}
_KINDS = {int: "N", float: "X", str: "TEXT", Path: "FILE"}
_GIVEN = {"lora": "FILE ...", "checkpoints": "FILE ...", "remove": "N ...", "params": "PATTERN ..."}
_GIVEN |= {"training_arguments": "NAME=VALUE ..."}
_FOLDERS = ("pipeline", "pipeline_config", "model", "data", "queries", "held_out", "latent_cache")
_GIVEN |= dict.fromkeys(_FOLDERS, "FOLDER")


def _metavar(name: str, option: Option) -> str | None:
    """The placeholder of an option's value in the help."""
    within = [option.type, *get_args(option.type)]
    within += [word for kind in within for word in get_args(kind)]
    words = [word for word in within if isinstance(word, str)]
    known = [_KINDS[kind] for kind in within if isinstance(kind, type) and kind in _KINDS]
    choices = "{" + ",".join(dict.fromkeys(words)) + "}" if words else None
    if option.help.startswith("The folder"):
        return "FOLDER"
    return _GIVEN.get(name) or (known[0] if known else choices)


def _add_flag(group: Any, name: str, option: Option) -> None:
    """Add an option to a parser; ``file`` is positional."""
    shown: dict[str, Any] = {"help": option.help, "metavar": _metavar(name, option)}
    kind = option.type
    if option.default is REQUIRED:
        shown |= {} if name == "file" else {"required": True}
    else:
        shown["default"] = option.default
        if option.default is None and kind is not str and not option.several:
            kind = kind | None  # text never as null, which would drop a prompt of that name
    if option.several:
        shown["action"] = "append"
        kind = str  # what may be chosen is checked with the numbers: jsonargparse knows no lists
    if option.type is bool:
        del shown["metavar"]
        shown["action"] = ActionYesNo(no_prefix="no-")
    else:
        shown["type"] = kind
        if bool in get_args(kind):  # alone, or with a value
            shown |= {"nargs": "?", "const": True}
    group.add_argument("file" if name == "file" else flag(name), **shown)


def run(arguments: Sequence[str]) -> int:
    """Run a command.

    Returns:
        The exit code: 0, 2 for an error (told in one line), 130 if interrupted.
    """
    words = list(arguments)
    if tuple(words[:2]) in _PAIRS:
        words[:2] = ["-".join(words[:2])]
    if words in ([], ["help"]):  # somebody looks at it for the first time
        parser().print_help()
        return 0
    if words[0] == "validate" and set(words[1:]) <= {"help", "-h", "--help"}:
        print(_of_validate())
        return 0
    debug = "--debug" in words
    start = time.monotonic()
    try:
        name, given = understood(words)
        debug = given.get("debug", False)
        start_log(given.get("log"))
        event("start", command=name, options={key: str(value) for key, value in given.items()})
        with warnings.catch_warnings():
            # of libraries that the user cannot do anything about
            warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = lambda message, *rest, **kw: say(f"warning: {message}")
            options = completed(name, given)
            find_paths(options)
            check_paths(options)
            read_recipe(options, given)
            try:
                module = import_module(f"curvlinops_diffusion.cli.{_MODULES[name]}")
            except ModuleNotFoundError as error:
                raise ValueError(lacking(error)) from error
            getattr(module, name.replace("-", "_"))(options)
    except KeyboardInterrupt:
        say("interrupted; start again with the same options to go on")
        event("interrupted")
        return 130
    except Exception as error:  # told in one line, whatever it is
        if debug:
            traceback.print_exc()
        expected = isinstance(error, ValueError)
        text = " ".join(str(error).split()) or type(error).__name__
        text = in_flags(text.replace(OPERATOR.advice, "Make it by curvlinops-diffusion fit."))
        hint = "" if expected else f" ({type(error).__name__}; --debug shows where)"
        say(f"error: {text}{hint}")
        event("error", message=text)
        return 2
    event("end", seconds=round(time.monotonic() - start, 3))
    return 0


def _of_validate() -> str:
    """The help of the commands that begin with the same word."""
    known = commands()
    lines = "\n".join(
        f"  validate {second:8}  {known[f'{first}-{second}'].title}" for first, second in _PAIRS
    )
    return (
        "usage: curvlinops-diffusion validate {check,plan,measure,judge} [options]\n\n"
        "How far are scores to be trusted? check looks for faults, in minutes and without "
        "training.\nThe others ask whether scores predict what happens to networks that are "
        f"trained without some images.\n\n{lines}\n\nAfter each of them, --help lists its options."
    )


def understood(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command's name, and the options that are given.

    Raises:
        ValueError: If there is no such command or option, or an option is of another kind.
    """
    try:
        if words[0] in _MODULES:
            words = [words[0], *spelled(words[1:], commands()[words[0]].options)]
        only = words[0] if words[0] in _MODULES else None
        parsed = parser(only).parse_args(words, defaults=False)
        known, chosen = commands()[parsed.command].options, vars(parsed[parsed.command])
        given = {key: value for key, value in chosen.items() if key in known and value is not None}
        return parsed.command, given
    except (ArgumentError, OSError, ValueError) as error:
        start_log(_named_log(words))
        event("start", words=words)
        if isinstance(error, ValueError):
            raise
        shown = f"curvlinops-diffusion {words[0]} --help"
        if words[0] not in _MODULES:
            shown = "curvlinops-diffusion --help"
        raise ValueError(
            f"{_plain(str(error))}. {_meant(words)}'{shown}' shows what there is."
        ) from error


def _meant(words: list[str]) -> str:
    """A guess at what was meant by the first word that is unknown."""
    if words[0] not in _MODULES:
        unknown, known = words[0], list(_MODULES)
    else:
        known = [flag(name) for name in commands()[words[0]].options]
        flags = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
        unknown = next((word for word in flags if word not in known), "")
    found = difflib.get_close_matches(unknown.replace("_", "-"), known, 1, cutoff=0.75)
    return f"Did you mean {found[0]}? " if found else ""


def _plain(text: str) -> str:
    """A parser's message in one line, with flags for its keys and kinds for its types."""
    text = " ".join(text.split()).rstrip(".")
    text = re.sub(r'Parser key "(\w+)"', lambda match: flag(match[1]), text)
    text = re.sub(rf"\b(?:{'|'.join(_MODULES)})\.(\w+)", lambda match: flag(match[1]), text)
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
