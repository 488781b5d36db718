"""The denoising objective: what a diffusion model regresses, and how errors are weighted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import cached_property, partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.batch import CleanBatch, NoisedBatch, mapped
from curvlinops_diffusion.diffusion.checks import check_modes, check_parameters
from curvlinops_diffusion.diffusion.latents import Encoded, LatentEncoder, Packing, check_encoded
from curvlinops_diffusion.diffusion.network_call import ModelKwargs, NetworkCall
from curvlinops_diffusion.diffusion.noise import NoiseProcess, noise_process
from curvlinops_diffusion.diffusion.pipelines import pipeline_parts
from curvlinops_diffusion.diffusion.recipe import entry_weights
from curvlinops_diffusion.diffusion.weightings import Weighting, weight_table
from curvlinops_diffusion.runtime.checks import check_non_negative, check_option
from curvlinops_diffusion.runtime.devices import to_device, to_like
from curvlinops_diffusion.runtime.digests import Named, digest_of
from curvlinops_diffusion.runtime.modes import unwrapped
from curvlinops_diffusion.runtime.sharded_networks import device_of


class Reduction(str, Enum):
    """The reduction of squared errors over the ``D`` entries of the network's output.

    Attributes:
        MEAN: ``'mean'``, ``r = 1/D``.
        SUM: ``'sum'``, ``r = 1``.
    """

    MEAN = "mean"
    SUM = "sum"


class DenoisingObjective:
    r"""The training objective of a diffusion or flow-matching model.

    With ``x_t = alpha_t x0 + sigma_t eps``, the network ``f`` and its target ``y_t``::

        ℓ_t(θ) = w_t · r · ‖f_θ(x_t, t, c) − y_t‖²,   r = 1/D ("mean") or 1 ("sum")

    Args:
        model: Called as ``model(x_t, t, **condition)``, with ``t`` of shape ``[B]`` (by name if the
            model has an argument ``timestep``, or one called ``t``, ``time`` or the like that is
            not the second; as ``model(t, x_t, **condition)`` if that is the first). Returns a
            tensor of ``x_t``'s shape, a tuple that starts with it, or an object with ``.sample``.
            If it has twice as many channels, the second half is a learned variance, which this
            objective does not contain.
        scheduler: A ``diffusers`` scheduler, from whose config the noise process and the
            prediction type are read, or a :class:`~curvlinops_diffusion.NoiseProcess`.
        weighting: The weight ``w_t``. ``None`` for one, a
            :class:`~curvlinops_diffusion.weightings.ProcessWeighting` like
            :class:`~curvlinops_diffusion.weightings.MinSNRWeighting`, a callable of the timesteps,
            or a table with one weight for each noise level, in order of rising noise.
        reduction: ``'mean'`` or ``'sum'`` over the output's ``D`` entries.
        encode: What turns batches of users' data into what the network sees, a
            :class:`~curvlinops_diffusion.LatentEncoder` or a function of (examples, condition) that
            returns an :class:`~curvlinops_diffusion.Encoded`; ``None`` for the data as it
            is.
        condition_dropout: The probability with which training dropped the condition
            (classifier-free guidance); drawn, like noise, for each example and draw.
        null_condition: What a dropped condition is replaced by: for each keyword argument a value
            for one example (the "no class" label, the embedding of an empty prompt).
        model_kwargs: Further keyword arguments of the network, the same for all examples; or a
            function of (``x_t``, condition) that returns them.
        autocast: Precision of the network's passes under ``torch.autocast``, usually
            ``torch.bfloat16``; ``None`` for that of its parameters. Losses, factors and vectors
            stay in float32. (A surrounding ``torch.autocast`` would reach these, too, and is
            refused.)

    Attributes:
        model: The network.
        process: The noise process.
        weights_T: The weight of each noise level, float64.
        reduction: The reduction.
        training_arguments: What else training gave the network, see :meth:`from_pipeline`.

    Raises:
        ValueError: If the model has no floating-point parameters, or an argument is of no
            accepted kind.

    Examples:
        >>> objective = DenoisingObjective(unet, DDPMScheduler(), MinSNRWeighting(gamma=5.0))
        >>> objective.weights_T.shape
        torch.Size([1000])
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        weighting: Weighting = None,
        reduction: str | Reduction = Reduction.MEAN,
        *,
        encode: Callable[[Tensor, dict[str, Any]], Encoded] | None = None,
        condition_dropout: float = 0.0,
        null_condition: Mapping[str, Any] | None = None,
        model_kwargs: ModelKwargs | None = None,
        autocast: torch.dtype | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise ValueError(f"`model` must be an nn.Module, got {type(model).__name__}.")
        check_modes()
        self.model = unwrapped(model)
        check_parameters(self.model)
        if not any(p.is_floating_point() for p in model.parameters()):
            raise ValueError("`model` must have floating-point parameters, got one without.")
        self.process: NoiseProcess = noise_process(scheduler)
        self.weights_T = weight_table(weighting, self.process)
        self.reduction = check_option("reduction", reduction, Reduction)
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"`autocast` must be torch.bfloat16, torch.float16 or None, got {autocast!r}."
            )
        self.autocast = autocast
        self.condition_dropout = check_non_negative("condition_dropout", condition_dropout)
        if self.condition_dropout > 1 or (self.condition_dropout > 0 and not null_condition):
            raise ValueError(
                "`condition_dropout` must be a probability, with a null_condition that replaces a "
                f"dropped condition (for instance {{'class_labels': 1000}}), got "
                f"{condition_dropout!r} with null_condition={null_condition!r}."
            )
        self.null_condition = dict(null_condition or {})
        self.training_arguments: dict[str, Any] = {}
        self._encode = encode
        self._call = NetworkCall(self.model, model_kwargs or {}, autocast)

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        weighting: Weighting = None,
        reduction: str | Reduction = Reduction.MEAN,
        *,
        sample_latents: bool | None = None,
        latent_cache: str | PathLike[str] | None = None,
        condition_dropout: float = 0.0,
        autocast: torch.dtype | None = None,
        text_encoders: bool = False,
        training_arguments: Mapping[str, Any] | None = None,
    ) -> DenoisingObjective:
        """The objective that a ``diffusers`` pipeline's denoiser was trained with.

        Reads the denoiser, scheduler, prediction type, autoencoder and text encoders. Data is then
        images in [-1, 1] with labels or prompts: pairs, or dicts with ``'class_labels'`` or
        ``'prompt'``, and ``'mask_image'`` or ``'conditioning_image'`` in [0, 1] where the network
        is shown one.

        Args:
            pipeline: A pipeline of ``diffusers``: DDPM, DDIM, LDM, DiT, Stable Diffusion (1, 2,
                XL; inpainting and ControlNet of these, too); or another from prompts to images by
                latents (Stable Diffusion 3, Flux, PixArt, Sana, Lumina 2, Qwen-Image, Flux.2,
                Z-Image), which is run with stand-ins for its parts to see what its network sees.
            weighting: As in the constructor.
            reduction: As in the constructor.
            sample_latents: Whether latents are drawn from the autoencoder's distribution, or are
                its mean. ``None`` for what ``diffusers``' training script of the pipeline does: the
                mean for Flux.2 and Z-Image, else draws.
            latent_cache: A folder to keep latents and embeddings in, see
                :class:`~curvlinops_diffusion.LatentEncoder`.
            condition_dropout: The probability with which training dropped label or prompt.
            autocast: As in the constructor.
            text_encoders: Whether text encoders were trained as well (Stable Diffusion 1, 2, XL).
                They are part of the model then, whose parameters are called ``unet.…``,
                ``text_encoder.…`` and ``text_encoder_2.…``.
            training_arguments: What else training gave the network and no file of the pipeline
                says, by the names in ``diffusers``' training scripts and pipelines:
                ``max_sequence_length`` of prompts, ``guidance_scale`` of networks that it is
                distilled into, ``clip_skip``, ``max_token_length`` of kohya's scripts (of Stable
                Diffusion 1, 2, XL: 150, 225), ``system_prompt``, ``complex_human_instruction``,
                ``text_encoder_out_layers``; for Lumina 2 ``mirrored_levels`` (whether the
                scheduler's levels are shares of data), for Sana ``timestep_scale``; and what
                training set otherwise in the scheduler: ``prediction_type`` and
                ``rescale_betas_zero_snr``, or of flow matching ``shift``. Those left out are the
                scripts' defaults and the scheduler's; :attr:`training_arguments` has them all.

        Raises:
            ValueError: If the pipeline is of no known kind, or takes none of the arguments.
        """
        parts = pipeline_parts(
            pipeline, sample_latents, latent_cache, training_arguments, text_encoders
        )
        dropped = condition_dropout > 0
        objective = cls(
            parts.model,
            parts.process,
            weighting,
            reduction,
            encode=parts.encode,
            condition_dropout=condition_dropout,
            null_condition=parts.null_condition() if dropped else None,
            model_kwargs=parts.model_kwargs,
            autocast=autocast,
        )
        objective.training_arguments = dict(parts.arguments)
        return objective

    @property
    def description(self) -> dict[str, Any]:
        """Describe what determines the loss besides network and data, as plain values.

        ``process``, ``weighting``, ``encoder``, ``null_condition`` and ``model_kwargs`` are
        digests.
        """
        process = self.process
        arguments = self.training_arguments
        return {
            "prediction_type": getattr(process.prediction_type, "value", process.prediction_type),
            "reduction": self.reduction.value,
            "condition_dropout": self.condition_dropout,
            "process": digest_of(process.alphas_T, process.sigmas_T, process.timesteps_T),
            "weighting": digest_of(self.weights_T),
            "autocast": str(self.autocast),
            "encoder": getattr(self._encode, "description", None) or str(self._encoder_name),
            "null_condition": digest_of(self.null_condition),
            "model_kwargs": digest_of(self._call.model_kwargs),
            **({"training_arguments": arguments} if arguments else {}),
        }

    @cached_property
    def _encoder_name(self) -> Named:
        return Named(self._encode)

    @property
    def _parameter(self) -> Tensor:
        """The parameter whose device and precision stand for the model's."""
        return next(p for p in self.model.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return device_of(self._parameter)

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

    @property
    def encodes(self) -> bool:
        """True if something is between the data and the network."""
        return self._encode is not None

    @property
    def takes_images(self) -> bool:
        """True unless a function of the user's takes the data, which may be in any range."""
        return self._encode is None or isinstance(self._encode, LatentEncoder)

    def encode(self, clean: CleanBatch) -> Encoded:
        """Clean examples in the network's terms, on its device: once for all draws of them."""
        return self._encoded(clean, self._encode)

    def encode_drawn(self, clean: CleanBatch, latents: Encoded | None = None) -> Encoded:
        """Encode examples as a single draw sees them, perhaps their captions alone, uncached."""
        encode = self._encode
        if isinstance(encode, LatentEncoder):
            encode = partial(encode.encode_drawn, latents=latents)
        return self._encoded(clean, encode)

    def _encoded(self, clean: CleanBatch, encode: Any) -> Encoded:
        if encode is None:
            encoded = Encoded(clean.x0, None, clean.condition)
        else:
            if not isinstance(self._encode, LatentEncoder):
                _ = self._encoder_name  # before it is called
            encoded = encode(clean.x0, clean.condition)
            check_encoded(encoded)

        def moved(entry: Any) -> Any:
            # an encoder's own graph is no part of the network
            return to_device(entry.detach(), self.device) if isinstance(entry, Tensor) else entry

        mean, std = moved(encoded.mean), moved(encoded.std)
        return Encoded(mean, std, mapped(moved, encoded.condition))

    def packing(self, clean: CleanBatch) -> Packing | None:
        """The arrangement of clean examples' latents; ``None`` where channels come first."""
        encoder = self._encode
        return encoder.packing(clean.x0) if isinstance(encoder, LatentEncoder) else None

    def encode_mask(self, clean: CleanBatch) -> Tensor | None:
        """Weights of clean examples' entries in the network's terms."""
        if clean.mask is None:
            return None
        packing = self.packing(clean)
        if packing is None:  # averaged later, to height and width of what is noised
            return to_device(clean.mask, self.device)
        return to_device(packing.pack(entry_weights(clean.mask, packing.shape)), self.device)

    def drop_condition(self, condition: Mapping[str, Any], dropped_B: Tensor) -> dict[str, Any]:
        """The condition, with that of some examples replaced by :attr:`null_condition`."""
        return _replaced(condition, self.null_condition, dropped_B)

    def noise(
        self,
        x0: Tensor,
        condition: Mapping[str, Any],
        level_B: Tensor,
        eps: Tensor,
        indices: Sequence[int],
        draw: int,
        input_eps: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> NoisedBatch:
        """Noise clean examples ``[B, ...]``, on the model's device.

        Args:
            x0: Clean examples.
            condition: Further keyword arguments of the network.
            level_B: Noise levels.
            eps: Noise, of the shape of ``x0``.
            indices: The examples' indices within the data.
            draw: The number of the draw.
            input_eps: The noise of the input, where it is not that of the target.
            mask: Weights of the examples' entries, ``[B, ...]``; ``None`` for one.
        """
        mask_BD = None if mask is None else entry_weights(mask, x0.shape[1:]).flatten(1)
        device, dtype = self.device, self.working_dtype
        x0, noise = (to_device(z, device, dtype) for z in (x0, eps))
        of_input = noise
        if input_eps is not None and input_eps is not eps:
            of_input = to_device(input_eps, device, dtype)
        target_BD = self.process.target(x0, noise, level_B).flatten(1)
        x_t = self.process.noised(x0, of_input, level_B)
        timestep_B = to_device(self.process.timesteps_T[level_B], device)
        if timestep_B.dtype == torch.float64:  # which a network in float32 does not take
            timestep_B = timestep_B.to(dtype)
        r = 1 / target_BD.shape[1] if self.reduction is Reduction.MEAN else 1.0
        return NoisedBatch(
            indices,
            [draw] * len(indices),
            level_B,
            x_t.to(self.dtype),
            timestep_B,
            {key: self.to_model(value) for key, value in condition.items()},
            target_BD,
            to_device(self.weights_T[level_B] * r, device, dtype),
            mask_BD=None if mask_BD is None else to_device(mask_BD, device, dtype),
            state_BD=x_t.flatten(1),
        )

    def predict(self, batch: NoisedBatch, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """The network's output on a noised batch, ``[B, D]``, in the working precision.

        Args:
            batch: The noised batch.
            params: Values that replace the model's own parameters, by name.
        """
        return self.predict_from(batch.x_t, batch.timestep_B, batch.condition, params)

    def predict_from(
        self,
        x_t: Tensor,
        timestep_B: Tensor,
        condition: dict[str, Any],
        params: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """:meth:`predict` from noised examples ``[B, ...]``, their timesteps and condition."""
        prediction_BD = self._call(x_t, timestep_B, condition, params)
        return prediction_BD.to(self.working_dtype)

    def to_model(self, value: Any) -> Any:
        """Move a (nested) condition to the model's device, floating point to its precision."""

        def moved(entry: Any) -> Any:
            if not isinstance(entry, Tensor):
                return entry
            dtype = self.dtype if entry.is_floating_point() else None
            return to_device(entry.detach(), self.device, dtype)

        return mapped(moved, value)


def _replaced(
    condition: Mapping[str, Any], null: Mapping[str, Any], mask_B: Tensor
) -> dict[str, Any]:
    """The entries named by ``null`` replaced by its values, for some examples."""
    result = dict(condition)
    for key, value in null.items():
        if key not in condition:
            raise ValueError(
                f"The entries of `null_condition` must be those of the condition, "
                f"{sorted(condition)}, got '{key}'."
            )
        given = condition[key]
        if isinstance(value, Mapping):
            result[key] = _replaced(given, value, mask_B)
            continue
        mask = to_device(mask_B, given.device).reshape(-1, *[1] * (given.ndim - 1))
        result[key] = torch.where(mask, to_like(torch.as_tensor(value), given), given)
    return result
