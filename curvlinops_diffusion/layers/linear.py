"""Linear layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from curvlinops_diffusion.layers.kind import SharingKind
from curvlinops_diffusion.layers.moments import LatestProduct, Moment, SummedMoment


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
        """The same for the output."""
        return g.reshape(len(g), -1, g.shape[-1])

    def rotated(self, module: nn.Module, g: Tensor, U: Tensor) -> Tensor:
        """The last axis rotated."""
        return g @ U

    def input_moment(self, module: nn.Module, latest: LatestProduct) -> Moment:
        """Layers that share an input share its product."""
        return SummedMoment(latest.of)

    def sampled_input_moment(
        self, module: nn.Module, x: Tensor, index: Tensor, latest: LatestProduct
    ) -> Tensor:
        """The same for some of its positions."""
        return latest.of(x, lambda x: self.sampled_inputs(module, x, index))
