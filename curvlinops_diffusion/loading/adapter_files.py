"""Single files of adapters: pairs of matrices or other factors, their scales, and differences."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from curvlinops_diffusion.loading.saved_networks import check_whole
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
# factors that no loader reads; a pair of matrices beside them is of such factors as well
_FACTOR = re.compile(r"\.(hada_\w+|lokr_\w+|lora_mid\.weight|dora_scale)")
_FACTORS = {"lora_mid.weight": "lora_mid", "dora_scale": "lora_magnitude_vector"}
_HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_LOKR = [
    {f"lokr_w{n}"} if whole else {f"lokr_w{n}_a", f"lokr_w{n}_b"}
    for n in (1, 2)
    for whole in (True, False)
]
# those that make a product, each perhaps with magnitudes
_PRODUCTS = [
    *({"lora_A", "lora_B"}, {"lora_A", "lora_mid", "lora_B"}),
    *(_HADA, {*_HADA, "hada_t1", "hada_t2"}),
    *(one | two for one in _LOKR[:2] for two in (*_LOKR[2:], _LOKR[3] | {"lokr_t2"})),
]
# additions to a layer's weight and bias, by how their names end (LyCORIS: full layers and norms)
ADDITIONS = {".diff": "weight", ".diff_b": "bias", ".w_norm": "weight", ".b_norm": "bias"}
# the key under which diffusers keeps PEFT's configuration, scales and all
_CONFIGURATION = "lora_adapter_metadata"
# weights that loaders may leave out, by parts of their names
_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "on_input": "(IA)³",
    "lora_mid": "Tucker cores",
    ".diff": "differences of whole weights",
    "_norm": "differences of whole weights",
}

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class AdapterFile:
    """A file of an adapter, its tensors by what they are, by the file's names."""

    path: Path
    given: Path  # the file or its folder, as messages call it
    weights: Tensors  # that loaders read
    factors: dict[str, Tensors]  # that none reads, by stem and name
    alphas: dict[str, float]  # by stem
    additions: Tensors  # to whole weights
    configured: bool  # whether it holds PEFT's configuration, by which its loader sets scales

    def ranks(self) -> dict[str, int]:
        """The number of rows of each first matrix, by stem."""
        return {_stem(key): len(z) for key, z in self.weights.items() if key.endswith(_DOWN)}


