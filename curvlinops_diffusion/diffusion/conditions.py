"""Conditions: nested mappings of what the network is given besides the image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.runtime.checks import plain_tensor
from curvlinops_diffusion.runtime.devices import to_device, to_like


def mapped(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """Apply a function to the corresponding entries of nested mappings.

    Lists are entries (prompts), and every kind of mapping is walked through, unlike by torch's own
    trees.
    """
    if isinstance(first, Mapping):
        return {key: mapped(function, *(c[key] for c in (first, *others))) for key in first}
    return function(first, *others)


def has_rows(entry: Any) -> bool:
    """Tell whether an entry has a row for each example: a tensor with axes, or a list."""
    return isinstance(entry, list) or (isinstance(entry, Tensor) and entry.ndim > 0)


def rows_of(condition: Any, index: slice | list[int]) -> Any:
    """Rows of every tensor with axes, and of every list, in a nested mapping."""

    def rows(entry: Any) -> Any:
        if isinstance(entry, list) and not isinstance(index, slice):
            return [entry[i] for i in index]
        return entry[index] if has_rows(entry) else entry

    return mapped(rows, condition)


def leaves(condition: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a nested mapping, by names joined with a slash."""
    for key, value in sorted(condition.items()):
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def named(condition: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The nested mapping whose entries are the names that :func:`leaves` gives them."""
    return {
        key: named(value, f"{prefix}{key}/") if isinstance(value, Mapping) else f"{prefix}{key}"
        for key, value in condition.items()
    }


def nested(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The nested mapping whose :func:`leaves` these are."""
    result: dict[str, Any] = {}
    for name, value in entries.items():
        *outer, last = name.split("/")
        inner = result
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return result


def replaced(
    condition: Mapping[str, Any], null: Mapping[str, Any], mask_B: Tensor
) -> dict[str, Any]:
    """The entries named by ``null`` replaced by its values, for some examples."""
    result = dict(condition)
    for key, value in null.items():
        if key not in condition:
            raise ValueError(
                f"null_condition has an entry '{key}', but the condition only {sorted(condition)}. "
                "Name what is to be replaced as the data (or the encoder) does."
            )
        given = condition[key]
        if isinstance(value, Mapping):
            result[key] = replaced(given, value, mask_B)
            continue
        mask = to_device(mask_B, given.device).reshape(-1, *[1] * (given.ndim - 1))
        result[key] = torch.where(mask, to_like(torch.as_tensor(value), given), given)
    return result


def plain_arguments(given: Any) -> Any:
    """Arguments that the same are passed for all examples, without graphs; functions as they are.

    Raises:
        ValueError: If they are no mapping, or a tensor has no values.
    """

    def own(entry: Any) -> Any:
        return (
            plain_tensor(entry, "A tensor of model_kwargs") if isinstance(entry, Tensor) else entry
        )

    if callable(given):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(
            f"model_kwargs is, or returned, a {type(given).__name__}. Pass a dict of keyword "
            "arguments of the network, or a function of (x_t, condition) that returns one."
        )
    return mapped(own, given)
