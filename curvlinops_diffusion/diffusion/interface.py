"""Find what a pipeline shows its network by running it with stand-ins for its parts.

Pipelines of ``diffusers`` differ in the arguments that their network takes, in how latents are
scaled and arranged, and in how times are passed. All of it can be seen from outside: while the
pipeline samples, its network notes what it is given and answers at random, its scheduler passes
samples on, and its decoder notes what comes to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from curvlinops_diffusion.diffusion.latents import LatentEncoder
from curvlinops_diffusion.runtime.checks import quoted
from curvlinops_diffusion.runtime.digests import digest_of

# pixels of an image that pipelines of all kinds take, and steps at which times are compared
SIZE = 128
_STEPS = 3
# arguments of a pipeline's call that switch off what training does not do
_PLAIN = {
    "guidance_scale": 1.0,
    "true_cfg_scale": 1.0,
    "use_resolution_binning": False,
    "clean_caption": False,
    "output_type": "pt",
}
#: What to do where a pipeline cannot be read.
BY_HAND = (
    "Pass denoiser and scheduler to DenoisingObjective, and what encodes the data as "
    "encode=LatentEncoder(vae, embed=...)."
)
_IMAGES = ("hidden_states", "sample", "x")
_TIMES = ("timestep", "timesteps", "t")


@dataclass
class Seen:
    """Records a pipeline's sampling."""

    # the network's arguments besides image and time, as in its first call; lists of tensors of
    # several lengths are padded, under the names in ``ragged``
    condition: dict[str, Any] = field(default_factory=dict)
    ragged: list[str] = field(default_factory=list)
    image: Tensor | None = None  # the images that it was given there
    listed: bool = False  # as a list, each with an axis of frames
    names: tuple[str, str] = ("", "")  # of its arguments image and time
    # the times that it was given, and those that the scheduler counts by, of each step
    times: list[tuple[float, float]] = field(default_factory=list)
    # the sign with which its answer reached the scheduler, of each step; zero for none
    signs: list[int] = field(default_factory=list)
    decoded: Tensor | None = None  # what the decoder was given


class _DecodedError(Exception):
    """Ends a pipeline's run at its decoder."""


@torch.no_grad()
def seen_of(
    pipeline: Any,
    model: nn.Module,
    prompts: Sequence[str],
    size: tuple[int, int],
    arguments: Mapping[str, Any],
    latents: Tensor | None = None,
) -> Seen:
    """Run a pipeline without running its network."""
    seen, asked = Seen(), inspect.signature(pipeline.__call__).parameters
    given: dict[str, Any] = {"height": size[0], "width": size[1], "latents": latents}
    given |= {"num_inference_steps": _STEPS, **_PLAIN, **arguments}
    given["original_size"] = arguments.get("original_size") or size
    if "true_cfg_scale" in asked and not getattr(model, "config", {}).get("guidance_embeds"):
        del given["guidance_scale"]  # which would be ignored, with a warning
    length = arguments.get("max_sequence_length")
    try:
        for guidance in ({}, {"guidance_scale": 0.0}):  # which counts from one, or from zero
            # a list of its own, which some change; and the user's random state is left alone
            given |= {"prompt": list(prompts), **guidance}
            given["generator"] = torch.Generator().manual_seed(0)
            seen = Seen()
            with (
                _stand_ins(pipeline, model, seen, length),
                torch.random.fork_rng(devices=[]),
                suppress(_DecodedError),
            ):
                pipeline(**{name: value for name, value in given.items() if name in asked})
            if seen.image is not None and len(seen.image) == len(prompts):
                break
    except Exception as error:
        raise ValueError(
            f"The {type(pipeline).__name__} failed when it was asked for {size[0]}×{size[1]} "
            f"pixels, to see what it shows its network ({quoted(error)}). {BY_HAND}"
        ) from error
    return seen


