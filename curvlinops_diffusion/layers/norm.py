"""Norms: an elementwise scale and shift of what they normalise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from curvlinops_diffusion.layers.kind import ExactKind


class NormKind(ExactKind):
    """A layer ``γ x̂ + β``, with gradients ``Σ_s b_s x̂_s`` and ``Σ_s b_s``.

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


def _group_norm(module: Any, x: Tensor) -> Tensor:
    return functional.group_norm(x, module.num_groups, None, None, module.eps)


def _layer_norm(module: Any, x: Tensor) -> Tensor:
    return functional.layer_norm(x, module.normalized_shape, None, None, module.eps)


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    return functional.rms_norm(x, module.normalized_shape, None, module.eps)


def _diffusers_rms_norm(module: Any, x: Tensor) -> Tensor:
    # in float32 whatever the input, as the module itself
    return x * (x.float().square().mean(-1, keepdim=True) + module.eps).rsqrt()


def _batch_norm(module: Any, x: Tensor) -> Tensor:
    return functional.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)


def _instance_norm(module: Any, x: Tensor) -> Tensor:
    return functional.instance_norm(x, eps=module.eps)


GROUP_NORM = NormKind(_group_norm, of_channels=True)
LAYER_NORM = NormKind(_layer_norm, of_channels=False)
RMS_NORM = NormKind(_rms_norm, of_channels=False)
DIFFUSERS_RMS_NORM = NormKind(_diffusers_rms_norm, of_channels=False)
BATCH_NORM = NormKind(_batch_norm, of_channels=True)
INSTANCE_NORM = NormKind(_instance_norm, of_channels=True)
