"""Weights that were loaded: all of them, or an error that names what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from diffusers.utils import is_accelerate_available
from safetensors import safe_open
from torch import nn

from curvlinops_diffusion.loading.saved_networks import weights_files
from curvlinops_diffusion.runtime.adapters import adapter_of


def check_loaded(module: nn.Module, folder: Path, variant: str | None) -> None:
    """Check that a module has the weights of the files in its folder.

    What loads them leaves parameters that no file holds without values, or makes them up.

    Args:
        module: The module, before it is moved.
        folder: The folder that it was loaded from.
        variant: The variant of the weights that was asked for.

    Raises:
        ValueError: If a parameter was not loaded, naming what the files hold instead.
    """
    missing = {name for name, p in module.named_parameters() if p.is_meta}
    stored = _stored(weights_files(folder, variant))
    if stored and type(module).__module__.startswith("transformers."):  # which makes them up
        missing |= _without_file(module, stored)
    if not missing:
        return
    own = set(module.state_dict())
    others = sorted(name for name in stored if not _is_among(name, own))
    instead = f", which hold {listed(others)} instead" if others else ""
    advice = "Save the network again by save_pretrained."
    if any(".base_layer." in name or adapter_of(name) is not None for name in others):
        advice = (
            "The network was saved with adapters in place. Save it without them (unload_lora), and "
            "the adapters by save_lora_weights, for --lora."
        )
    raise ValueError(
        f"{len(missing)} weights of the {type(module).__name__} are not in the files of "
        f"'{folder}'{instead}: {listed(missing)}. {advice}"
    )


def check_can_load() -> None:
    """Check that diffusers will tell which weights no file holds.

    Raises:
        ValueError: If a package is missing without which it leaves them as they are in memory.
    """
    if not is_accelerate_available():
        raise ValueError(
            "The package accelerate is missing, without which weights that no file holds would "
            "stay uninitialised, untold: pip install 'curvlinops-diffusion[cli]'."
        )


def _stored(files: Iterable[Path]) -> set[str]:
    """The names of the tensors in files."""
    names: set[str] = set()
    for path in files:
        with safe_open(path, "np") as file:
            names |= set(file.keys())
    return names


def _without_file(module: nn.Module, stored: set[str]) -> set[str]:
    """The parameters that no file holds, but for those that share their values with one."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found = {id(p) for name, p in parameters.items() if _is_among(name, stored)}
    return {name for name, p in module.named_parameters() if id(p) not in found}


def _is_among(name: str, others: set[str]) -> bool:
    """Whether a name is one of others, but for a prefix of either (that of a part of a model)."""
    if name in others or any(part in others for part in _endings(name)):
        return True
    return any(other.endswith(f".{name}") for other in others)


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[n:]) for n in range(1, len(parts) - 1)]


def listed(names: Iterable[str]) -> str:
    """The first three of some names, for messages."""
    names = sorted(names)
    return ", ".join(f"'{name}'" for name in names[:3]) + (", …" if len(names) > 3 else "")
