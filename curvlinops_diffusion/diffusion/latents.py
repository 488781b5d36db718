"""From what users have (images, prompts) to what the network sees (latents, embeddings)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.batch import leaves
from curvlinops_diffusion.runtime.digests import Named, change_marks, digest_of, fingerprint
from curvlinops_diffusion.runtime.files import FileKind, make_folder

_LATENTS = FileKind("condition", "the latents' cache", "Delete it; it will be written again.")


@dataclass(frozen=True)
class Encoded:
    """Clean examples in the network's terms, ``x0 = mean + std · η`` with ``η ~ N(0, I)``.

    Attributes:
        mean: Means, shape ``[B, ...]``.
        std: Standard deviations; ``None`` for zero.
        condition: Keyword arguments of the network.
    """

    mean: Tensor
    std: Tensor | None
    condition: dict[str, Any]


@dataclass(frozen=True)
class Packing:
    """An arrangement of latents for the network."""

    shape: tuple[int, ...]  # of an example's latents before, channels first
    pack: Callable[[Tensor], Tensor]  # of latents ``[B, *shape]``


def check_encoded(encoded: Any) -> None:
    """Check what ``encode`` returns."""
    wrong = f"a {type(encoded).__name__}"
    if all(hasattr(encoded, name) for name in ("mean", "std", "condition")):
        mean, std = encoded.mean, encoded.std
        if isinstance(mean, Tensor) and (std is None or isinstance(std, Tensor)):
            return
        wrong = f"mean of type {type(mean).__name__} and std of type {type(std).__name__}"
    raise ValueError(
        "`encode` must return curvlinops_diffusion.Encoded(mean, std, condition), with tensors "
        f"(std=None for data that is not drawn), got {wrong}."
    )


class LatentEncoder:
    r"""An autoencoder before the diffusion, and the embedding of a condition beside it.

    With the autoencoder's mean ``m`` and standard deviation ``s`` of an image's latent::

        x0 = (m + s · η − shift_factor) · scaling_factor

    or, if its config has them, with the channels' ``latents_mean`` in place of the shift and the
    scaling divided by ``latents_std``; or, if it has a batch norm (Flux.2), standardised by its
    running statistics, which are of the channels of 2×2 latents.

    Args:
        vae: An ``AutoencoderKL`` or ``VQModel`` of ``diffusers``, or ``None`` to leave the images
            as they are.
        sample: Whether ``η`` is drawn, like noise, for each example and draw; else it is zero.
        embed: Maps images and condition to the condition that the network takes, for instance
            prompts to their embeddings.
        pack: Maps latents to the form that the network takes.
        cache: A folder for what is computed: one file for each batch, named by a digest of the
            batch, the encoders' weights and settings, and names and enclosed values of ``embed``
            and ``pack``, as these are at the first batch. So a second pass, and a second program,
            encode nothing.
        encoders: The modules that ``embed`` runs, for the digest; those that it encloses are found.
        settings: What else ``embed`` depends on (a tokenizer's length, say), as plain values.

    Raises:
        ValueError: If the autoencoder is of no known kind, or in a precision that it does not work
            in.
    """

    def __init__(
        self,
        vae: Any = None,
        *,
        sample: bool = True,
        embed: Callable[[Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        pack: Callable[[Tensor], Tensor] | None = None,
        cache: str | PathLike[str] | None = None,
        encoders: Sequence[nn.Module] = (),
        settings: Any = None,
    ):
        if vae is not None and not (hasattr(vae, "encode") and hasattr(vae, "config")):
            raise ValueError(
                "The autoencoder must be an AutoencoderKL or a VQModel of diffusers, or None, got "
                f"{type(vae).__name__}."
            )
        upcast = vae is not None and vae.config.get("force_upcast")
        if upcast and next(vae.parameters()).dtype == torch.float16:
            raise ValueError(
                "The autoencoder is in float16, and its config says force_upcast: its latents "
                "would overflow. Pass it in float32: pipeline.vae.to(torch.float32)."
            )
        self._vae = vae
        self._sample = sample
        self._embed = embed
        self._pack = pack
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # of latents, by the images'
        self._cache = None if cache is None else Path(cache)
        self._modules = [m for m in (vae, *encoders) if m is not None]
        self._settings = settings
        self._known: tuple[Any, list[dict[str, str]]] | None = None

    @property
    def description(self) -> str:
        """The digest of what latents and embeddings depend on besides the data."""
        return digest_of(self._made_of())

    def _made_of(self) -> list[Any]:
        functions = [name.first for name in self._functions]
        return [self._fingerprints(), self._sample, *functions, self._transform(), self._settings]

    @cached_property
    def _functions(self) -> list[Named]:
        return [Named(function) for function in (self._embed, self._pack)]

    @torch.no_grad()
    def __call__(self, x0: Tensor, condition: dict[str, Any]) -> Encoded:
        """Encode a batch of clean examples, or read it from the cache.

        Raises:
            ValueError: If the cache cannot be written to, or a file in it is damaged.
        """
        if self._cache is None:
            _ = self._functions  # before they are called
            return self._encode(x0, condition)
        path = self._cache / f"{digest_of(self._made_of(), x0, condition)}.safetensors"
        if path.exists():
            return _read(path)
        encoded = self._encode(x0, condition)
        make_folder(self._cache)
        _write(path, encoded)
        return encoded

    @torch.no_grad()
    def encode_drawn(
        self, x0: Tensor, condition: dict[str, Any], latents: Encoded | None = None
    ) -> Encoded:
        """Encode a batch that one draw alone sees, of which the cache would keep one for each."""
        _ = self._functions  # before they are called
        logger = logging.getLogger("diffusers")
        level = logger.level
        logger.setLevel(logging.ERROR)  # not again for each draw that captions are too long
        try:
            return self._encode(x0, condition, latents)
        finally:
            logger.setLevel(level)

    def _encode(
        self, x0: Tensor, condition: dict[str, Any], latents: Encoded | None = None
    ) -> Encoded:
        condition = condition if self._embed is None else self._embed(x0, condition)
        if latents is not None:
            return Encoded(latents.mean, latents.std, condition)
        pack = self._pack or (lambda z: z)
        if self._vae is None:
            return Encoded(pack(x0), None, condition)
        mean, std = self._latents(x0)
        shift, scale = self._shift_and_scale(mean)
        std = None if std is None or not self._sample else pack(std * scale)
        return Encoded(pack((mean - shift) * scale), std, condition)

    def _latents(self, x0: Tensor) -> tuple[Any, Any]:
        """Mean and deviation of the images' latents, the deviation ``None`` for none."""
        output = self._vae.encode(x0.to(next(self._vae.parameters())))
        if hasattr(output, "latent_dist"):
            mean, std = output.latent_dist.mean, output.latent_dist.std
        else:  # a VQModel has no distribution, nor an AutoencoderDC
            mean, std = getattr(output, "latents", getattr(output, "latent", None)), None
        self._shapes[tuple(x0.shape[1:])] = tuple(mean.shape[1:])
        return mean, std

    @torch.no_grad()
    def packing(self, x0: Tensor) -> Packing | None:
        """The arrangement of the latents of images ``[B, ...]``; ``None`` where it is theirs."""
        if self._pack is None:
            return None
        shape = tuple(x0.shape[1:])
        if self._vae is not None and shape not in self._shapes:  # they were read from the cache
            self._latents(torch.zeros(1, *shape))
        return Packing(shape if self._vae is None else self._shapes[shape], self._pack)

    def _transform(self) -> dict[str, Any]:
        """The entries of the autoencoder's config that determine shift and scale."""
        keys = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
        config = {} if self._vae is None else self._vae.config
        return {key: config.get(key) for key in keys if config.get(key) is not None}

    def _shift_and_scale(self, latents: Tensor) -> tuple[Any, Any]:
        """Shift and scale of latents ``[B, C, ...]``: ``(z - shift) * scale``."""
        found = self._transform()
        norm = getattr(self._vae, "bn", None)
        eps = self._vae.config.get("batch_norm_eps")
        if norm is not None and eps is not None:  # of the channels of 2×2 latents
            _, C, H, W = latents.shape
            statistics = (norm.running_mean, (norm.running_var + eps).sqrt())
            mean, std = (
                values.to(latents).reshape(1, C, 2, 2).repeat(1, 1, H // 2, W // 2)
                for values in statistics
            )
            return mean, 1 / std
        shift, scale = found.get("shift_factor", 0.0), found.get("scaling_factor") or 1.0

        def of_channels(key: str) -> Tensor:
            values = torch.as_tensor(found[key]).to(latents)
            return values.reshape(1, -1, *[1] * (latents.ndim - 2))

        if "latents_mean" in found and shift:
            raise ValueError(
                f"The autoencoder's config has shift_factor={shift} and latents_mean. Keep the one "
                "that the network was trained with."
            )
        if "latents_mean" in found:
            shift = of_channels("latents_mean")
        if "latents_std" in found:
            scale = scale / of_channels("latents_std")
        return shift, scale

    def _fingerprints(self) -> list[dict[str, str]]:
        """The encoders' fingerprints, computed until one of them is changed."""
        enclosed = [module for name in self._functions for module in name.networks]
        modules = list(dict.fromkeys([*self._modules, *enclosed]))
        now = [change_marks(module) for module in modules]
        if self._known is None or self._known[0] != now:
            self._known = now, [fingerprint(module) for module in modules]
        return self._known[1]


def _write(path: Path, encoded: Encoded) -> None:
    entries = dict(leaves(encoded.condition))
    tensors = {f"condition/{k}": z for k, z in entries.items() if isinstance(z, Tensor)}
    tensors["mean"] = encoded.mean
    if encoded.std is not None:
        tensors["std"] = encoded.std
    plain = {k: value for k, value in entries.items() if not isinstance(value, Tensor)}
    _LATENTS.write(path, tensors, plain)


def _read(path: Path) -> Encoded:
    plain, tensors = _LATENTS.read(path)
    if "mean" not in tensors or not isinstance(plain, dict):
        raise _LATENTS.damaged(path, "there are no latents")
    mean, std = tensors.pop("mean"), tensors.pop("std", None)
    condition: dict[str, Any] = {}
    named = {name.removeprefix("condition/"): tensor for name, tensor in tensors.items()}
    for name, value in (plain | named).items():
        *outer, last = name.split("/")
        inner = condition
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return Encoded(mean, std, condition)
