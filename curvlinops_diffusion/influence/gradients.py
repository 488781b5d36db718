"""Per-example gradients of a measured quantity, as a linear operator ``[N, P]``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import CleanBatch
from curvlinops_diffusion.diffusion.regression import NoisedRegression, check_regression
from curvlinops_diffusion.influence.derivatives import (
    FunctionGradients,
    PredictionGradients,
    ValueGradients,
)
from curvlinops_diffusion.influence.measurements.base import ExampleFunction, measurement_of
from curvlinops_diffusion.linalg.parameters import Parameters, ParameterSpace, select_parameters
from curvlinops_diffusion.linalg.upstream import LinearOperator, input_shapes, output_shapes
from curvlinops_diffusion.runtime.checks import check_count, check_finite
from curvlinops_diffusion.runtime.passes import DrawsBar


class ExampleGradientLinearOperator(LinearOperator):
    r"""The Jacobian ``J`` of the examples' measured values in the parameters, ``[N, P]``.

    Row ``n`` is the gradient of the value of example ``n``, averaged over its draws; for the
    training loss::

        J_n = ∇ℓ_n(θ) = 1/R Σ_r ∇_θ w_t r_D ‖f_θ(x_t, t, c) − y_t‖²

    ``J @ V`` gives directional derivatives (forward mode, ``J`` is never formed),
    ``J.adjoint() @ W`` gradients of weighted sums of the values (reverse mode), and :meth:`rows`
    the gradients themselves.

    Args:
        regression: Objective, data and draws.
        params: ``None`` for every parameter of the model; or a list of the model's parameters (or
            their names, as in an operator's ``param_names``), or a dict from names to parameters.
        measurement: What is measured: ``'loss'`` or another name (``docs/how_to.rst`` lists
            them, from the registry), an
            :class:`~curvlinops_diffusion.measurements.ObjectiveMeasurement`, a function of (noised
            batch, prediction ``[B, D]``) that returns values ``[B]``, or an
            :class:`~curvlinops_diffusion.measurements.ExampleFunction` of (model, example, draws).
        progressbar: Whether to show progress.
        chunk_size: Columns of a matrix that are multiplied at once, which bounds the memory.

    Attributes:
        param_names: Names of the parameters, in order.
        regression: Objective, data and draws.
        measurement: What is measured.

    Raises:
        ValueError: If a parameter is not the model's, or the measurement is unknown.

    Examples:
        >>> J = ExampleGradientLinearOperator(query, measurement="simplified_elbo")
        >>> J.shape[0]
        2
        >>> difference, rows = J.adjoint() @ torch.tensor([1.0, -1.0]), J.rows()
        >>> bool((difference - (rows[0] - rows[1])).norm() < 1e-4 * difference.norm())
        True
    """

    def __init__(
        self,
        regression: NoisedRegression,
        params: Parameters = None,
        *,
        measurement: Any = "loss",
        progressbar: bool = False,
        chunk_size: int = 8,
    ):
        check_regression(regression)
        self.regression = regression
        self.measurement = measurement
        self._params = select_parameters(regression.objective.model, params)
        measured = measurement_of(measurement, regression.objective, regression.draws)
        check_count("chunk_size", chunk_size)
        self._gradients: ValueGradients = (
            FunctionGradients(regression, self._params, measured)
            if isinstance(measured, ExampleFunction)
            else PredictionGradients(regression, self._params, measured, chunk_size)
        )
        self._progressbar = progressbar
        self._space = ParameterSpace.of(self._params)
        shapes = list(self._space.shapes.values())
        super().__init__(shapes, [(regression.num_data,)], like=self._space, self_adjoint=False)

    @property
    def param_names(self) -> tuple[str, ...]:
        """Names of the parameters, in order."""
        return tuple(self._params)

    @property
    def parameter_sizes(self) -> list[int]:
        """The entries of each parameter, in order."""
        return self._space.sizes

    def on(self, regression: NoisedRegression) -> ExampleGradientLinearOperator:
        """Gradients of another problem with the same network, other draws say."""
        return ExampleGradientLinearOperator(
            regression, self.param_names, measurement=self.measurement
        )

    def measuring(self, measurement: Any) -> ExampleGradientLinearOperator:
        """Gradients of something else that is measured."""
        return ExampleGradientLinearOperator(
            self.regression, self.param_names, measurement=measurement
        )

    @torch.no_grad()
    def values(self) -> Tensor:
        """The measured values, averaged over draws, shape ``[N]``."""
        values_N = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        for clean in self._batches("values"):
            values_N[list(clean.indices)] = self.values_of(clean)
        return values_N

    @torch.no_grad()
    def values_of(self, clean: CleanBatch) -> Tensor:
        """The measured values of a batch of clean examples, shape ``[B]``."""
        return self._gradients.values(clean)

    def multiply_tensors(self, X: list[Tensor]) -> list[Tensor]:
        """Directional derivatives ``J @ X``: ``[*shape, K] -> [N, K]``."""
        directions = {
            name: x.to(p.dtype).movedim(-1, 0).contiguous()
            for (name, p), x in zip(self._params.items(), X, strict=True)
        }
        result_NK = X[0].new_zeros(self.shape[0], X[0].shape[-1], dtype=self.dtype)
        for clean in self._batches("J @ X"):
            result_NK[list(clean.indices)] = self._gradients.derivatives(clean, directions)
        return [result_NK]

    def transposed(self) -> LinearOperator:
        """``Jᵀ``: gradients of weighted sums of the values."""
        return _WeightedGradientLinearOperator(self)

    def weighted_gradient(self, weights_NK: Tensor) -> list[Tensor]:
        """Gradients of weighted sums of the values, ``Jᵀ W``: ``[N, K] -> [*shape, K]``."""
        K = weights_NK.shape[1]
        totals = [
            torch.zeros(*shape, K, dtype=self.dtype, device=self.device)
            for shape in self._space.shapes.values()
        ]
        for clean in self._batches("J.adjoint() @ W"):
            weights_BK = weights_NK[list(clean.indices)].to(self.dtype)
            gradients = self._gradients.weighted(clean, weights_BK)
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient
        return totals

    def row_batches(self) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Yield the rows in batches of the data: (indices ``n``, gradients ``[B, P]``).

        Raises:
            ValueError: If a gradient is not finite, naming the parameter.
        """
        for clean in self.regression.clean_batches():
            yield clean.indices, self.rows_of(clean)

    def rows(self, indices: Sequence[int] | None = None) -> Tensor:
        """Gradients of chosen examples; only these are computed.

        Args:
            indices: The examples' indices ``n``; ``None`` for all.

        Returns:
            The rows of ``J``, shape ``[len(indices), P]``.

        Raises:
            ValueError: If an index does not exist, or a gradient is not finite.
        """
        wanted = list(range(self.shape[0])) if indices is None else [int(n) for n in indices]
        asked_for = set(wanted)
        wrong = [n for n in wanted if not 0 <= n < self.shape[0]]
        if wrong:
            raise ValueError(
                f"Rows {wrong[:8]} do not exist. Pass indices from 0 to {self.shape[0] - 1}."
            )
        found: dict[int, Tensor] = {}
        for clean in self.regression.clean_batches():
            positions = [i for i, n in enumerate(clean.indices) if n in asked_for]
            if positions:
                part = clean.select(positions)
                found.update(zip(part.indices, self.rows_of(part), strict=True))
        return torch.stack([found[n] for n in wanted])

    def rows_of(self, clean: CleanBatch) -> Tensor:
        """Gradients of a batch of clean examples, ``[B, P]``.

        Raises:
            ValueError: If a gradient is not finite, naming the parameter and the examples.
        """
        rows_BP = self._gradients.rows(clean)
        # a sum is a fraction of the price of looking at every entry, and finite if they all are
        # (unless it overflows, in which case they are looked at)
        if not rows_BP.sum().isfinite():
            self._raise_not_finite(rows_BP, clean)
        return rows_BP

    def _batches(self, description: str) -> Iterator[CleanBatch]:
        with DrawsBar(self.regression.num_samples, description, self._progressbar) as bar:
            for clean in self.regression.clean_batches():
                yield clean
                bar.batch_done(len(clean.indices) * self.regression.num_draws)

    def _raise_not_finite(self, rows_BP: Tensor, clean: CleanBatch) -> None:
        for name, piece in zip(self._params, rows_BP.split(self.parameter_sizes, 1), strict=True):
            bad = [
                n for n, row in zip(clean.indices, piece, strict=True) if not row.isfinite().all()
            ]
            if bad:
                named = ", ".join(map(self.regression.name_of, bad[:8]))
                gradient = f"The gradient of '{name}' for examples [{named}]"
                reason = self._gradients.reason_of_infinity(clean)
                if reason:
                    raise ValueError(f"{gradient} is NaN or infinite, because {reason}")
                check_finite(piece, gradient)


class _WeightedGradientLinearOperator(LinearOperator):
    """``Jᵀ``, ``[P, N]``: gradients of weighted sums of the examples' measured values."""

    def __init__(self, jacobian: ExampleGradientLinearOperator):
        self._jacobian = jacobian
        shapes = output_shapes(jacobian), input_shapes(jacobian)
        super().__init__(*shapes, like=jacobian, self_adjoint=False)

    def multiply_tensors(self, X: list[Tensor]) -> list[Tensor]:
        """Gradients of weighted sums: ``[N, K] -> [*shape, K]``."""
        (weights_NK,) = X
        return self._jacobian.weighted_gradient(weights_NK)

    def transposed(self) -> LinearOperator:
        """``J``."""
        return self._jacobian
