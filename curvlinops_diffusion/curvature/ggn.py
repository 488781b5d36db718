"""The exact generalised Gauss-Newton matrix of a diffusion model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.regression import NoisedRegression, check_regression
from curvlinops_diffusion.layers.probe import Retrial, check_effect, check_network
from curvlinops_diffusion.linalg.operator import ParameterSpaceOperator
from curvlinops_diffusion.linalg.parameters import Parameters, ParameterSpace, select_parameters
from curvlinops_diffusion.runtime.checks import check_count
from curvlinops_diffusion.runtime.modes import (
    differentiable_attention,
    forward_mode,
    recomputation_named,
)
from curvlinops_diffusion.runtime.passes import DrawsBar
from curvlinops_diffusion.runtime.sharded_networks import check_whole_parameters


class DiffusionGGNLinearOperator(ParameterSpaceOperator):
    r"""Exact products with the GGN of a diffusion model ("GGN^model").

    The network is linearised and the loss' curvature kept::

        G = 1/N Σ_n 1/R Σ_r 2 w_t r_D · J_θᵀ J_θ,    J_θ = ∂f_θ(x_t, t, c)/∂θ

    with ``r_D = 1/D`` (``reduction="mean"``) or ``1`` (``"sum"``). A product costs one
    forward-mode and one reverse-mode pass for each draw and column. Works on networks with fused
    attention, and leaves the model as it was.

    Source: Mlodozeniec et al., 2025, Section 2.3 and Appendix C.

    Args:
        regression: Objective, data and draws.
        params: ``None`` for every parameter of the model; or a list of the model's parameters (or
            their names), or a dict from names to parameters.
        progressbar: Whether to show progress.
        chunk_size: Columns of a matrix that are multiplied at once, which bounds the memory.

    Attributes:
        param_names: Names of the parameters, in order.

    Raises:
        ValueError: If a parameter is not the model's.

    Examples:
        >>> G = DiffusionGGNLinearOperator(train)
        >>> P = sum(p.numel() for p in unet.parameters())
        >>> G.shape == (P, P)
        True
        >>> v = torch.randn(P)
        >>> bool(v @ (G @ v) > 0)  # E[2 w_t r ‖J v‖²]
        True
    """

    def __init__(
        self,
        regression: NoisedRegression,
        params: Parameters = None,
        *,
        progressbar: bool = False,
        chunk_size: int = 8,
    ):
        check_regression(regression)
        check_whole_parameters(
            regression.objective.model,
            "A product with the exact GGN",
            "Pass the whole network to each process, or take K-FAC or EK-FAC.",
        )
        self._regression = regression
        self._params = select_parameters(regression.objective.model, params)
        self._progressbar = progressbar
        self._retried = Retrial(regression)
        self._chunk_size = check_count("chunk_size", chunk_size)
        super().__init__(ParameterSpace.of(self._params))

    @torch.no_grad()
    def multiply_tensors(self, X: list[Tensor]) -> list[Tensor]:
        """Multiply onto matrices in tensor list format ``[*shape, K]``."""
        check_network(self._regression)
        check_effect(self._regression, self._params)
        # columns first: derivatives in contiguous directions are a third faster
        columns = [x.movedim(-1, 0).contiguous() for x in X]
        product = [torch.zeros_like(x, dtype=self.dtype) for x in columns]
        with (
            recomputation_named(),
            differentiable_attention(),
            DrawsBar(self._regression.num_samples, "G @ X", self._progressbar) as bar,
        ):
            for clean in self._regression.clean_batches():
                self._retried(clean)
                for batch in self._regression.noised_batches(clean):
                    self._add_batch_product(product, batch, columns)
                bar.batch_done(len(clean.indices) * self._regression.num_draws)
        return [total.movedim(0, -1) / self._regression.num_samples for total in product]

    def _add_batch_product(
        self, product: list[Tensor], batch: NoisedBatch, columns: list[Tensor]
    ) -> None:
        """Add ``Σ_b J_bᵀ (2 w r J_b X)`` over the batch, all with the columns' axis first."""
        names = list(self._params)
        values = tuple(p.detach() for p in self._params.values())

        def predict(*params: Tensor) -> Tensor:
            predicted: Tensor = self._regression.objective.predict(
                batch, dict(zip(names, params, strict=True))
            )
            return predicted

        def push(*tangents: Tensor) -> Tensor:
            return batch.loss_hessian_product(jvp(predict, values, tangents)[1])

        tangents = tuple(x.to(v.dtype) for x, v in zip(columns, values, strict=True))
        with forward_mode():
            curved = vmap(push, chunk_size=self._chunk_size, randomness="same")(*tangents)
        # one linearisation for all columns; pulling them back one by one is faster than at once
        pull = vjp(predict, *values)[1]
        for k, v_BD in enumerate(curved):
            for total, gradient in zip(product, pull(v_BD), strict=True):
                total[k] += gradient
