"""How the network runs: without compilation, and without checkpoints where these are not known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped; another module as it is.

    Both hold the same parameters. Hooks cut a compiled graph at every layer, which is compiled
    anew for each, and slower than none (docs/performance.rst).
    """
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def eager() -> AbstractContextManager[Any]:
    """Run modules that were compiled in place (``module.compile()``) as if they were not."""
    set_stance: Any = getattr(torch.compiler, "set_stance", None)  # from torch 2.6 on
    return nullcontext() if set_stance is None else set_stance("force_eager")


@contextmanager
def without_checkpoints(model: nn.Module) -> Iterator[None]:
    """Switch gradient checkpointing off, for forward-mode and vectorised derivatives."""
    switched = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    try:
        for module in switched:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True  # type: ignore[assignment]
