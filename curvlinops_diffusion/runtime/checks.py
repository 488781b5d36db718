"""Checks of what users pass, which raise a ``ValueError``: of options, tensors and results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from math import isfinite
from numbers import Number
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

E = TypeVar("E", bound=Enum)

# C++ stacks, which torch appends to its messages
_STACK = re.compile(r"^(?:frame #|Exception raised from )")


def check_option(name: str, value: Any, options: type[E]) -> E:
    """Return the member of ``options`` that ``value`` names."""
    try:
        return options(value)
    except ValueError:
        accepted = ", ".join(repr(option.value) for option in options)
        raise ValueError(f"`{name}` must be one of {accepted}, got {value!r}.") from None


def check_count(name: str, value: Any) -> int:
    """Return ``value`` if it is a whole number of at least one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
    return value


def check_non_negative(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is finite and at least zero."""
    if not isinstance(value, int | float) or not isfinite(value) or value < 0:
        raise ValueError(f"`{name}` must be a finite number of at least 0, got {value!r}.")
    return float(value)


def check_positive(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is finite and above zero."""
    if not isinstance(value, int | float) or not isfinite(value) or value <= 0:
        raise ValueError(f"`{name}` must be positive and finite, got {value!r}.")
    return float(value)


def check_finite(tensor: Tensor, what: str) -> None:
    """Check that a computed quantity is finite."""
    if not torch.isfinite(tensor).all():
        check_finite_count(what, int((~torch.isfinite(tensor)).sum()), tensor.numel())


def check_finite_count(what: str, count: int, entries: int) -> None:
    """Check the number of a computed quantity's entries that are not finite."""
    if count:
        raise ValueError(
            f"{what} has {count} entries that are NaN or infinite (of {entries}). Check the "
            "model's weights and the data; if the model runs in float16 or bfloat16, try float32."
        )


def plain(value: Any, what: str) -> Any:
    """Convert a value of the data for the network's passes, with the same numbers.

    Tensors lose their graph and the marks of inference mode, arrays become tensors; mappings are
    walked through, other values are as they were (a list of numbers too: the network may want it).
    """
    if isinstance(value, Tensor):
        return plain_tensor(value, what)
    if isinstance(value, Mapping):
        return {key: plain(each, f"{what}[{key!r}]") for key, each in value.items()}
    if not isinstance(value, np.ndarray):
        return value
    try:
        # a copy: the array may be read-only, reversed, or in another byte order
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise ValueError(
            f"{what} is an array of {value.dtype}, of which there are no tensors. Pass numbers, or "
            "a list of texts."
        ) from error


def plain_labels(value: Any) -> Any:
    """Convert labels of few bits, or in a list, to numbers that index tables of embeddings."""
    if isinstance(value, list) and value and all(isinstance(z, Number) for z in value):
        return torch.as_tensor(value)
    # tables of embeddings are not indexed by these
    short = isinstance(value, Tensor) and value.dtype in (torch.uint8, torch.int8, torch.int16)
    return value.long() if short else value


def plain_tensor(tensor: Tensor, what: str) -> Tensor:
    """Convert a tensor as :func:`plain` does."""
    if reason := _unusual(tensor):
        raise ValueError(f"{what} {reason}.")
    # Parameters, images of torchvision; not those whose operations are their own (DTensor)
    usual = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    if type(tensor) is not Tensor and usual:
        tensor = tensor.as_subclass(Tensor)
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.clone() if tensor.is_inference() else tensor


def _unusual(tensor: Tensor) -> str | None:
    """Say why a tensor cannot be used as it is, and what to do."""
    if tensor.is_meta:
        return "has no values (it is on the device 'meta'). Load it onto a device"
    if tensor.is_nested:
        return "is a nested tensor. Pass examples of one shape, torch.stack(tensor.unbind())"
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype}). Pass tensor.dequantize()"
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}. Pass tensor.to_dense()"
    if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
        return f"is of {tensor.dtype}, which cannot be computed with. Pass tensor.float()"
    return None


def quoted(error: BaseException) -> str:
    """Quote an error of another library in one line of at most 400 characters.

    Lines are joined, but for stacks of C++ and repeated ones, and of a long message the beginning
    and the end are kept: the cause often stands in the last line. The kind of error is added where
    the message alone says little (``KeyError: 'conv_in'``), and the error that it was raised from.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    lines = [line for line in lines if line and not _STACK.match(line)]
    text = " ".join(dict.fromkeys(lines))
    if not text or isinstance(error, LookupError):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    if error.__cause__ is not None and str(error.__cause__) not in text:
        text = f"{text.rstrip('.')} ({quoted(error.__cause__)})"
    if len(text) > 400:
        head, tail = text[:266], text[-130:]
        text = f"{head.rpartition(' ')[0] or head} … {tail.partition(' ')[2] or tail}"
    return text
