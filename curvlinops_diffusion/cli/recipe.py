"""Options that the trainer of an adapter has left, read before PyTorch is loaded."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from curvlinops_diffusion.cli.options import commands, in_flags
from curvlinops_diffusion.cli.running import event, say
from curvlinops_diffusion.loading.saved_networks import configs_of
from curvlinops_diffusion.loading.trainer_settings import ARGUMENTS, base_in, by_hand, by_recipe
from curvlinops_diffusion.runtime.files import named_path


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
    defaults = {name: option.default for name, option in command.options.items()}
    known[ARGUMENTS] = parse_arguments(options.training_arguments)
    decided, data = by_hand(known, defaults, given), getattr(options, "data", None)
    configs = configs_of(options.pipeline, options.pipeline_config)
    base = base_in(configs, options.pipeline)
    found, lines = by_recipe(Path(recipe), base, decided, command.options, data)
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