@contextmanager
def _stand_ins(pipeline: Any, model: nn.Module, seen: Seen, length: int | None) -> Iterator[None]:
    """Network, scheduler and decoder note what they are given."""
    signature = inspect.signature(type(model).forward)
    config: Any = getattr(model, "config", {})
    answers: list[Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor | list[Tensor]]:
        bound = dict(signature.bind(model, *args, **kwargs).arguments)
        bound |= bound.pop("kwargs", {})
        image_name, time_name = (
            next(name for name in names if name in bound) for names in (_IMAGES, _TIMES)
        )
        image, time = bound.pop(image_name), bound.pop(time_name)
        listed = isinstance(image, list)
        if listed:
            image = torch.stack(image).squeeze(2)
        for other in ("self", "return_dict"):
            bound.pop(other, None)
        if seen.image is None:
            seen.image, seen.listed, seen.names = image, listed, (image_name, time_name)
            for name, entry in bound.items():
                if isinstance(entry, list) and all(isinstance(row, Tensor) for row in entry):
                    seen.ragged.append(name)
                    seen.condition |= padded(name, entry, length)
                elif entry is not None and entry != {}:
                    seen.condition[name] = entry
        shape = list(image.shape)
        if image.ndim == 4:  # twice as many channels, if a variance is learned as well
            shape[1] = config.get("out_channels") or shape[1]
        # whole numbers, which no precision rounds
        random = torch.Generator().manual_seed(0)
        answers.append(torch.randint(-99, 100, tuple(shape), generator=random).float())
        seen.times.append((float(torch.as_tensor(time).flatten()[0]), 0.0))
        answer = answers[-1].to(image)
        return (list(answer.unsqueeze(2)) if listed else answer,)

    def step(output: Tensor, t: Any, sample: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        seen.times[-1] = (seen.times[-1][0], float(t))
        answer = answers[-1].to(output)[:, : output.shape[1]]
        same = [s for s in (1, -1) if output.shape == answer.shape and output.equal(s * answer)]
        seen.signs.append(same[0] if same else 0)
        return (sample,)

    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.decoded = z
        raise _DecodedError

    own = pipeline.scheduler
    pipeline.scheduler = deepcopy(own)  # whose tables sampling changes
    patched: list[tuple[Any, str, Callable[..., Any]]] = [
        (model, "forward", forward),
        (pipeline.scheduler, "step", step),
        (pipeline.vae, "decode", decode),
    ]
    before = [vars(owner).get(name) for owner, name, _ in patched]  # hooks of accelerate, say
    shown = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    for owner, name, stand_in in patched:
        object.__setattr__(owner, name, stand_in)
    try:
        yield
    finally:
        for (owner, name, _), earlier in zip(patched, before, strict=True):
            if earlier is None:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, earlier)
        pipeline.scheduler = own
        pipeline.set_progress_bar_config(**shown)


@dataclass(frozen=True)
class Interface:
    """Describes how a pipeline's network is called."""

    scale: tuple[float, float]  # factor and summand from the scheduler's times to the network's
    sign: int  # with which the network's answer is what the scheduler takes
    names: tuple[str, str]  # of its arguments image and time
    listed: bool  # whether it takes lists of images
    ragged: list[str]  # the entries of the condition that are lists of tensors of several lengths
    pack: Callable[[Tensor], Tensor] | None  # of latents to its form; None for the identity
    frames: bool  # whether the autoencoder takes images as videos of one frame
    shared: list[str]  # the entries of the condition that all examples of a batch share
    of_size: list[str]  # those that depend on the images' size (positions, say), and on no prompt


def interface_of(pipeline: Any, model: nn.Module, arguments: Mapping[str, Any]) -> Interface:
    """Find out how a pipeline's network is spoken to, and check it.

    What is put into the pipeline as a latent, scaled and arranged as training would, must come to
    its decoder as it was.
    """
    name, size = type(pipeline).__name__, (SIZE, SIZE)
    first = seen_of(pipeline, model, ["a"], size, arguments)
    if first.image is None or first.decoded is None or not first.times:
        raise _unknown(name, "it does not run its network and decode what comes out")
    if set(first.signs) not in ({1}, {-1}):
        raise _unknown(name, "the network's answer does not reach the scheduler as it is")
    channels = pipeline.vae.config.get("latent_channels")
    if channels is not None and first.decoded.shape[1] != channels:
        raise ValueError(
            f"The network takes latents of {first.decoded.shape[1]} channels, and those of the "
            f"autoencoder have {channels}: it was trained on more (a mask, another image) than a "
            f"{name} gives it. Pass denoiser and scheduler to DenoisingObjective, and what else it "
            "takes in the data."
        )
    frames = first.decoded.ndim == 5
    if first.image.ndim not in (3, 4):
        raise _unknown(name, f"its network takes images of {first.image.ndim} axes")
    pack = packed if first.image.ndim == 3 else None
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(first.decoded.shape, generator=generator).to(first.decoded)
    encoder = LatentEncoder(_Known(pipeline.vae, z, frames), sample=False, pack=pack)
    put = encoder(torch.zeros(1, 3, *size), {})
    for latents in _forms(put.mean, first.image.shape, z):
        try:
            found = seen_of(pipeline, model, ["a"], size, arguments, latents).decoded
        except ValueError:  # it takes them in another form
            continue
        if found is None or found.shape != z.shape or not _near(found.to(z), z):
            continue
        two = seen_of(pipeline, model, ["a", "a"], size, arguments).condition
        wide = seen_of(pipeline, model, ["a"], (SIZE, 2 * SIZE), arguments).condition
        one = first.condition
        steps = int(pipeline.scheduler.config.get("num_train_timesteps", 1000))
        return Interface(
            _affine(name, first.times, steps, first.image.dtype),
            first.signs[0],
            first.names,
            first.listed,
            first.ragged,
            pack,
            frames,
            shared=[key for key in one if _is_shared(one[key], two[key])],
            of_size=[key for key in one if digest_of(one[key]) != digest_of(wide.get(key))],
        )
    raise _unknown(name, "latents are scaled or arranged in another way than by its VAE's config")


def _is_shared(one: Any, two: Any) -> bool:
    """Tell whether an entry is as long for one example as for two."""
    if isinstance(one, Tensor):
        return bool(one.shape == two.shape)
    return isinstance(one, list) and len(one) == len(two)


