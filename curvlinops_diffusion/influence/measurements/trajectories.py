"""Recorded sampling trajectories as data, and their log-probability as a measured quantity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.ancestral import AncestralSteps
from curvlinops_diffusion.diffusion.batch import CleanBatch, NoisedBatch
from curvlinops_diffusion.diffusion.checks import (
    check_condition,
    check_deterministic_mode,
    check_surroundings,
)
from curvlinops_diffusion.diffusion.draws import make_draws
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.runtime.digests import digest_of


class StatesRegression(NoisedRegression):
    """Recorded states as inputs of the network, a draw for each step; subclasses add the target.

    Arguments and errors are those of :class:`TrajectoryRegression`.
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
        batch_size: int = 64,
    ):
        if states.ndim < 3 or states.shape[1] != len(levels) + 1:
            raise ValueError(
                f"States must be [trajectories, steps + 1, ...], from noise to sample, got shape "
                f"{list(states.shape)} with {len(levels)} levels. Pass the falling noise levels of "
                "all states but the last."
            )
        timesteps = "all" if num_draws is None else "stratified"
        draws = make_draws(timesteps, num_draws, seed, len(levels))
        data = {"x0": states, **(condition or {})}
        super().__init__(objective, data, batch_size=batch_size, draws=draws)
        self.levels = torch.tensor(list(levels))

    @property
    def encodes(self) -> bool:
        """States are what the network sees."""
        return False

    def steps(self, clean: CleanBatch) -> Iterator[tuple[NoisedBatch, Tensor, Tensor]]:
        """Yield states as inputs, without their target; the states; and those that follow them."""
        rows = torch.arange(len(clean.indices))
        for r in range(self.num_draws):
            step_B = self.draws.levels(clean.indices, r)
            states, level_B = clean.x0[rows, step_B], self.levels[step_B]
            batch = _as_batch(self.objective, states, clean.condition, level_B, clean.indices, r)
            yield batch, states, clean.x0[rows, step_B + 1]


class TrajectoryRegression(StatesRegression):
    r"""Trajectories of ancestral sampling, as the data of ``ExampleGradientLinearOperator``.

    With the states ``x_0, x_1, …, x_S`` that a sampler passed through, from noise to sample, at the
    noise levels ``t_0 > t_1 > …``::

        log p_θ(x_1, …, x_S | x_0) = Σ_s log N(x_{s+1}; μ_θ(x_s, t_s), σ_s² I)

    with ``μ_θ`` from the predicted clean example, clipped if the scheduler clips samples
    (``clip_sample``, ``thresholding``). ``measurement=trajectories.log_probability`` measures it:
    whole, or estimated without bias from a subset of the steps (``num_draws``). A last step without
    noise does not count.

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
        variance: str | None = None,
        **options: Any,
    ):
        self._steps = _steps_between(objective, levels, variance)
        super().__init__(objective, states, levels, **options)

    @property
    def description(self) -> dict[str, Any]:
        """Describe what determines the steps and their log-probability."""
        steps = self._steps
        clip = [] if steps.clip is None else [z for z in astuple(steps.clip) if z is not None]
        variances = digest_of(self.levels, steps.previous_T, steps.variance_T, *clip)
        return {**super().description, "steps": variances}

    def log_probability(self, batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
        """The log-probability of a step, times the number of steps, shape ``[B]``."""
        if not isinstance(batch, _StepBatch):
            raise ValueError(
                "log_probability needs steps of trajectories, got other examples. Measure it on "
                "the TrajectoryRegression that it belongs to."
            )
        log_probability_B = self._steps.log_probability(batch, prediction_BD, batch.reached_BD)
        return len(self.levels) * log_probability_B

    def noised_batches(self, clean: CleanBatch) -> Iterator[NoisedBatch]:
        """Yield steps: states as inputs, with the states that they led to.

        The target is the prediction whose step has the next state as its mean.
        """
        for batch, _, reached in self.steps(clean):
            reached_BD = reached.flatten(1).to(batch.target_BD)
            own = {field.name: getattr(batch, field.name) for field in fields(batch)}
            own["target_BD"] = self._steps.prediction_for(batch, reached_BD)
            own["weight_B"] = torch.ones_like(batch.weight_B)
            yield _StepBatch(**own, reached_BD=reached_BD)


@dataclass(frozen=True)
class _StepBatch(NoisedBatch):
    """States of trajectories, and the states that they led to."""

    reached_BD: Tensor


def _as_batch(
    objective: DenoisingObjective,
    states: Tensor,
    condition: Mapping[str, Any],
    level_B: Tensor,
    indices: Sequence[int],
    draw: int,
) -> NoisedBatch:
    """States ``[B, ...]`` at given noise levels as inputs of the network, without their target."""
    noised = objective.noise(states, condition, level_B, torch.zeros_like(states), indices, draw)
    states = states.to(objective.device, objective.working_dtype)
    return replace(noised, x_t=states.to(objective.dtype), state_BD=states.flatten(1))


def _steps_between(
    objective: DenoisingObjective, levels: Sequence[int], variance: str | None
) -> AncestralSteps:
    """The ancestral steps from each of some falling levels to the next, the last to the data."""
    T = objective.process.num_levels
    if not all(a > b for a, b in pairwise([T, *levels, -1])):
        raise ValueError(
            f"`levels` must fall, from noise to sample, within 0 to {T - 1}, got "
            f"{list(levels)[:8]}."
        )
    index = torch.tensor(list(levels))
    squared_T = objective.process.alphas_T.square()
    previous_T = torch.ones_like(squared_T)
    previous_T[index[:-1]] = squared_T[index[1:]]
    objective.process.check_clean_is_told(index, "the ancestral step from there")
    steps = AncestralSteps.of(objective.process, variance, previous_T)
    return replace(steps, clip=objective.process.clip)


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

    Raises:
        ValueError: If the network's passes are random, levels or variance are as
            :class:`TrajectoryRegression` refuses them, or the condition is of other samples.
    """
    check_deterministic_mode(objective.model)
    check_surroundings(objective.device)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    steps = _steps_between(objective, levels, variance)
    condition = dict(condition or {})
    check_condition(condition, shape[0])
    states, indices = [x], range(shape[0])
    for number, level in enumerate(levels):
        level_B = torch.full((shape[0],), level)
        batch = _as_batch(objective, states[-1], condition, level_B, indices, number)
        mean_BD = steps.mean(batch, objective.predict(batch))
        std = steps.variance_T[level].sqrt().to(mean_BD)
        noise = torch.randn(*shape, generator=generator).to(mean_BD)
        states.append((mean_BD.reshape(shape) + std * noise).cpu().to(x))
    return torch.stack(states, 1)
