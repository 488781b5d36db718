"""Recorded sampling trajectories, and their log-probability as a measured quantity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.ancestral import AncestralSteps
from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.data import CleanBatch
from curvlinops_diffusion.diffusion.draws import make_draws
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.runtime.digests import digest_of


class TrajectoryRegression(NoisedRegression):
    r"""Trajectories of ancestral sampling, as the data of ``ExampleGradientLinearOperator``.

    With the states ``x_0, x_1, …, x_S`` that a sampler passed through, from noise to sample, at the
    noise levels ``t_0 > t_1 > …``::

        log p_θ(x_1, …, x_S | x_0) = Σ_s log N(x_{s+1}; μ_θ(x_s, t_s), σ_s² I)

    ``measurement=trajectories.log_probability`` measures it: whole, or estimated without bias from
    a subset of the steps (``num_draws``). A last step without noise does not count.

    Args:
        objective: The denoising objective; its noise must be variance-preserving.
        states: The states, shape ``[Q, S + 1, ...]``.
        levels: The noise levels (``0 .. T-1`` in order of rising noise) of the first ``S`` states.
        condition: Keyword arguments of the network, one entry for each trajectory.
        num_draws: Steps drawn from each trajectory, stratified; ``None`` for all.
        seed: Seed of the steps.
        variance: ``'small'``, ``'large'``, or ``None`` for what the scheduler says.
        batch_size: Trajectories that are held at once.

    Raises:
        ValueError: If states and levels do not fit together.
    """

    def __init__(
        self,
        objective: DenoisingObjective,
        states: Tensor,
        levels: Sequence[int],
        *,
        condition: Mapping[str, Any] | None = None,
        num_draws: int | None = None,
        seed: int = 0,
        variance: str | None = None,
        batch_size: int = 64,
    ):
        T = objective.process.num_levels
        falling = all(a > b for a, b in pairwise(levels))
        if states.ndim < 3 or states.shape[1] != len(levels) + 1 or not falling:
            raise ValueError(
                f"States of shape {tuple(states.shape)} arrived with {len(levels)} levels. Pass "
                "states [trajectories, steps + 1, ...] from noise to sample, and the falling noise "
                "levels of all but the last."
            )
        if not all(0 <= level < T for level in levels):
            raise ValueError(f"The levels must be from 0 to {T - 1}; {list(levels)[:8]} arrived.")
        data = {"x0": states, **(condition or {})}
        super().__init__(objective, data, 1, seed, batch_size=batch_size)
        self._levels = torch.tensor(list(levels))
        self.draws = make_draws(
            "all" if num_draws is None else "stratified", num_draws, seed, len(levels)
        )
        squared_T = objective.process.alphas_T.square()
        previous_T = torch.ones_like(squared_T)
        previous_T[self._levels[:-1]] = squared_T[self._levels[1:]]
        self._steps = AncestralSteps.of(objective.process, variance, previous_T)

    @property
    def description(self) -> dict[str, Any]:
        """What determines the steps and their log-probability."""
        steps = self._steps
        variances = digest_of(self._levels, steps.previous_T, steps.variance_T)
        return {**super().description, "steps": variances}

    def log_probability(self, batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
        """The log-probability of a step, times the number of steps, shape ``[B]``."""
        log_probability_B = self._steps.log_probability(batch, prediction_BD, batch.target_BD)
        return len(self._levels) * log_probability_B

    def noised_batches(self, clean: CleanBatch) -> Iterator[NoisedBatch]:
        """Yield steps: states as inputs, the states that they led to as targets."""
        for r in range(self.num_draws):
            step_B = self.draws.levels(clean.indices, r)
            rows = torch.arange(len(step_B))
            states, reached = clean.x0[rows, step_B], clean.x0[rows, step_B + 1]
            yield self._steps_from(clean, r, step_B, states, reached)

    def _steps_from(
        self, clean: CleanBatch, draw: int, step_B: Tensor, states: Tensor, reached: Tensor
    ) -> NoisedBatch:
        """Steps as a batch: from ``states``, which led to ``reached``."""
        objective, level_B = self.objective, self._levels[step_B]
        states, reached = (
            z.to(objective.device, objective.working_dtype) for z in (states, reached)
        )
        noised = objective.noise(
            states, clean.condition, level_B, torch.zeros_like(states), clean.indices, draw
        )
        return NoisedBatch(
            clean.indices,
            draw,
            level_B,
            states.to(objective.dtype),
            noised.timestep_B,
            noised.condition,
            reached.flatten(1),
            torch.ones_like(noised.weight_B),
        )


@torch.no_grad()
def record_trajectories(
    objective: DenoisingObjective,
    shape: Sequence[int],
    levels: Sequence[int],
    *,
    condition: Mapping[str, Any] | None = None,
    seed: int = 0,
    variance: str | None = None,
) -> Tensor:
    """Sample by ancestral sampling, and keep every state.

    Args:
        objective: The denoising objective.
        shape: The samples' shape ``[Q, ...]``.
        levels: The falling noise levels at which the network is evaluated.
        condition: Keyword arguments of the network, one entry for each sample.
        seed: Seed of the noise.
        variance: As in :class:`TrajectoryRegression`.

    Returns:
        The states, shape ``[Q, S + 1, ...]``; the last ones are the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    zeros = torch.zeros(shape[0], len(levels) + 1, *shape[1:])
    regression = TrajectoryRegression(
        objective, zeros, levels, condition=condition, variance=variance, batch_size=shape[0]
    )
    states = [x]
    (clean,) = regression.clean_batches()
    for step in range(len(levels)):
        step_B = torch.full((shape[0],), step)
        # where the step leads is what is asked for
        batch = regression._steps_from(clean, step, step_B, states[-1], states[-1])
        mean_BD = regression._steps.mean(batch, objective.predict(batch))
        std = regression._steps.variance_T[levels[step]].sqrt().to(mean_BD)
        noise = torch.randn(*shape, generator=generator).to(mean_BD)
        states.append((mean_BD.reshape(shape) + std * noise).cpu().to(x))
    return torch.stack(states, 1)
