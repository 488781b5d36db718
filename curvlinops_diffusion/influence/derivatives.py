"""The measured values of a batch of examples, and their derivatives in the parameters.

Legend: B examples, D entries of a prediction, P parameters, K columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from curvlinops_diffusion.diffusion.batch import CleanBatch, NoisedBatch
from curvlinops_diffusion.diffusion.checks import check_modes
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.measurements.base import (
    ExampleFunction,
    Measurement,
    measure,
    measurement_gradient,
)
from curvlinops_diffusion.layers import Coverage, cover
from curvlinops_diffusion.layers.mapped_gradients import example_gradients
from curvlinops_diffusion.layers.observation import frozen
from curvlinops_diffusion.layers.probe import (
    Retrial,
    check_adapters,
    check_effect,
    check_network,
    probed,
    zeros_of,
)
from curvlinops_diffusion.runtime.modes import (
    forward_mode,
    recomputation_named,
    twice_differentiable,
)
from curvlinops_diffusion.runtime.sharded_networks import check_whole_parameters, is_sharded


class ValueGradients(ABC):
    """Values of examples, and their derivatives."""

    def __init__(self, regression: NoisedRegression, params: dict[str, nn.Parameter]):
        self.regression = regression
        self.params = params

    @abstractmethod
    def values(self, clean: CleanBatch) -> Tensor:
        """The values, shape ``[B]``."""

    @abstractmethod
    def rows(self, clean: CleanBatch) -> Tensor:
        """The gradients, shape ``[B, P]``."""

    def reason_of_infinity(self, clean: CleanBatch) -> str:
        """Say what in the measurement makes gradients of a batch NaN or infinite, if it is that."""
        return ""

    def derivatives(self, clean: CleanBatch, directions: Mapping[str, Tensor]) -> Tensor:
        """Derivatives in the directions ``[K, *shape]``, shape ``[B, K]``; from the gradients."""
        columns = torch.cat([directions[name].flatten(1) for name in self.params], 1)
        rows_BP = self.rows(clean)
        return rows_BP @ columns.T.to(rows_BP)

    def weighted(self, clean: CleanBatch, weights_BK: Tensor) -> list[Tensor]:
        """Gradients of weighted sums of the values, ``[*shape, K]`` each; from the gradients."""
        rows_BP, params = self.rows(clean), list(self.params.values())
        pieces = (rows_BP.T @ weights_BK.to(rows_BP)).split([p.numel() for p in params])
        K = weights_BK.shape[1]
        return [z.reshape(*p.shape, K) for z, p in zip(pieces, params, strict=True)]


class PredictionGradients(ValueGradients):
    """Averages over draws of a function of the prediction."""

    def __init__(
        self,
        regression: NoisedRegression,
        params: dict[str, nn.Parameter],
        measurement: Measurement,
        chunk_size: int,
    ):
        super().__init__(regression, params)
        self._measurement = measurement
        self._chunk_size = chunk_size
        self._coverage: Coverage | None = None
        self._retried = Retrial(regression)

    @torch.no_grad()
    def values(self, clean: CleanBatch) -> Tensor:
        """The values, shape ``[B]``."""
        self._check(clean)
        predict = self.regression.objective.predict
        draws = self.regression.noised_batches(clean)
        return self._average([measure(self._measurement, b, predict(b)) for b in draws])

    @torch.no_grad()
    def rows(self, clean: CleanBatch) -> Tensor:
        """The gradients, shape ``[B, P]``."""
        self._check(clean)
        objective = self.regression.objective
        P = sum(p.numel() for p in self.params.values())
        B, R = len(clean.indices), self.regression.num_draws
        rows_BP = torch.empty(B, P, device=objective.device, dtype=objective.working_dtype)
        grouping = cheapest_grouping(B, R, max(B, self.regression.batch_size or 0))
        for positions, batch in self.regression.grouped_batches(clean, *grouping):
            gradients = self._gradients(batch, len(positions))
            own = [
                gradients.pop(name).reshape(len(positions), p.numel())
                for name, p in self.params.items()
            ]
            parts = rows_BP[positions.start : positions.stop].split([g.shape[1] for g in own], 1)
            # all parameters at once, which a GPU does fast for vectors
            pair = [part.squeeze(0) for part in parts], [g.squeeze(0) for g in own]
            if batch.draw_numbers[0] == 0:  # the examples' first draws
                torch._foreach_copy_(*pair)
            else:
                torch._foreach_add_(*pair)
        return rows_BP

    @torch.no_grad()
    def reason_of_infinity(self, clean: CleanBatch) -> str:
        """Say where the measurement's gradient is not finite though the prediction is."""
        if self.regression.in_step:  # others would not run the network
            return ""
        for batch in self.regression.noised_batches(clean):
            prediction_BD = self.regression.objective.predict(batch)
            pulled_BD = measurement_gradient(self._measurement, batch, prediction_BD)
            bad_B = prediction_BD.isfinite().all(1) & ~pulled_BD.isfinite().all(1)
            for b in bad_B.nonzero().flatten().tolist():
                return (
                    "that of the measurement in the prediction is, where the prediction is finite "
                    f"(example {self.regression.name_of(batch.indices[b])}, noise level "
                    f"{int(batch.level_B[b])}). Change the measurement there: a factor of zero "
                    "does not remove what is infinite, torch.where on its argument does."
                )
        return ""

    def _gradients(self, batch: NoisedBatch, examples: int) -> dict[str, Tensor]:
        """Gradients of each example, summed over the draws in the batch, by parameter.

        Draws of one example need no gradients apart: the sum is what a training pass computes.
        Parameters of known layers otherwise get theirs from what the layers see, the others by
        differentiating example by example.
        """
        objective = self.regression.objective
        full_precision = objective.autocast is None and objective.dtype == objective.working_dtype
        if examples > 1 or not full_precision or is_sharded(objective.model):
            loss_vector = partial(self._averaged_gradient, batch)
            if self._coverage is None:
                coverage = cover(objective.model, self.params)
                self._coverage = probed(self.regression, coverage)
                self._retried = Retrial(self.regression, self._coverage.layers)
            check_effect(self.regression, self.params)  # adapters may have been switched since
            return example_gradients(self._coverage, objective, batch, loss_vector, examples)
        params = list(self.params.values())
        with _differentiated(self.regression, params), torch.enable_grad():
            prediction_BD = objective.predict(batch)
            v_BD = self._averaged_gradient(batch, prediction_BD)
            own = _pulled_back(prediction_BD, params, v_BD)
        gradients = dict(zip(self.params, own, strict=True))
        check_effect(self.regression, self.params, lambda: zeros_of(gradients))
        return {
            name: torch.zeros_like(self.params[name]) if gradient is None else gradient
            for name, gradient in gradients.items()
        }

    def _averaged_gradient(self, batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
        """The vector to pull back for a mean over draws: cheaper to divide than gradients."""
        pulled_BD = measurement_gradient(self._measurement, batch, prediction_BD)
        return pulled_BD / self.regression.num_draws

    @torch.no_grad()
    def derivatives(self, clean: CleanBatch, directions: Mapping[str, Tensor]) -> Tensor:
        """Derivatives in forward mode, ``[B, K]``; of a sharded network from the gradients."""
        if is_sharded(self.regression.objective.model):
            return super().derivatives(clean, directions)
        self._check(clean)
        check_effect(self.regression, self.params)
        params = {name: p.detach() for name, p in self.params.items()}

        def value(batch: NoisedBatch, params: Mapping[str, Tensor]) -> Tensor:
            prediction_BD = self.regression.objective.predict(batch, params)
            return measure(self._measurement, batch, prediction_BD)

        def push(batch: NoisedBatch, tangents: dict[str, Tensor]) -> Tensor:
            derivative: Tensor = jvp(partial(value, batch), (params,), (tangents,))[1]
            return derivative

        options: dict[str, Any] = {"chunk_size": self._chunk_size, "randomness": "same"}
        with recomputation_named(), forward_mode():
            batches = self.regression.noised_batches(clean)
            return self._average(
                [vmap(partial(push, batch), **options)(dict(directions)).T for batch in batches]
            )

    def weighted(self, clean: CleanBatch, weights_BK: Tensor) -> list[Tensor]:
        """Gradients of weighted sums, a backward pass each; of a sharded network from the rows."""
        if is_sharded(self.regression.objective.model):
            return super().weighted(clean, weights_BK)
        self._check(clean)
        check_effect(self.regression, self.params)
        params, K = list(self.params.values()), weights_BK.shape[1]
        totals = [p.new_zeros(*p.shape, K, dtype=weights_BK.dtype).detach() for p in params]
        with _differentiated(self.regression, params), torch.enable_grad():
            for batch in self.regression.noised_batches(clean):
                prediction_BD = self.regression.objective.predict(batch)
                pulled_BD = self._averaged_gradient(batch, prediction_BD)
                for k in range(K):
                    w_B1 = weights_BK[:, k].to(pulled_BD).unsqueeze(1)
                    gradients = _pulled_back(
                        prediction_BD, params, w_B1 * pulled_BD, retain_graph=k < K - 1
                    )
                    for total, gradient in zip(totals, gradients, strict=True):
                        if gradient is not None:
                            total[..., k] += gradient
        return totals

    def _average(self, draws: list[Tensor]) -> Tensor:
        """The mean over draws, summed in their order."""
        total = draws[0].to(self.regression.objective.working_dtype)
        for draw in draws[1:]:
            total = total + draw
        return total / self.regression.num_draws

    def _check(self, clean: CleanBatch) -> None:
        check_network(self.regression)
        self._retried(clean)


class FunctionGradients(ValueGradients):
    """Any function of the model and an example; not all can be differentiated in forward mode."""

    def __init__(
        self,
        regression: NoisedRegression,
        params: dict[str, nn.Parameter],
        measured: ExampleFunction,
    ):
        super().__init__(regression, params)
        check_whole_parameters(
            regression.objective.model,
            f"{type(measured).__name__}, a function of the network at a single example,",
            "Pass the whole network to each process, or measure a function of its predictions.",
        )
        self._measured = measured

    @torch.no_grad()
    def values(self, clean: CleanBatch) -> Tensor:
        """The values, shape ``[B]``."""
        with frozen(self.regression.objective.model), twice_differentiable():
            singles = map(clean.select, ([b] for b in range(len(clean.indices))))
            return torch.stack([self._measured.value(self.regression, s) for s in singles])

    def rows(self, clean: CleanBatch) -> Tensor:
        """The gradients, shape ``[B, P]``."""
        check_adapters(self.regression, self.params)
        params = list(self.params.values())
        with _differentiated(self.regression, params), twice_differentiable():
            singles = map(clean.select, ([b] for b in range(len(clean.indices))))
            return torch.stack(
                [self._measured.gradient(self.regression, s, params) for s in singles]
            )


def _pulled_back(
    prediction_BD: Tensor, params: list[nn.Parameter], v_BD: Tensor, retain_graph: bool = False
) -> Sequence[Tensor | None]:
    """The gradients of ``vᵀ f``; ``None`` for parameters that ``f`` does not depend on."""
    if not prediction_BD.requires_grad:  # on none of them
        return [None] * len(params)
    return torch.autograd.grad(
        prediction_BD, params, v_BD, retain_graph=retain_graph, allow_unused=True
    )


@contextmanager
def _differentiated(regression: NoisedRegression, params: list[nn.Parameter]) -> Iterator[None]:
    """Have gradients in some parameters alone within the context."""
    check_modes()
    with frozen(regression.objective.model), recomputation_named():
        for p in params:
            p.requires_grad_(True)
        yield


def cheapest_grouping(num_examples: int, num_draws: int, at_once: int) -> tuple[int, int]:
    """Choose how many examples to see at once, and how many draws of each, by counted cost.

    The multiplications are the same however samples are divided into examples and draws; what
    differs is the memory moved, in units of the parameters: each pass through the network reads the
    weights twice, and writes and adds a gradient for each of its examples. At most ``at_once``
    samples go through the network at once.
    """

    def grouping(most: int) -> tuple[int, int, int]:
        rounds = -(-num_draws // most)
        draws = -(-num_draws // rounds)  # rounds of even size
        examples = min(num_examples, at_once // draws)
        passes = rounds * -(-num_examples // examples)
        return 2 * passes + 2 * rounds * num_examples, examples, draws

    _, examples, draws = min(map(grouping, range(1, min(num_draws, at_once) + 1)))
    return examples, draws
