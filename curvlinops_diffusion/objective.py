"""The denoising objective: what a diffusion model regresses, and how errors are weighted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvlinops_diffusion._checks import check_option
from curvlinops_diffusion.noise import NoiseProcess, Weighting, noise_process, weight_table


class Reduction(str, Enum):
    """How squared errors are reduced over the ``D`` entries of the network's output.

    Attributes:
        MEAN: ``'mean'``, ``r = 1/D``.
        SUM: ``'sum'``, ``r = 1``.
    """

    MEAN = "mean"
    SUM = "sum"


@dataclass(frozen=True)
class NoisedBatch:
    """One draw of some examples: inputs of the network, its target, and the loss' weight.

    The loss of example ``b`` is ``weight_B[b] * ‖prediction_BD[b] - target_BD[b]‖²``.

    Attributes:
        indices: The examples' indices ``n`` within the data.
        draw: The number ``r`` of the draw.
        level_B: Noise levels.
        x_t: Noised examples, shape ``[B, ...]``.
        timestep_B: What the network is told.
        condition: Further keyword arguments of the network.
        target_BD: The target, flattened, in the working precision.
        weight_B: ``w_t r``.
    """

    indices: Sequence[int]
    draw: int
    level_B: Tensor
    x_t: Tensor
    timestep_B: Tensor
    condition: dict[str, Any]
    target_BD: Tensor
    weight_B: Tensor

    def loss(self, prediction_BD: Tensor) -> Tensor:
        """The losses ``ℓ_t = w_t r ‖f - y‖²``, shape ``[B]``."""
        return self.weight_B * (prediction_BD - self.target_BD).square().sum(1)

    def loss_gradient(self, prediction_BD: Tensor) -> Tensor:
        """Gradients ``2 w_t r (f - y)`` of the losses in the prediction, shape ``[B, D]``."""
        return (2 * self.weight_B).unsqueeze(1) * (prediction_BD - self.target_BD)

    def loss_hessian_product(self, v: Tensor) -> Tensor:
        """The losses' Hessian ``2 w_t r I`` times ``v``, shape ``[B, D]``."""
        return (2 * self.weight_B).unsqueeze(1) * v

    def loss_hessian_root(self, v: Tensor) -> Tensor:
        """``√(2 w_t r) v``: turns ``E[v vᵀ] = I`` into the losses' Hessian, shape ``[B, D]``."""
        return (2 * self.weight_B).sqrt().unsqueeze(1) * v


