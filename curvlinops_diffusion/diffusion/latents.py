"""From what users have (images, prompts) to what the network sees (latents, embeddings)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.conditions import leaves, nested
from curvlinops_diffusion.runtime.digests import digest_of, fingerprint, raw_bytes
from curvlinops_diffusion.runtime.files import FileKind, make_folder

LATENTS = FileKind("condition", "the latents' cache", "Delete it; it will be written again.")


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


class LatentEncoder:
    r"""An autoencoder before the diffusion, and the embedding of a condition beside it.

    With the autoencoder's mean ``m`` and standard deviation ``s`` of an image's latent::

        x0 = (m + s · η − shift_factor) · scaling_factor

    Args:
        vae: An ``AutoencoderKL`` or ``VQModel`` of ``diffusers``, or ``None`` to leave the images
            as they are.
        sample: Whether ``η`` is drawn, like noise, for each example and draw; else it is zero.
        embed: Maps images and condition to the condition that the network takes, for instance
            prompts to their embeddings.
        pack: Maps latents to the form that the network takes.
        cache: A folder for what is computed: one file for each batch, named by a digest of the
            batch and the encoders' weights. So a second pass, and a second program, encode nothing.
        encoders: The modules that ``embed`` runs, for the digest.

    Raises:
        ValueError: If the autoencoder is of no known kind.
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
    ):
        if vae is not None and not (hasattr(vae, "encode") and hasattr(vae, "config")):
            raise ValueError(
                f"The autoencoder arrived as {type(vae).__name__}. Pass an AutoencoderKL or a "
                "VQModel of diffusers, or None."
            )
        self._vae = vae
        self._sample = sample
        self._embed = embed
        self._pack = (lambda z: z) if pack is None else pack
        self._cache = None if cache is None else Path(cache)
        self._modules = [m for m in (vae, *encoders) if m is not None]
        self._weights: list[dict[str, str]] | None = None

    @property
    def description(self) -> str:
        """A digest of what the latents and embeddings depend on besides the data."""
        return digest_of(self._fingerprints(), self._sample, self._embed, self._pack)

    @torch.no_grad()
    def __call__(self, x0: Tensor, condition: dict[str, Any]) -> Encoded:
        """Encode a batch of clean examples, or read it from the cache.

        Raises:
            ValueError: If the cache cannot be written to, or a file in it is damaged.
        """
        if self._cache is None:
            return self._encode(x0, condition)
        path = self._cache / f"{self._digest(x0, condition)}.safetensors"
        if path.exists():
            return _read(path)
        encoded = self._encode(x0, condition)
        make_folder(self._cache)
        _write(path, encoded)
        return encoded

    def _encode(self, x0: Tensor, condition: dict[str, Any]) -> Encoded:
        condition = condition if self._embed is None else self._embed(x0, condition)
        if self._vae is None:
            return Encoded(self._pack(x0), None, condition)
        parameter = next(self._vae.parameters())
        output = self._vae.encode(x0.to(parameter))
        if hasattr(output, "latent_dist"):
            mean, std = output.latent_dist.mean, output.latent_dist.std
        else:  # a VQModel has no distribution
            mean, std = output.latents, None
        config = self._vae.config
        scale = config.get("scaling_factor") or 1.0
        mean = (mean - (config.get("shift_factor") or 0.0)) * scale
        std = None if std is None or not self._sample else self._pack(std * scale)
        return Encoded(self._pack(mean), std, condition)

    def _fingerprints(self) -> list[dict[str, str]]:
        """The encoders' fingerprints, computed once."""
        if self._weights is None:
            self._weights = [fingerprint(module) for module in self._modules]
        return self._weights

    def _digest(self, x0: Tensor, condition: dict[str, Any]) -> str:
        digest = sha256(json.dumps([self._fingerprints(), self._sample, str(x0.dtype)]).encode())
        for name, value in [("x0", x0), *leaves(condition)]:
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(str((value.dtype, tuple(value.shape))).encode())
                digest.update(raw_bytes(value))
            else:
                digest.update(json.dumps(value).encode())
        return digest.hexdigest()


def _write(path: Path, encoded: Encoded) -> None:
    tensors = {"mean": encoded.mean}
    if encoded.std is not None:
        tensors["std"] = encoded.std
    plain = {}
    for name, value in leaves(encoded.condition):
        if isinstance(value, Tensor):
            tensors[f"condition/{name}"] = value
        else:
            plain[name] = value
    LATENTS.write(path, tensors, plain)


def _read(path: Path) -> Encoded:
    plain, tensors = LATENTS.read(path)
    if "mean" not in tensors or not isinstance(plain, dict):
        raise LATENTS.damaged(path, "there are no latents")
    mean = tensors.pop("mean")
    std = tensors.pop("std", None)
    plain |= {name.removeprefix("condition/"): tensor for name, tensor in tensors.items()}
    return Encoded(mean, std, nested(plain))
