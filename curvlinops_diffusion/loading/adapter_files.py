"""Single files of adapters: pairs of matrices, their scales, and differences of whole weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from curvlinops_diffusion.loading.weights import listed
from curvlinops_diffusion.runtime.checks import quoted

# how the names of the first matrix of a pair end; what comes before is called a stem here
_DOWN = (
    ".lora_down.weight",
    ".lora_A.weight",
    ".lora.down.weight",
    "_lora.down.weight",
    ".lora_linear_layer.down.weight",
)
_UP = tuple(end.replace("down", "up").replace("_A", "_B") for end in _DOWN)
_ALPHA = ".alpha"
# additions to a layer's weight and bias, by how their names end (LyCORIS: full layers and norms)
ADDITIONS = {".diff": "weight", ".diff_b": "bias", ".w_norm": "weight", ".b_norm": "bias"}
# the key under which diffusers keeps PEFT's configuration, scales and all
_CONFIGURATION = "lora_adapter_metadata"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class AdapterFile:
    """What a file of an adapter holds.

    Attributes:
        path: The file.
        given: The file or its folder, as messages call it.
        weights: Tensors of adapters by the file's names, without alphas and additions.
        alphas: The alphas by their stems.
        additions: Additions to whole weights by the file's names.
        configured: Whether the file holds PEFT's configuration, by which its loader sets scales.
    """

    path: Path
    given: Path
    weights: Tensors
    alphas: dict[str, float]
    additions: Tensors
    configured: bool

    def ranks(self) -> dict[str, int]:
        """The number of rows of each first matrix, by stem."""
        return {
            key.removesuffix(end): z.shape[0]
            for key, z in self.weights.items()
            for end in _DOWN
            if key.endswith(end)
        }

    def scale(self, stem: str) -> float:
        """The factor ``alpha / rank`` of a product; 1 where the file holds no alpha."""
        rank = self.ranks()[stem]
        return self.alphas.get(stem, rank) / rank


@dataclass(frozen=True)
class Conversion:
    """An adapter's weights by the names that a loader gives them.

    Attributes:
        tensors: The weights.
        scales: The factor of each one's product; none of a matrix of zeros.
        unplaced: Names of the file's weights that the loader leaves out.
    """

    tensors: Tensors
    scales: dict[str, float]
    unplaced: list[str]


def read_weights(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Read the tensors of a file, those of 8 bits in 32, and the strings beside them.

    Raises:
        ValueError: If it is no whole safetensors file, or holds numbers that are not finite.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {k: _widened(file.get_tensor(k)) for k in file.keys()}  # noqa: SIM118 - no mapping
            metadata = file.metadata() or {}
    except Exception as error:
        raise ValueError(
            f"The adapter '{path}' cannot be read: {quoted(error)}. It is no whole safetensors "
            "file; copy or save it again."
        ) from error
    broken = [key for key, z in tensors.items() if not bool(torch.isfinite(z).all())]
    if broken:
        raise ValueError(
            f"The adapter '{path}' holds NaN or infinite numbers in {listed(broken)}: its training "
            "diverged, or the file is damaged. Pass an earlier checkpoint."
        )
    return tensors, metadata


def _widened(z: Tensor) -> Tensor:
    """A tensor in a precision that there is arithmetic for."""
    return z.float() if z.is_floating_point() and z.itemsize == 1 else z


def read_adapter(path: Path, given: Path) -> AdapterFile:
    """Read a single file, and tell matrices, alphas and additions apart.

    Args:
        path: The file.
        given: The file or its folder, as messages call it.

    Raises:
        ValueError: If it cannot be read or is empty, or an alpha is not a positive number or
            belongs to nothing.
    """
    tensors, metadata = read_weights(path)
    additions = {k: z for k, z in tensors.items() if k.endswith(tuple(ADDITIONS))}
    found = {k.removesuffix(_ALPHA): z for k, z in tensors.items() if k.endswith(_ALPHA)}
    weights = {k: z for k, z in tensors.items() if k not in additions and not k.endswith(_ALPHA)}
    if not weights and not additions:
        raise ValueError(f"The adapter '{given}' holds no weights. Pass another file.")
    stems = {_stem(key) for key in (*weights, *additions)}
    alphas = {}
    for stem, z in found.items():
        if stem not in stems:
            raise ValueError(
                f"The adapter '{given}' holds '{stem}{_ALPHA}' and no weights of that name: they "
                "were lost. Save the file again."
            )
        if z.numel() != 1 or not math.isfinite(z.item()) or z.item() <= 0:
            raise ValueError(
                f"The adapter '{given}' holds '{stem}{_ALPHA}' = {z.tolist()}, which is read in "
                "several ways. Store the positive number alpha that the layer was trained with."
            )
        alphas[stem] = float(z.item())
    return AdapterFile(path, given, weights, alphas, additions, _CONFIGURATION in metadata)


def converted(file: AdapterFile, convert: Callable[[Tensors], Tensors]) -> Conversion:
    """Follow the weights of a file through a loader's conversion.

    Loaders rename, split and join tensors, and may drop them or their alphas in silence. Here the
    conversion is applied twice: to the weights with alphas equal to ranks (so that no factor is
    multiplied into them), and to marks in their places, which tell what each result is made of.

    Args:
        file: The file.
        convert: The loader's conversion of tensors by name.

    Raises:
        ValueError: If one pair of matrices is made of pairs with different scales.
    """
    tensors = convert({**file.weights, **unit_alphas(file), **_other_alphas(file)})
    by_number = dict(enumerate(file.weights, 1))
    marks = {key: (z != 0).float() * n for n, (key, z) in enumerate(file.weights.items(), 1)}
    seen: set[str] = set()
    kept: Tensors = {}
    scales: dict[str, float] = {}
    ranks = file.ranks()
    for key, z in convert({**marks, **unit_alphas(file)}).items():
        if key not in tensors or key.endswith(_ALPHA):
            continue
        sources = {by_number[n] for n in _whole_numbers(z, len(by_number))}
        stems = {_stem(source) for source in sources} & ranks.keys()
        factors = {file.scale(stem) for stem in stems}
        if len(factors) > 1:
            raise ValueError(
                f"The adapter '{file.given}' cannot be loaded: '{key}' is made of {listed(stems)}, "
                f"whose alphas differ ({', '.join(f'{f:g}' for f in sorted(factors))} times the "
                "product). Save it in PEFT's form, one layer at a time."
            )
        seen |= sources
        kept[key] = tensors[key]
        scales |= dict.fromkeys([key], *factors) if factors else {}
    unplaced = [key for key, z in file.weights.items() if key not in seen and bool((z != 0).any())]
    return Conversion(kept, scales, unplaced)


def _whole_numbers(z: Tensor, last: int) -> list[int]:
    """The whole numbers from 1 to the last that are among a tensor's entries, without sorting."""
    z = z.flatten()
    whole = z.clamp(0, last).int()
    whole[whole != z] = 0
    return [n for n in whole.bincount().nonzero().flatten().tolist() if n > 0]


