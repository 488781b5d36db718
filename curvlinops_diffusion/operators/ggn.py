"""The exact generalised Gauss-Newton matrix of a diffusion model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap
from tqdm import tqdm

from curvlinops_diffusion._checks import check_count
from curvlinops_diffusion.differentiation import differentiable_attention
from curvlinops_diffusion.objective import NoisedBatch
from curvlinops_diffusion.operators.base import ParameterSpaceOperator
from curvlinops_diffusion.parameters import Parameters, ParameterSpace, select_parameters
from curvlinops_diffusion.regression import NoisedRegression


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
    """

    def __init__(
        self,
        regression: NoisedRegression,
        params: Parameters = None,
        *,
        progressbar: bool = False,
        chunk_size: int = 8,
    ):
        self._regression = regression
        self._params = select_parameters(regression.objective.model, params)
        self._progressbar = progressbar
        self._chunk_size = check_count("chunk_size", chunk_size)
        super().__init__(ParameterSpace.of(self._params))

    @torch.no_grad()
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        """Multiply onto matrices in tensor list format ``[*shape, K]``."""
        product = [torch.zeros_like(x, dtype=self.dtype) for x in X]
        with (
            differentiable_attention(),
            tqdm(
                total=self._regression.num_samples, unit="draws", disable=not self._progressbar
            ) as bar,
        ):
            for batch in self._regression.batches():
                for total, new in zip(product, self._batch_product(batch, X), strict=True):
                    total += new
                bar.update(len(batch.indices))
        return [total / self._regression.num_samples for total in product]

    def _batch_product(self, batch: NoisedBatch, X: list[Tensor]) -> list[Tensor]:
        """``Σ_b J_bᵀ (2 w r J_b X)`` over the batch."""
        names = list(self._params)
        values = tuple(p.detach() for p in self._params.values())

        def predict(*params: Tensor) -> Tensor:
            predicted: Tensor = self._regression.objective.predict(
                batch, dict(zip(names, params, strict=True))
            )
            return predicted

        def push(*tangents: Tensor) -> Tensor:
            return batch.loss_hessian_product(jvp(predict, values, tangents)[1])

        tangents = tuple(x.to(v.dtype) for x, v in zip(X, values, strict=True))
        curved = vmap(push, in_dims=-1, out_dims=-1, chunk_size=self._chunk_size)(*tangents)
        pull = vjp(predict, *values)[1]
        pulled = vmap(pull, in_dims=-1, out_dims=-1, chunk_size=self._chunk_size)(curved)
        return [p.to(self.dtype) for p in pulled]
