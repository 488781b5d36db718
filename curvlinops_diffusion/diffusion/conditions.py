"""Conditions: nested mappings of what the network is given besides the image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def rows_of(value: Any, index: slice | list[int]) -> Any:
    """Rows of every tensor with axes, and of every list, in a nested mapping."""
    if isinstance(value, Mapping):
        return {key: rows_of(entry, index) for key, entry in value.items()}
    if isinstance(value, Tensor) and value.ndim > 0:
        return value[index]
    if isinstance(value, list):  # prompts
        return value[index] if isinstance(index, slice) else [value[i] for i in index]
    return value


def leaves(condition: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a nested mapping, by names joined with a slash."""
    for key, value in sorted(condition.items()):
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


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


def _replaced(condition: Mapping[str, Any], null: Mapping[str, Any], mask_B: Tensor) -> dict:
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
            result[key] = _replaced(given, value, mask_B)
            continue
        mask = mask_B.to(given.device).reshape(-1, *[1] * (given.ndim - 1))
        result[key] = torch.where(mask, torch.as_tensor(value).to(given), given)
    return result
