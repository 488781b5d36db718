"""Options that files decide where nobody does: the recipe of a trainer, and a list of the data.

The door and the program have it from here. Without PyTorch, so that the program starts without.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from curvlinops_diffusion.loading.dataset_config import DatasetConfig, is_config
from curvlinops_diffusion.loading.trainer_entries import Base
from curvlinops_diffusion.loading.trainer_settings import read_settings, settle

#: The option that holds others, and what they are called beside the rest.
ARGUMENTS = "training_arguments"
_PLAIN = str | float | int


def by_hand(
    values: Mapping[str, Any], defaults: Mapping[str, Any], named: Collection[str] = ()
) -> dict[str, Any]:
    """The options that are decided already: those that were named, or are not at their defaults.

    Args:
        values: The options; ``None`` is what nobody decides.
        defaults: Their defaults; options without are decided.
        named: Those that were given, perhaps at their defaults.
    """

    def is_usual(name: str, value: Any) -> bool:
        usual = defaults.get(name)
        return isinstance(usual, _PLAIN) and isinstance(value, _PLAIN) and value == usual

    return {
        name: value
        for name, value in values.items()
        if value is not None and (name in named or not is_usual(name, value))
    }


def by_data(
    data: Any, given: Mapping[str, Any], known: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Options that a ``dataset.toml`` decides; of other data none.

    Args:
        data: The training images, as they are passed.
        given: Options that are decided already.
        known: The options that there are.

    Returns:
        The options, and what people are told beside them, a line each.

    Raises:
        ValueError: If it is damaged, or training saw something that cannot be expressed.
    """
    return DatasetConfig(data).settled(given, known) if is_config(data) else ({}, [])


def by_recipe(
    recipe: Path, base: Base, given: Mapping[str, Any], known: Collection[str], data: Any = None
) -> tuple[dict[str, Any], list[str]]:
    """Options that the files of a trainer decide.

    Args:
        recipe: The adapter's file or folder, or the config of its trainer.
        base: The pipeline.
        given: Options that are decided already; ``training_arguments`` by their names.
        known: The options that there are.
        data: The training images; of a ``dataset.toml`` it says itself what was made of them.

    Returns:
        The options, ``training_arguments`` with those that are given, and what people are told, a
        line each.

    Raises:
        ValueError: If what it left is damaged, of another kind of pipeline, or changes the
            objective in a way that no option expresses.
    """
    arguments = dict(given.get(ARGUMENTS) or {})
    flat = {name: value for name, value in given.items() if name != ARGUMENTS}
    flat |= {f"{ARGUMENTS}.{name}": value for name, value in arguments.items()}
    found, lines = settle(read_settings(recipe), base, flat, known, is_config(data))
    inner = {name: found.pop(name) for name in list(found) if "." in name}
    if inner:
        inner = {name.partition(".")[2]: value for name, value in inner.items()}
        found[ARGUMENTS] = {**arguments, **inner}
    return found, lines
