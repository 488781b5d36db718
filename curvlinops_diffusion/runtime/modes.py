"""Modes that the network runs in: uncompiled, without checkpoints, in differentiable forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Run ``scaled_dot_product_attention`` in its plain (math) form within the context.

    The fused forms have no forward-mode derivative ("Trying to use forward AD with
    _scaled_dot_product_flash_attention_for_cpu that does not support it") and no second one.
    The setting found is restored on leaving, also after an exception.
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run attention and some other functions in plain forms within the context.

    The backward formulas of ``silu``, ``mish`` and ``group_norm`` have no forward-mode derivative
    where gradients are switched off, as within ``curvlinops.HessianLinearOperator`` ("Trying to use
    forward AD with aten::silu_backward that does not support it").
    """
    with differentiable_attention(), _PlainFunctions():
        yield


def _silu(x: Tensor, inplace: bool = False) -> Tensor:
    return x * x.sigmoid()


def _mish(x: Tensor, inplace: bool = False) -> Tensor:
    return x * functional.softplus(x).tanh()


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    centred = x.reshape(len(x), num_groups, -1)
    centred = centred - centred.mean(2, keepdim=True)
    scale = (centred.square().mean(2, keepdim=True) + eps).rsqrt()
    normed = (centred * scale).reshape(x.shape)
    channels = (-1, *[1] * (x.ndim - 2))
    normed = normed if weight is None else normed * weight.reshape(channels)
    return normed if bias is None else normed + bias.reshape(channels)


class _PlainFunctions(TorchFunctionMode):
    """Replaces functions by compositions of elementary ones."""

    PLAIN: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
        functional.silu: _silu,
        functional.mish: _mish,
        functional.group_norm: _group_norm,
    }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self.PLAIN.get(func, func)(*args, **(kwargs or {}))


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