def unit_alphas(file: AdapterFile) -> Tensors:
    """Alphas equal to ranks, for loaders that multiply kohya's into the matrices.

    Alphas of pairs by PEFT's names are left out: some loaders refuse them, and scales are set
    after loading in any case.
    """
    return {
        f"{stem}{_ALPHA}": torch.tensor(float(rank))
        for stem, rank in file.ranks().items()
        if stem in file.alphas and f"{stem}{_DOWN[0]}" in file.weights
    }


def _other_alphas(file: AdapterFile) -> Tensors:
    """Alphas of weights that are no pairs, which their converters multiply into them."""
    ranks, stems = file.ranks(), {_stem(key) for key in file.weights}
    return {
        f"{stem}{_ALPHA}": torch.tensor(alpha)
        for stem, alpha in file.alphas.items()
        if stem not in ranks and stem in stems
    }


def _stem(key: str) -> str:
    """What a tensor's name begins with: the name of its layer in the file."""
    for end in (*_DOWN, *_UP):
        if key.endswith(end):
            return key.removesuffix(end)
    base, _, last = key.rpartition(".")
    return base.rpartition(".")[0] if last in ("weight", "bias") else base


# weights that loaders may leave out, by parts of their names
_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "Tucker cores",
    "dora_scale": "DoRA magnitudes of kohya's or LyCORIS' scripts",
    ".diff": "differences of whole weights",
    "_norm": "differences of whole weights",
}


def unpaired(keys: Iterable[str]) -> list[str]:
    """The names of matrices that are missing from a file, of pairs of which it holds the other."""
    keys = set(keys)
    ends = (*zip(_DOWN, _UP, strict=True), *zip(_UP, _DOWN, strict=True))
    pairs = [k.removesuffix(one) + other for k in keys for one, other in ends if k.endswith(one)]
    return [key for key in pairs if key not in keys]


def of_other_kinds(keys: Iterable[str]) -> list[str]:
    """Those of a file's names that are of kinds that loaders may leave out."""
    return [key for key in keys if any(part in key for part in _KINDS if part != "_norm")]


def unplaced_message(path: Path, keys: Iterable[str], loader: Any) -> str:
    """Say which of a file's weights find no place, of which kind they are, and what to do."""
    keys = sorted(keys)
    kinds = dict.fromkeys(kind for key in keys for part, kind in _KINDS.items() if part in key)
    called = f" ({' and '.join(kinds)})" if kinds else ""
    return (
        f"The adapter '{path}' cannot be loaded: {len(keys)} of its weights{called} have no place "
        f"in the {type(loader).__name__}: {listed(keys)}. Pass the network that it was trained on; "
        "or if it was, merge the adapter into it with the program that trained it, save that by "
        "save_pretrained, and name what was trained by --params."
    )
