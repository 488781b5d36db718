"""Modes that the network runs in: unwrapped, without checkpoints, in differentiable forms."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from curvlinops_diffusion.runtime.checks import quoted


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Run ``nn.TransformerEncoder`` and ``nn.MultiheadAttention`` as when they are differentiated.

    Where nothing is differentiated, nor a mode of functions is on, they take a fast path in eval
    mode, which rounds otherwise and gives zeros for padded tokens: another function than the one
    whose derivatives are taken.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Run ``scaled_dot_product_attention`` in its plain (math) form within the context.

    The fused forms have no forward-mode derivative ("Trying to use forward AD with
    _scaled_dot_product_flash_attention_for_cpu that does not support it") and no second one, nor
    has the fast path of ``nn.MultiheadAttention`` in eval mode. The settings found are restored on
    leaving, also after an exception.
    """
    with without_fast_path(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def forward_mode() -> Iterator[None]:
    """Have forward mode differentiate what reverse mode does, and nothing else.

    By itself it goes through ``torch.no_grad()`` (a first pass for self-conditioning, say) and
    through the row of an embedding's ``padding_idx``, which reverse mode leaves out. The values
    that derivatives are taken at must not require gradients.

    Raises:
        ValueError: If PyTorch has no forward-mode derivative of a function of the network.
    """
    try:
        # what switches gradients off and on again must find them on
        with differentiable_attention(), torch.enable_grad(), _ForwardMode():
            yield
    except NotImplementedError as error:
        found = re.search(r"forward AD with (\S+)", str(error))
        if found is None:
            raise
        raise ValueError(
            f"The network uses '{found[1]}', of which PyTorch has no forward-mode derivative; "
            "products with an exact GGN and J @ v need one. Write it by elementary functions, or "
            "take K-FAC, EK-FAC, rows() or J.adjoint(), which do without."
        ) from error
    except RuntimeError as error:
        if "mutate a captured Tensor" not in str(error):
            raise
        raise ValueError(
            "The network writes into one of its buffers while it runs (a counter or a table, say), "
            "which products with an exact GGN and J @ v cannot differentiate. Assign a new tensor "
            "instead (self.count = self.count + 1), or take K-FAC, EK-FAC, rows() or J.adjoint(), "
            f"which do without. (torch says: {str(error).splitlines()[0][:200]})"
        ) from error


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run attention and some other functions in plain forms within the context.

    The backward formulas of ``silu``, ``mish`` and ``group_norm`` have no forward-mode derivative
    where gradients are switched off, as within ``curvlinops.HessianLinearOperator`` ("Trying to use
    forward AD with aten::silu_backward that does not support it").
    """
    with differentiable_attention(), _PlainFunctions():
        yield


def _activation(plain: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Write a function's value where the function would write it: others may read it there."""

    def activation(x: Tensor, inplace: bool = False) -> Tensor:
        # backward passes need what the value is made of
        return x.copy_(plain(x.clone())) if inplace else plain(x)

    return activation


def _embedding(
    tokens: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    if padding_idx is not None:
        rows = torch.arange(len(weight), device=weight.device).unsqueeze(1)
        padding = rows == padding_idx % len(weight)
        weight = torch.where(padding, weight.detach(), weight)
    return functional.embedding(tokens, weight, None, *args, **kwargs)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = [d for d in range(v.ndim) if d != dim]  # all of them for -1
    return v * (g / v.square().sum(others, keepdim=dim >= 0).sqrt())


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


class _ForwardMode(TorchFunctionMode):
    """Replaces functions by others, and stops forward mode where gradients are switched off."""

    PLAIN: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
        functional.embedding: _embedding,
        torch._weight_norm: _weight_norm,
        # on CUDA its forward-mode derivative refuses tensors that are not contiguous
        functional.group_norm: _group_norm,
    }

    def __init__(self) -> None:
        super().__init__()
        # or it could not be told when they are on again
        self._follows = torch.is_grad_enabled()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = self.PLAIN.get(func, func)(*args, **(kwargs or {}))
        if self._follows and func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(torch.is_grad_enabled())
        return result


class _PlainFunctions(_ForwardMode):
    """Replaces functions by compositions of elementary ones."""

    PLAIN: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
        **_ForwardMode.PLAIN,
        functional.silu: _activation(lambda z: z * z.sigmoid()),
        functional.mish: _activation(lambda z: z * functional.softplus(z).tanh()),
    }


@contextmanager
def derivative_gradients(tables: Sequence[nn.Module]) -> Iterator[None]:
    """Have the backward passes of tables of embeddings give dense derivatives within the context.

    Training may have wanted gradients that are sparse, or are divided by how often a token occurs
    in the batch, which are none of a loss.
    """
    with switched(tables, "sparse", False), switched(tables, "scale_grad_by_freq", False):
        yield


@contextmanager
def switched(owners: Sequence[Any], attribute: str, value: Any) -> Iterator[None]:
    """Set an attribute of several objects within the context."""
    before = [getattr(owner, attribute) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, attribute, value)
        yield
    finally:
        for owner, former in zip(owners, before, strict=True):
            setattr(owner, attribute, former)


def special_tables(model: nn.Module) -> list[nn.Module]:
    """List the tables of embeddings whose backward pass gives other than dense derivatives."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    return [m for m in tables if m.sparse or m.scale_grad_by_freq]


def modules_of(model: nn.Module) -> list[nn.Module]:
    """List all modules, each once, the model first; ten times as fast as ``model.modules()``."""
    found, seen = [model], {model}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """Unwrap a module of ``torch.compile``, data parallelism, weight averaging or PEFT.

    Both hold the same parameters. Hooks cut a compiled graph at every layer, which is compiled
    anew for each, and slower than none (docs/performance.rst); wrappers of data parallelism divide
    batches, and like a ``PeftModel`` prefix the parameters' names.
    """
    while True:
        parallel = isinstance(
            model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel
        )
        inner = model.module if parallel else getattr(model, "_orig_mod", model)
        # a PeftModel whose adapters are within the network's own layers (LoRA and its kind)
        adapted: Any = getattr(model, "base_model", None)
        if hasattr(adapted, "tuner_layer_cls") or hasattr(adapted, "inject_adapter"):
            inner = getattr(adapted, "model", inner)
        assert isinstance(inner, nn.Module)
        if inner is model:
            return model
        model = inner


def replaced_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Repeat values of parameters for every place that holds the parameter.

    For ``functional_call(..., tie_weights=False)``, each place once: by itself it would replace
    those of a module under two names twice, and put the value back in place of the parameter.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    result = {}
    for prefix, module in model.named_modules():
        for key, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if names[id(p)] in values:
                result[f"{prefix}.{key}" if prefix else key] = values[names[id(p)]]
    return result


def eager() -> AbstractContextManager[Any]:
    """Run modules that were compiled in place (``module.compile()``) as if they were not."""
    return torch.compiler.set_stance("force_eager")


# parts of torch's messages where a network recomputes in its backward pass as it cannot follow
_RECOMPUTED = (
    "use_reentrant",
    "setup_context",
    "saved tensor hooks",
    "differentiated Tensors does",
    "does not have vmap support",  # torch 2.7
)


@contextmanager
def recomputation_named() -> Iterator[None]:
    """Translate errors of a network whose gradient checkpoints do not allow these derivatives.

    Raises:
        ValueError: In place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(part in str(error) for part in _RECOMPUTED):
            raise
        raise ValueError(
            "A part of the network is recomputed in the backward pass in a way that these "
            "derivatives cannot follow: gradient checkpoints (torch.utils.checkpoint), an "
            "autograd function that computes gradients by itself, or a module's backward hook. "
            "Switch the network's gradient checkpoints off; factors and gradients of examples go "
            f"through those of use_reentrant=False as well. (torch says: {quoted(error)})"
        ) from error


@contextmanager
def without_checkpoints(model: nn.Module) -> Iterator[None]:
    """Switch gradient checkpointing off, for forward-mode and vectorised derivatives."""
    on = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    with switched(on, "gradient_checkpointing", False):
        yield