def read_weights(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Read the tensors of a file, those of 8 bits in 32, and the strings beside them.

    Raises:
        ValueError: If it is no whole safetensors file, or holds numbers that are not finite.
    """
    check_whole(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            metadata = file.metadata() or {}
    except Exception as error:  # a precision that is not known here, say
        raise ValueError(f"The adapter '{path}' cannot be read: {quoted(error)}.") from error
    for key, z in tensors.items():
        if z.is_floating_point() and z.itemsize == 1:  # there is no arithmetic of 8 bits
            tensors[key] = z.float()
    broken = [key for key, z in tensors.items() if not bool(torch.isfinite(z).all())]
    if broken:
        raise ValueError(
            f"The adapter '{path}' holds NaN or infinite numbers in {listed(broken)}: its training "
            "diverged, or the file is damaged. Pass an earlier checkpoint."
        )
    return tensors, metadata


def read_adapter(
    path: Path, given: Path, has_no_loader: Callable[[str], bool] = lambda key: False
) -> AdapterFile:
    """Read a single file, and separate matrices, other factors, alphas and additions.

    ``given`` is the file or its folder, for messages; ``has_no_loader`` tells by its name in the
    file that no loader knows a pair.

    Raises:
        ValueError: If it cannot be read or is empty, factors are missing or unknown, or an alpha is
            not a positive number or belongs to nothing.
    """
    tensors, metadata = read_weights(path)
    additions = {k: z for k, z in tensors.items() if k.endswith(tuple(ADDITIONS))}
    weights = {k: z for k, z in tensors.items() if k not in additions and not k.endswith(_ALPHA)}
    named = set(weights) | set(additions)
    if not weights and not additions:
        raise ValueError(f"The adapter '{given}' holds no weights. Pass another file.")
    ends = (*zip(_DOWN, _UP, strict=True), *zip(_UP, _DOWN, strict=True))
    pairs = {k.removesuffix(one) + other for k in weights for one, other in ends if k.endswith(one)}
    if not pairs <= weights.keys():
        raise ValueError(
            f"The adapter '{given}' lacks {listed(pairs - weights.keys())}, of a pair of which it "
            "holds the other matrix. Save the file again."
        )
    stems = {_stem(key) for key in named}
    alphas = {}
    for key in sorted(tensors.keys() - named):
        z, stem = tensors[key], key.removesuffix(_ALPHA)
        if stem not in stems:
            raise ValueError(
                f"The adapter '{given}' holds '{key}' and no weights of that name: they were lost. "
                "Save the file again."
            )
        if z.numel() != 1 or not math.isfinite(z.item()) or z.item() <= 0:
            raise ValueError(
                f"The adapter '{given}' holds '{key}' = {z.tolist()}, which is read in several "
                "ways. Store the positive number alpha that the layer was trained with."
            )
        alphas[stem] = float(z.item())
    factors: dict[str, Tensors] = {}
    own = {_stem(key) for key in weights if _factor(key) or has_no_loader(key)}
    for key in [key for key in weights if _stem(key) in own]:
        name = _factor(key, of_pairs=True)
        if name is not None:
            factors.setdefault(_stem(key), {})[name] = weights.pop(key)
    for stem, names in factors.items():
        if names.keys() - {"lora_magnitude_vector"} not in _PRODUCTS:
            raise ValueError(
                f"The adapter '{given}' holds {listed(names)} of '{stem}', which are not the "
                "factors of one product. Save the file again."
            )
        if {"lokr_w1", "lokr_w2"} <= names.keys():  # without a rank, so that alpha means nothing
            alpha = alphas.pop(stem, 1.0)
            if _scaled_by_root(metadata):  # alpha is the rank that was asked for to the power 3/2
                alphas[stem] = alpha ** (1 / 3)
    configured = _CONFIGURATION in metadata
    return AdapterFile(path, given, weights, factors, alphas, additions, configured)


def _scaled_by_root(metadata: Mapping[str, str]) -> bool:
    """Tell whether LyCORIS, by kohya's scripts, scaled products by the root of their rank."""
    try:
        found = json.loads(metadata["ss_network_args"])["rs_lora"]
    except (KeyError, TypeError, ValueError):
        return False
    return str(found).lower() in ("true", "1", "yes", "y", "on", "t")


def _factor(key: str, of_pairs: bool = False) -> str | None:
    """The name of a factor that a tensor is; ``None`` for none that loaders do not read."""
    found = _FACTOR.fullmatch(key, len(_stem(key)))
    if found is None and of_pairs:
        return "lora_A" if key.endswith(_DOWN) else "lora_B" if key.endswith(_UP) else None
    return None if found is None else _FACTORS.get(found[1], found[1])


def converted(
    file: AdapterFile, convert: Callable[[Tensors], Tensors]
) -> tuple[Tensors, dict[str, float], list[str]]:
    """Follow the weights of a file through a loader's conversion.

    Loaders rename, split and join tensors, and may drop them or their alphas in silence. Here the
    conversion is applied twice: to the weights with alphas equal to ranks (so that no factor is
    multiplied into them), and to marks in their places, which say what each result is made of.

    Returns:
        The weights by the loader's names; the factor ``alpha / rank`` of each one's product, but
        for matrices of zeros; and the names of the file's weights that the loader leaves out.

    Raises:
        ValueError: If one pair of matrices is made of pairs with different scales.
    """
    ranks = file.ranks()
    # by kohya's names alone: some loaders refuse alphas beside PEFT's
    unit = {
        f"{stem}{_ALPHA}": torch.tensor(float(rank))
        for stem, rank in ranks.items()
        if stem in file.alphas and f"{stem}{_DOWN[0]}" in file.weights
    }
    tensors = convert({**file.weights, **unit})
    by_number = dict(enumerate(file.weights, 1))
    marks = {key: (z != 0).float() * n for n, (key, z) in enumerate(file.weights.items(), 1)}
    seen: set[str] = set()
    kept: Tensors = {}
    scales: dict[str, float] = {}
    for key, z in convert({**marks, **unit}).items():
        if key not in tensors or key.endswith(_ALPHA):
            continue
        whole = z.flatten().clamp(0, len(by_number)).int()  # counted, which needs no sorting
        whole[whole != z.flatten()] = 0
        sources = {by_number[n] for n in whole.bincount().nonzero().flatten().tolist() if n}
        paired = {_stem(source) for source in sources} & ranks.keys()
        factors = {file.alphas.get(stem, ranks[stem]) / ranks[stem] for stem in paired}
        if len(factors) > 1:
            raise ValueError(
                f"'{key}' is made of {listed(paired)}, whose alphas differ "
                f"({', '.join(f'{f:g}' for f in sorted(factors))} times the product). Save it in "
                "PEFT's form, one layer at a time"
            )
        seen |= sources
        kept[key] = tensors[key]
        scales |= dict.fromkeys([key], *factors) if factors else {}
    unplaced = [key for key, z in file.weights.items() if key not in seen and bool((z != 0).any())]
    return kept, scales, unplaced


def _stem(key: str) -> str:
    """The beginning of a tensor's name: the name of its layer in the file."""
    for end in (*_DOWN, *_UP):
        if key.endswith(end):
            return key.removesuffix(end)
    base, _, last = key.rpartition(".")
    return base.rpartition(".")[0] if last in ("weight", "bias") else base


def of_other_kinds(keys: Iterable[str]) -> list[str]:
    """Names in a file whose kinds loaders may leave out."""
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
