"""Options that files decide: of an earlier command, a list of the data, and a trainer.

Read before PyTorch is loaded, each printed with its source.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from curvlinops_diffusion.cli.options import (
    NETWORK,
    TRAINING,
    Option,
    commands,
    flag,
    in_flags,
    options_of,
)
from curvlinops_diffusion.cli.paths import check_exists
from curvlinops_diffusion.cli.running import event, say
from curvlinops_diffusion.influence.score_files import SCORES
from curvlinops_diffusion.linalg.operator_files import read_header
from curvlinops_diffusion.loading.dataset_config import is_config
from curvlinops_diffusion.loading.saved_networks import configs_of
from curvlinops_diffusion.loading.trainer_settings import (
    ARGUMENTS,
    base_in,
    by_data,
    by_hand,
    by_recipe,
)
from curvlinops_diffusion.runtime.files import named_path

# what decides nothing about a result
_OF_THE_RUN = {"command", "output", "overwrite", "dry_run", "time", "log", "quiet", "debug"}
_PATHS = {"pipeline", "pipeline_config", "model", "scheduler", "lora", "data", "queries"}


def of_run(options: Namespace) -> dict[str, Any]:
    """Options that decide the result of a command, as plain values with absolute paths."""
    return {
        name: _plain(name, value)
        for name, value in vars(options).items()
        if name not in _OF_THE_RUN and value is not None
    }


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Path) or (name == "recipe" and value != "none"):
        return str(Path(value).absolute())
    if name in ("lora", "checkpoints"):
        named = [named_path(text) for text in value]
        return [f"{own}={p.absolute()}" if own else str(p.absolute()) for own, p in named]
    return value


def as_yaml(options: Namespace) -> str:
    """Write all that decides the result, as ``--config`` reads it."""
    return str(yaml.safe_dump(of_run(options), sort_keys=False, allow_unicode=True))


def completed(name: str, given: dict[str, Any]) -> Namespace:
    """The options of a command: those given, those of the earlier command's file, and defaults.

    Args:
        name: The command.
        given: The options that were given.

    Raises:
        ValueError: If one contradicts the earlier command, a path is no more there, or one is
            missing.
    """
    options_of(name, **given)  # numbers are checked before files are looked at
    earlier = commands()[name].earlier
    path = None if earlier is None else given.get(earlier)
    if path is None:
        taken = _of_data(name, given)
    else:
        by = {"operator": "fit", "scores": "score"}[earlier or ""]
        check_exists(path, flag(earlier or ""), f"Make it by curvlinops-diffusion {by}.")
        header = read_header(path)["info"] if by == "fit" else SCORES.read_header(path)
        taken = _taken(name, path, header.get("run", {}), given)
    options = options_of(name, **(taken | given))
    for key in ("data", "queries"):  # which a later command must know, given or not
        if earlier is not None and getattr(options, key, "") is None:
            where = f"'{path}' does not name them" if path else f"there is no --{earlier}"
            raise ValueError(f"{flag(key)} is missing, and {where}. Pass {flag(key)} FOLDER.")
    return options


def _of_data(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Options that a file which lists the data decides, each printed with its source."""
    data, known = given.get("data"), commands()[name].options
    if data is None or not is_config(data) or "recipe" not in known:  # which computes nothing
        return {}
    check_exists(data, "--data", "Pass the dataset.toml of kohya's scripts, or a folder.")
    decided, lines = by_data(data, given, known)
    if decided:
        say(f"As '{data}' says: {_words(known, decided)}")
    for line in lines:
        say(in_flags(line))
    event("decided", file=str(data), options=decided)
    return decided


