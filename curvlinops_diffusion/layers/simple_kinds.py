"""Kinds of layers that tokens go through one by one: linear layers, embeddings and norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from curvlinops_diffusion.layers.kind import ExactKind, SharingKind
from curvlinops_diffusion.layers.moments import LatestProduct


class LinearKind(SharingKind):
    """``nn.Linear`` on inputs ``[N, ..., I]``."""

    def unsupported(self, module: nn.Module) -> str:
        """``nn.MultiheadAttention`` reads the weight of its output layer without calling it."""
        inside_attention = isinstance(module, NonDynamicallyQuantizableLinear)
        return "nn.MultiheadAttention reads its weight without calling it" * inside_attention

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """Tokens are positions."""
        return x.reshape(len(x), -1, x.shape[-1])

    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """Tokens are positions."""
        return g.reshape(len(g), -1, g.shape[-1])

    def rotated(self, module: nn.Module, g: Tensor, U: Tensor) -> Tensor:
        """The last axis rotated."""
        return g @ U

    def input_moment(
        self, module: nn.Module, x: Tensor, index: Tensor | None, latest: LatestProduct
    ) -> Tensor:
        """Layers that share an input share its product."""
        if index is None:
            return latest.of(x)
        return latest.of(x, lambda x: self.sampled_inputs(module, x, index))


class EmbeddingKind(SharingKind):
    """``nn.Embedding``: token ``k`` has the input ``e_k``; the padding token has none.

    ``A`` is diagonal, the tokens' frequencies, and is kept as the vector ``[I]``. That of
    ``kfac_approx='reduce'`` would not be diagonal for several tokens an example; ``'expand'``'s is
    taken in its place.
    """

    transposed = True
    joint = False
    one_hot = True

    def unsupported(self, module: Any) -> str:
        """Some options change the weight, or what its gradient means."""
        if module.max_norm is not None:
            return "an embedding with max_norm changes its weight in the forward pass"
        return "an embedding with scale_grad_by_freq" * module.scale_grad_by_freq

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """One token for each example, or several."""
        return x.ndim >= 1

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        """One-hot vectors; only for few tokens and small vocabularies."""
        tokens = x.reshape(len(x), -1)
        one_hot = functional.one_hot(tokens, module.num_embeddings).to(module.weight.dtype)
        return one_hot * _counts(module, tokens).unsqueeze(2)

    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """Tokens are positions."""
        return g.reshape(len(g), -1, g.shape[-1])

    def positions(self, module: nn.Module, x: Tensor) -> int:
        """The number of tokens."""
        return x[0].numel()

    def input_norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """One-hot vectors have norm one."""
        return torch.tensor(float(x.numel()), device=x.device).sqrt()

    def input_moment(
        self, module: Any, x: Tensor, index: Tensor | None, latest: LatestProduct
    ) -> Tensor:
        """Count each token: the diagonal of the second moment, in float64."""
        tokens = x.flatten()
        weights = _counts(module, tokens).double()
        counts = weights.new_zeros(module.num_embeddings)
        return counts.index_add_(0, tokens, weights)  # without synchronising a GPU

    def weight_gradients(self, module: Any, x: Tensor, g: Tensor, sums: int) -> Tensor:
        """Each token's gradients, added up."""
        tokens, rows = _sums_by_token(module, x, g, sums)
        result = rows.new_zeros(sums * module.num_embeddings, rows.shape[1])
        result[tokens] = rows
        return result.unflatten(0, (sums, -1)).mT

    def squares(
        self,
        module: Any,
        xs: Sequence[Tensor],
        gs: Sequence[Tensor],
        sums: int,
        U_A: Tensor | None,
        U_B: Tensor | None,
        extended: bool,
    ) -> Tensor:
        """Only the rows of tokens that occur are rotated."""
        assert not extended
        x = torch.cat([x.reshape(sums, -1) for x in xs], 1)
        g = torch.cat([g.reshape(sums, -1, g.shape[-1]) for g in gs], 1)
        tokens, rows = _sums_by_token(module, x, g, sums)
        rows = rows if U_B is None else rows @ U_B
        squares = rows.new_zeros(module.num_embeddings, rows.shape[1])
        return squares.index_add_(0, tokens % module.num_embeddings, rows.square()).T


def _sums_by_token(module: Any, x: Tensor, g: Tensor, sums: int) -> tuple[Tensor, Tensor]:
    """The tokens that occur in each sum, as ``sum V + token``, and their summed gradients."""
    tokens = x.reshape(sums, -1)
    flat = tokens + torch.arange(sums, device=x.device).unsqueeze(1) * module.num_embeddings
    found, position = flat.unique(return_inverse=True)
    g = g.reshape(sums, tokens.shape[1], -1) * _counts(module, tokens).to(g).unsqueeze(2)
    rows = g.new_zeros(len(found), g.shape[2])
    return found, rows.index_add_(0, position.flatten(), g.flatten(0, 1))


def _counts(module: Any, tokens: Tensor) -> Tensor:
    """Zero for the padding token, which has no gradient; one for the others."""
    if module.padding_idx is None:
        return torch.ones_like(tokens)
    return (tokens != module.padding_idx).to(tokens)


class NormKind(ExactKind):
    """An elementwise scale and shift ``γ x̂ + β``, with gradients ``Σ_s b_s x̂_s`` and ``Σ_s b_s``.

    Args:
        normalise: Maps module and input to ``x̂``, of the input's shape.
        of_channels: Whether ``γ`` and ``β`` belong to the second axis (channels) rather than to
            the last ones.
    """

    def __init__(self, normalise: Callable[[Any, Tensor], Tensor], of_channels: bool):
        self._normalise = normalise
        self._of_channels = of_channels

    def gradients(self, module: nn.Module, x: Tensor, g: Tensor, N: int) -> dict[str, Tensor]:
        """The gradients of scale and shift."""
        return {
            "weight": self._summed(module, g * self._normalise(module, x), N),
            "bias": self._summed(module, g, N),
        }

    def _summed(self, module: Any, z: Tensor, N: int) -> Tensor:
        if self._of_channels:
            return z.reshape(N, -1, *z.shape[1:]).transpose(1, 2).flatten(2).sum(2)
        return z.reshape(N, -1, *module.weight.shape).sum(1)


def _diffusers_rms_norm(norm: Any, x: Tensor) -> Tensor:
    # in float32 whatever the input, as the module itself
    return x * (x.float().square().mean(-1, keepdim=True) + norm.eps).rsqrt()


GROUP_NORM = NormKind(
    lambda norm, x: functional.group_norm(x, norm.num_groups, eps=norm.eps), of_channels=True
)
LAYER_NORM = NormKind(
    lambda norm, x: functional.layer_norm(x, norm.normalized_shape, eps=norm.eps),
    of_channels=False,
)
RMS_NORM = NormKind(
    lambda norm, x: functional.rms_norm(x, norm.normalized_shape, eps=norm.eps), of_channels=False
)
DIFFUSERS_RMS_NORM = NormKind(_diffusers_rms_norm, of_channels=False)
BATCH_NORM = NormKind(
    lambda norm, x: functional.batch_norm(x, norm.running_mean, norm.running_var, eps=norm.eps),
    of_channels=True,
)
INSTANCE_NORM = NormKind(
    lambda norm, x: functional.instance_norm(x, eps=norm.eps), of_channels=True
)
