"""Precision of products of float32 numbers, which PyTorch's defaults or users may have lowered.

On a GPU, convolutions round their operands to TF32 (10 bits in place of 23) unless one says
otherwise; matrix products do if one asks for it. Sums over batches of another size, or with other
derivatives beside them, are then computed by other kernels, and differ by that rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from curvlinops_diffusion.runtime.modes import switched

Result = TypeVar("Result")


def products_are_rounded(device: torch.device) -> bool:
    """Tell whether products of float32 numbers may be computed from fewer bits on a device."""
    if _has_own_settings():
        owners = _settings()[device.type == "cpu"]
        return any(owner.fp32_precision not in ("none", "ieee") for owner in owners)
    if device.type == "cpu":
        return torch.get_float32_matmul_precision() == "medium"
    return bool(torch.backends.cudnn.allow_tf32) or torch.backends.cuda.matmul.allow_tf32


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute products of float32 numbers from all of their bits within the context."""
    if _has_own_settings():
        owners = [owner for owners in _settings() for owner in owners]
        with switched(owners, "fp32_precision", "ieee"):
            yield
        return
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        with switched([torch.backends.cudnn], "allow_tf32", False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def matmuls_in_tf32() -> Iterator[None]:
    """Round the operands of matrix products on a GPU to TF32 within the context.

    The network's convolutions keep their own setting.
    """
    name, value = ("fp32_precision", "tf32") if _has_own_settings() else ("allow_tf32", True)
    with switched([torch.backends.cuda.matmul], name, value):
        yield


@contextmanager
def without_autocast(device_type: str) -> Iterator[None]:
    """Compute on a kind of device in the operands' own precision within the context.

    As ``torch.autocast(device_type, enabled=False)``, which takes as long as the work of a small
    layer does.
    """
    before = torch.is_autocast_enabled(device_type)
    torch.set_autocast_enabled(device_type, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, before)


def settled(check: Callable[[], Result], device: torch.device) -> Result:
    """Run a check again in full precision if reduced precision may have caused its finding.

    Args:
        check: Runs the network, and returns what it has found, or raises a ``ValueError``.
        device: The network's.
    """
    try:
        found = check()
        if not found or not products_are_rounded(device):
            return found
    except ValueError:
        if not products_are_rounded(device):
            raise
    with full_precision():
        return check()


def _has_own_settings() -> bool:
    """Tell whether each kind of product has a setting of its own: from torch 2.9 on."""
    return hasattr(torch.backends.cuda.matmul, "fp32_precision")


def _settings() -> tuple[list[Any], list[Any]]:
    """List what holds the settings of products on GPUs, and on CPUs."""
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return (
        [cudnn.conv, cudnn.rnn, backends.cuda.matmul],
        [mkldnn.matmul, mkldnn.conv, mkldnn.rnn],
    )