def _forms(latents: Tensor, shape: torch.Size, z: Tensor) -> Iterator[Tensor]:
    """The forms in which a pipeline may take latents of the form that its network takes."""
    if latents.shape != shape:
        return
    latents = latents.float()  # in which some insist to have them, whatever the network's precision
    yield latents
    if latents.ndim == 3:  # tokens as pixels with many channels
        yield latents.mT.reshape(len(latents), -1, z.shape[-2] // 2, z.shape[-1] // 2)


def _near(one: Tensor, other: Tensor) -> bool:
    """Equal, but for the rounding of a pipeline in low precision."""
    tolerance = max(1e-3, 4 * torch.finfo(other.dtype).eps)
    return float((one - other).float().norm()) <= tolerance * float(other.float().norm())


def _affine(
    name: str, times: Sequence[tuple[float, float]], steps: int, dtype: torch.dtype
) -> tuple[float, float]:
    """Factor and summand that lead from the scheduler's times to the network's."""
    # the times that are seen may be rounded to the precision of the pipeline, and so would be what
    # is measured of them: usual forms come first
    for usual, shift in ((1.0, 0.0), (1 / steps, 0.0), (-1.0, float(steps)), (-1 / steps, 1.0)):
        rounding = torch.finfo(dtype).eps * max(1.0, abs(shift))
        if all(abs(usual * c + shift - t) <= rounding * max(1.0, abs(t)) for t, c in times):
            return usual, shift
    (given, counted), *_, (given_last, counted_last) = times
    factor = (given_last - given) / (counted_last - counted)
    summand = given - factor * counted
    if any(abs(factor * c + summand - t) > 1e-3 * max(1.0, abs(t)) for t, c in times):
        raise _unknown(name, "its network is given the time in an unknown form")
    return round(factor, 9), 0.0 if abs(summand) < 1e-6 else summand


def _unknown(name: str, why: str) -> ValueError:
    return ValueError(f"The objective cannot be read off a {name}: {why}. {BY_HAND}")


# ---------------------------------------------------------------------------------------------
# Forms of latents and embeddings
# ---------------------------------------------------------------------------------------------


def packed(z: Tensor) -> Tensor:
    """Latents ``[B, C, H, W]`` as tokens of 2×2, ``[B, H W / 4, 4 C]``."""
    B, C, H, W = z.shape
    tokens = z.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(B, H * W // 4, 4 * C)


def padded(name: str, rows: Sequence[Tensor], length: int | None) -> dict[str, Tensor]:
    """Embeddings ``[L_b, E]`` as one entry ``[B, length, E]``, and their lengths."""
    lengths = [len(row) for row in rows]
    if length is None or max(lengths) > length:
        raise ValueError(f"{name} has rows of lengths {lengths}, and the longest is {length}")
    filled = [pad(row, (0, 0, 0, length - len(row))) for row in rows]
    return {name: torch.stack(filled), _length_of(name): torch.tensor(lengths)}


def _length_of(entry: str) -> str:
    """The entry of a condition with the lengths of a padded one."""
    return f"{entry}_length"


class AdaptedDenoiser(nn.Module):
    """A pipeline's network, called like any other. Its parameters are called ``transformer.…``."""

    def __init__(self, transformer: nn.Module, interface: Interface):
        super().__init__()
        self.transformer = transformer
        self._interface = interface

    @property
    def config(self) -> Any:
        """The network's."""
        return self.transformer.config

    def forward(self, sample: Tensor, timestep: Tensor, **entries: Any) -> tuple[Tensor]:
        """Denoise a batch of images; padded entries ``[B, L, E]`` stand beside their lengths."""
        own = self._interface
        for name in own.ragged:
            rows = zip(entries[name], entries.pop(_length_of(name)).tolist(), strict=True)
            entries[name] = [row[:length] for row, length in rows]
        image, time = own.names
        images = list(sample.unsqueeze(2)) if own.listed else sample
        answer = self.transformer(**{image: images, time: timestep}, **entries, return_dict=False)
        prediction: Tensor = torch.stack(answer[0]).squeeze(2) if own.listed else answer[0]
        return (own.sign * prediction,)


class Frames:
    """An autoencoder of videos, which takes images as videos of one frame."""

    def __init__(self, vae: Any):
        self._vae = vae

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def encode(self, x: Tensor) -> Any:
        """Encode images."""
        found = self._vae.encode(x.unsqueeze(2)).latent_dist
        of_frame = SimpleNamespace(mean=found.mean.squeeze(2), std=found.std.squeeze(2))
        return SimpleNamespace(latent_dist=of_frame)


class _Known:
    """A stand-in for an autoencoder, to which everything has one known latent."""

    def __init__(self, vae: Any, z: Tensor, frames: bool):
        self.config, self.bn = vae.config, getattr(vae, "bn", None)
        self._latent = z.squeeze(2) if frames else z

    def parameters(self) -> Iterator[Tensor]:
        """One, for the precision."""
        yield self._latent

    def encode(self, x: Tensor) -> Any:
        """The known latent."""
        return SimpleNamespace(latents=self._latent)
