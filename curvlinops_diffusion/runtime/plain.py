"""Tensors of users' data as plain ones, without graphs, their numbers one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

# labels are looked up by these
_SHORT_LABELS = (torch.uint8, torch.int8, torch.int16)


def plain(value: Any, what: str) -> Any:
    """A value of the data as the network's passes take it, with the same numbers.

    Tensors lose their graph and the marks of inference mode, arrays become tensors; mappings are
    walked through, other values are as they were (a list of numbers too: the network may want it).

    Args:
        value: A tensor, array or mapping of these, or anything else.
        what: Its name in messages.

    Raises:
        ValueError: If it is a tensor without values, or stored in another form than numbers one
            after the other.
    """
    if isinstance(value, Tensor):
        return plain_tensor(value, what)
    if isinstance(value, Mapping):
        return {key: plain(each, f"{what}[{key!r}]") for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return _of_array(value, what)
    return value


def plain_labels(value: Any) -> Any:
    """Labels of few bits or in a list, as data sets hold them, in what tables are looked up by."""
    if isinstance(value, list) and value and all(isinstance(z, Number) for z in value):
        return torch.as_tensor(value)
    short = isinstance(value, Tensor) and value.dtype in _SHORT_LABELS
    return value.long() if short else value


def _of_array(array: np.ndarray, what: str) -> Tensor:
    try:
        # a copy: the array may be read-only, reversed, or in another byte order
        own = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        return torch.from_numpy(own)
    except TypeError as error:
        raise ValueError(
            f"{what} is an array of {array.dtype}, of which there are no tensors. Pass numbers, or "
            "a list of texts."
        ) from error


def plain_tensor(tensor: Tensor, what: str) -> Tensor:
    """A tensor as :func:`plain` makes it.

    Raises:
        ValueError: As there.
    """
    reason = _unusual(tensor)
    if reason is not None:
        raise ValueError(f"{what} {reason}.")
    # Parameters, images of torchvision; not those whose operations are their own (DTensor)
    usual = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    if type(tensor) is not Tensor and usual:
        tensor = tensor.as_subclass(Tensor)
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.clone() if tensor.is_inference() else tensor


def _unusual(tensor: Tensor) -> str | None:
    """What keeps a tensor from being used as it is, and what to do."""
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