class DenoisingObjective:
    r"""The training objective of a diffusion or flow-matching model.

    With ``x_t = alpha_t x0 + sigma_t eps``, the network ``f`` and its target ``y_t``::

        ℓ_t(θ) = w_t · r · ‖f_θ(x_t, t, c) − y_t‖²,   r = 1/D ("mean") or 1 ("sum")

    Args:
        model: Called as ``model(x_t, t, **condition)``, with ``t`` of shape ``[B]``. Returns a
            tensor of ``x_t``'s shape, a tuple that starts with it, or an object with ``.sample``.
        scheduler: A ``diffusers`` scheduler, from whose config the noise process and the
            prediction type are read, or a :class:`~curvlinops_diffusion.NoiseProcess`.
        weighting: The weight ``w_t``. ``None`` for one, a
            :class:`~curvlinops_diffusion.MinSNRWeighting`, a callable of the timesteps, or a table
            with one weight for each noise level, in order of rising noise.
        reduction: ``'mean'`` or ``'sum'`` over the output's ``D`` entries.
        autocast: Precision of the network's passes under ``torch.autocast``, usually
            ``torch.bfloat16``; ``None`` for that of its parameters. Losses, factors and vectors
            stay in float32. (A surrounding ``torch.autocast`` would reach these, too, and is
            refused.)

    Attributes:
        model: The network.
        process: The noise process.
        weights_T: The weight of each noise level, float64.
        reduction: The reduction.

    Raises:
        ValueError: If the model has no floating-point parameters, or an argument is of no
            accepted kind.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        weighting: Weighting = None,
        reduction: str | Reduction = Reduction.MEAN,
        *,
        autocast: torch.dtype | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise ValueError(f"The model arrived as {type(model).__name__}. Pass an nn.Module.")
        if not any(p.is_floating_point() for p in model.parameters()):
            raise ValueError("The model has no floating-point parameters to take derivatives in.")
        self.model = model
        self.process: NoiseProcess = noise_process(scheduler)
        self.weights_T = weight_table(weighting, self.process)
        self.reduction = check_option("reduction", reduction, Reduction)
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"autocast={autocast!r} arrived. Pass torch.bfloat16, torch.float16, or None."
            )
        self.autocast = autocast

    @property
    def _parameter(self) -> Tensor:
        """The parameter whose device and precision stand for the model's."""
        return next(p for p in self.model.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's precision."""
        return self._parameter.dtype

    @property
    def working_dtype(self) -> torch.dtype:
        """The precision of losses, factors and operators: the model's, but at least float32."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def rounding(self) -> float:
        """The relative rounding error of the network's arithmetic."""
        return torch.finfo(self.autocast or self.dtype).eps

    def noise(
        self,
        x0: Tensor,
        condition: Mapping[str, Any],
        level_B: Tensor,
        eps: Tensor,
        indices: Sequence[int],
        draw: int,
    ) -> NoisedBatch:
        """Noise clean examples, on the model's device.

        Args:
            x0: Clean examples, shape ``[B, ...]``.
            condition: Further keyword arguments of the network.
            level_B: Noise levels.
            eps: Noise, of the shape of ``x0``.
            indices: The examples' indices within the data.
            draw: The number of the draw.

        Returns:
            The noised batch.
        """
        x0, eps = (z.to(self.device, self.working_dtype) for z in (x0, eps))
        target_BD = self.process.target(x0, eps, level_B).flatten(1)
        r = 1 / target_BD.shape[1] if self.reduction is Reduction.MEAN else 1.0
        return NoisedBatch(
            indices,
            draw,
            level_B,
            self.process.noised(x0, eps, level_B).to(self.dtype),
            self.process.timesteps_T[level_B].to(self.device),
            {key: self._to_model(value) for key, value in condition.items()},
            target_BD,
            (self.weights_T[level_B] * r).to(target_BD),
        )

    def predict(self, batch: NoisedBatch, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """The network's output on a noised batch, flattened, in the working precision.

        Args:
            batch: The noised batch.
            params: Values that replace the model's own parameters, by name.

        Returns:
            The prediction, shape ``[B, D]``.

        Raises:
            ValueError: If the output is no tensor of the shape of ``x_t``.
        """
        args = (batch.x_t, batch.timestep_B)
        # a cache of weights would outlive a change of parameters
        with torch.autocast(
            self.device.type, self.autocast, enabled=self.autocast is not None, cache_enabled=False
        ):
            if params is None:
                output = self.model(*args, **batch.condition)
            else:
                output = functional_call(self.model, dict(params), args, batch.condition)
        return self._flatten(output, batch.x_t.shape)

    def _flatten(self, output: Any, shape: torch.Size) -> Tensor:
        if not isinstance(output, Tensor):
            output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"The model returned {type(output).__name__}. It must return a tensor, a tuple "
                "that starts with one, or an object with .sample."
            )
        if output.shape != shape:
            raise ValueError(
                f"The model returned shape {tuple(output.shape)} for an input of shape "
                f"{tuple(shape)}. The prediction must have the input's shape (wrap a model that "
                "also predicts a variance so that it returns the mean's channels alone)."
            )
        return output.flatten(1).to(self.working_dtype)

    def _to_model(self, value: Any) -> Any:
        """Move a (nested) condition to the model's device, floating point to its precision."""
        if isinstance(value, Mapping):
            return {key: self._to_model(entry) for key, entry in value.items()}
        if isinstance(value, Tensor):
            return value.to(self.device, self.dtype if value.is_floating_point() else None)
        return value
