"""The log-likelihood of an example by the probability-flow ODE, as a measured quantity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import log, pi
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.batch import rows_of
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.influence.measurements.base import (
    Example,
    ExampleDraws,
    ExampleFunction,
    ObjectiveMeasurement,
)
from curvlinops_diffusion.runtime.checks import check_count


@dataclass(frozen=True)
class LogLikelihood(ObjectiveMeasurement):
    r"""``log p_θ(x0)`` by the probability-flow ODE, in nats.

    In the coordinates ``y = x_t / (alpha_t + sigma_t)`` and ``s = sigma_t / (alpha_t + sigma_t)``
    every noise process is ``y = (1 − s) x0 + s ε``, and the deterministic sampler follows the
    velocity ``u = ε_θ − x0_θ`` that the network predicts::

        dy/ds = u(y, s),    log p(y_0) = log p(y_1) + ∫ div u ds,    div u ≈ ηᵀ (∂u/∂y) η

    from the lowest noise level to the highest, where ``x_T`` has the sampler's Gaussian
    distribution, by Heun's method over some of the levels. The divergence is Hutchinson's estimate
    with a random sign vector ``η`` for each draw of the regression: unbiased. Of the example at its
    lowest noise level the density is that of ``x_t / alpha_t`` at ``x0``. Keeps the activations of
    all steps when it is differentiated.

    Source: Song et al., 2021, Section 4.3 and Appendix D.2; Karras et al., 2022, Algorithm 1.

    Attributes:
        num_steps: Steps of the solver, each of two evaluations of the network.
    """

    num_steps: int = 20

    def bind(self, objective: DenoisingObjective) -> ExampleFunction:
        """The measurement for an objective.

        Raises:
            ValueError: If there are fewer noise levels than steps, or one has no signal for a
                network that predicts the noise, or no noise for one that predicts the example.
        """
        check_count("num_steps", self.num_steps)
        T = objective.process.num_levels
        if self.num_steps >= T:
            raise ValueError(
                f"num_steps={self.num_steps} arrived for {T} noise levels. Pass at most {T - 1}."
            )
        levels = torch.linspace(0, T - 1, self.num_steps + 1, dtype=torch.float64).round().long()
        objective.process.check_clean_is_told(levels, "the velocity of the probability flow")
        of_x_T, of_y_T = objective.process.noise_coefficients()
        silent = [n for n in levels.tolist() if not (of_x_T[n] + of_y_T[n]).isfinite()]
        if silent:
            raise ValueError(
                f"Noise level {silent[0]} has no noise, where a prediction of the clean example "
                "says nothing of it, and the velocity of the probability flow does not exist. "
                "Leave that level out of the noise process, or predict 'epsilon' or "
                "'v_prediction'."
            )
        return ExampleFunction(_Flow(objective, levels.tolist()))


class _Flow:
    """The log-likelihood of one example, averaged over the draws' sign vectors."""

    def __init__(self, objective: DenoisingObjective, levels: list[int]):
        process = objective.process
        self._objective = objective
        self._levels = levels
        self._scale_T = process.alphas_T + process.sigmas_T
        self._s_T = process.sigmas_T / self._scale_T

    def __call__(self, model: nn.Module, example: Example, draws: ExampleDraws) -> Tensor:
        """``log p_θ(x0)``."""
        process, x0 = self._objective.process, example.x0
        R, D = draws.num_draws, x0[0].numel()
        sign_RX = torch.stack([draws.normal(r, x0.shape[1:]).sign() for r in range(R)])
        condition = rows_of(example.condition, [0] * R)
        first, last = self._levels[0], self._levels[-1]
        y = (x0 * process.alphas_T[first] / self._scale_T[first]).to(x0).repeat_interleave(R, 0)
        change_R = y.new_zeros(R)
        u, divergence_R = self._velocity(y, first, condition, sign_RX)
        for here, there in pairwise(self._levels):
            step = float(self._s_T[there] - self._s_T[here])
            u_there, divergence_there_R = self._velocity(y + step * u, there, condition, sign_RX)
            y = y + step / 2 * (u + u_there)
            change_R = change_R + step / 2 * (divergence_R + divergence_there_R)
            if there != last:
                u, divergence_R = self._velocity(y, there, condition, sign_RX)
        x_T = y[0] * float(self._scale_T[last])
        variance = float(process.alphas_T[last] ** 2 + process.sigmas_T[last] ** 2)
        log_prior = -0.5 * (x_T.square().sum() / variance + D * log(2 * pi * variance))
        # densities of y to those of x_t / alpha_t, at either end
        scales = self._scale_T[last].log() - (self._scale_T[first] / process.alphas_T[first]).log()
        return log_prior + change_R.mean() + D * float(scales)

    def _velocity(
        self, y: Tensor, level: int, condition: dict[str, Any], sign_RX: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``u`` and ``ηᵀ (∂u/∂y) η``."""
        differentiated = torch.is_grad_enabled()
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            u = self._predicted_velocity(y, level, condition)
            (pulled,) = torch.autograd.grad(
                u, y, sign_RX, create_graph=differentiated, retain_graph=True
            )
            divergence_R = (pulled * sign_RX).flatten(1).sum(1)
        return (u, divergence_R) if differentiated else (u.detach(), divergence_R.detach())

    def _predicted_velocity(self, y: Tensor, level: int, condition: dict[str, Any]) -> Tensor:
        objective, process, R = self._objective, self._objective.process, len(y)
        level_R = torch.full((R,), level)
        x_t = y * float(self._scale_T[level])
        empty = torch.zeros_like(x_t)
        batch = objective.noise(empty, condition, level_R, empty, [0] * R, 0)
        batch = replace(batch, x_t=x_t.to(objective.dtype), state_BD=None)
        prediction = objective.predict(batch)
        x_RD = x_t.flatten(1)
        noise = process.noise(x_RD, prediction, level_R)
        return (noise - process.clean(x_RD, prediction, level_R)).reshape(y.shape)