def _taken(name: str, path: Path, run: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Read the options that a command takes from a file, and print them in a line.

    Raises:
        ValueError: If what is given contradicts it, or a path of it is no more there.
    """
    # seeds decide no loss, and arguments are compared by the library, which knows their defaults
    for key in ({"variant", *TRAINING.split()}) - {"seed", "training_arguments"}:
        if run and key in given and _plain(key, given[key]) != run.get(key):
            raise ValueError(
                f"{flag(key)} {given[key]} contradicts '{path}', which was made with "
                f"{run.get(key, 'none')}. Leave it out, or begin with fit anew."
            )
    kept = {*NETWORK.split(), *TRAINING.split(), "data", "queries", "operator", "batch_size"}
    kept -= {"device", "shard_network", *given}
    if name == "validate-measure":  # other networks, on draws of their own
        kept -= {"lora", "seed"}
        kept |= {"measurement"} - given.keys()
    if given.keys() & {"model", "scheduler"}:
        kept -= {"pipeline", "pipeline_config"}
    if "pipeline" in given:
        kept -= {"model", "scheduler", "pipeline_config"}
    known = commands()[name].options
    taken = {key: value for key, value in run.items() if key in kept and key in known}
    if not Path(taken.get("operator", path)).exists():  # which only adds to a page
        del taken["operator"]
    for key, value in taken.items():
        for each in (value if known[key].several else [value]) if key in _PATHS else ():
            place = named_path(each)[1] if key == "lora" else Path(each)
            if not place.exists():
                raise ValueError(
                    f"'{place}' ({flag(key)}), which '{path}' was made with, is no more there. "
                    f"Pass {flag(key)} with where it is now."
                )
    if words := _words(known, taken):
        say(f"As '{path}' was made: {words}")
        event("taken", file=str(path), options=taken)
    return {k: Path(v) if known[k].type is Path else v for k, v in taken.items()}


def _words(known: Mapping[str, Option], taken: Mapping[str, Any]) -> str:
    """Options as they are written, without those that are as by default."""
    return " ".join(
        flag(key)
        if value is True
        else f"{flag(key)} {' '.join(value) if known[key].several else value}"
        for key, value in taken.items()
        if value != known[key].default
    )


def read_recipe(options: Namespace, given: Mapping[str, Any]) -> None:
    """Set the options of a command that were not given and that a trainer has left.

    Commands that take the options of an earlier one have them by that. An adapter that left
    nothing decides nothing; of several adapters, none does.

    Args:
        options: The options of the command, whose paths have been checked.
        given: Those that were given.

    Raises:
        ValueError: If what it left is damaged, of another kind of pipeline, or changes the
            objective in a way that no option expresses; or if it is given without a pipeline.
    """
    command, recipe = commands()[options.command], getattr(options, "recipe", None)
    taken = command.earlier is not None and getattr(options, command.earlier) is not None
    if "recipe" not in command.options or taken:
        return
    adapters = options.lora or []
    if recipe is None and len(adapters) == 1:
        recipe = named_path(adapters[0])[1]
    elif recipe is None and adapters:
        say("Recipe: not read of several adapters; --recipe FILE reads that of one")
    if recipe is None or str(recipe) == "none":
        return
    if options.pipeline is None:
        if "recipe" not in given:
            return
        raise ValueError("--recipe is of a --pipeline, got --model alone. Leave it out.")
    known = {k: v for k, v in vars(options).items() if k in command.options}
    known[ARGUMENTS] = parse_arguments(options.training_arguments)
    defaults = {name: option.default for name, option in command.options.items()}
    base = base_in(configs_of(options.pipeline, options.pipeline_config), options.pipeline)
    hand, data = by_hand(known, defaults, given), getattr(options, "data", None)
    found, lines = by_recipe(Path(recipe), base, hand, command.options, data)
    options.recipe = str(Path(recipe).absolute())
    for line in lines:
        say(f"Recipe: {in_flags(line)}")
    event("recipe", file=str(recipe), options=found, lines=lines)
    if ARGUMENTS in found:
        found[ARGUMENTS] = [f"{k}={json.dumps(v)}" for k, v in found[ARGUMENTS].items()]
    vars(options).update(found)


def parse_arguments(texts: Sequence[str] | None) -> dict[str, Any]:
    """Parse ``name=value``, whose values are numbers, ``true``, ``null``, lists, or plain text.

    Raises:
        ValueError: If one has no name, or a name is repeated.
    """
    found: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = str(text).partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name or name in found:
            raise ValueError(
                f"--training-arguments got '{text}'. Pass each as name=value, once, for instance "
                "max_sequence_length=77 guidance_scale=3.5."
            )
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found
