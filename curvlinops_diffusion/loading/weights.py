"""Weights of saved networks: all of them loaded, or what is missing or of another shape named."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import is_accelerate_available
from safetensors import safe_open
from torch import nn

from curvlinops_diffusion.loading.saved_networks import part_folder, parts_of, weights_files
from curvlinops_diffusion.runtime.adapters import adapter_of


def check_loaded(module: nn.Module, folder: Path, variant: str | None) -> None:
    """Check that a module has the weights of the files in its folder, or of a single file.

    Libraries leave parameters that no file holds without values, or make values up.

    Raises:
        ValueError: If a parameter was not loaded, naming what the files hold instead.
    """
    missing = {name for name, p in module.named_parameters() if p.is_meta}
    stored: set[str] = set()
    for path in weights_files(folder, variant):  # of a single file none: its names are others
        with safe_open(path, "np") as file:
            stored |= set(file.keys())
    if stored and type(module).__module__.startswith("transformers."):  # which makes them up
        # of two names of one parameter a file holds one
        every = dict(module.named_parameters(remove_duplicate=False))
        found = {id(p) for name, p in every.items() if _is_among(name, stored)}
        missing |= {name for name, p in module.named_parameters() if id(p) not in found}
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


def _is_among(name: str, others: set[str]) -> bool:
    """Tell whether a name is one of others, but for a prefix of either (of a part of a model)."""
    parts = name.split(".")
    endings = (".".join(parts[n:]) for n in range(max(len(parts) - 1, 1)))
    return any(end in others for end in endings) or any(o.endswith(f".{name}") for o in others)


def check_can_load() -> None:
    """Check that accelerate is there, without which diffusers leaves weights uninitialised."""
    if not is_accelerate_available():
        raise ValueError(
            "The package accelerate is missing, without which weights that no file holds would "
            "stay uninitialised, unnoticed: pip install 'curvlinops-diffusion[cli]'."
        )


def misfits(folder: Path, variant: str | None) -> list[str]:
    """Say which weights have other shapes than the configuration beside them asks for.

    Libraries name one of them, or refer to their log.
    """
    found = []
    for part, shapes in _expected_shapes(folder):
        other = {}
        for path in weights_files(part, variant):
            with safe_open(path, "np") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    endings = (key.split(".", n)[n] for n in range(key.count(".") + 1))
                    here = next((shapes[end] for end in endings if end in shapes), None)
                    there = tuple(file.get_slice(key).get_shape())
                    if here is not None and here != there:
                        sizes = ["×".join(map(str, shape)) for shape in (there, here)]
                        other[key] = f"{sizes[0]} in the file and {sizes[1]} by its config.json"
        if other:
            key, difference = next(iter(other.items()))
            more = f" ({len(other) - 1} more weights differ)" if len(other) > 1 else ""
            found.append(f"in '{part.name}', '{key}' is {difference}{more}")
    return found


def _expected_shapes(folder: Path) -> Iterator[tuple[Path, dict[str, tuple[int, ...]]]]:
    """The shapes of a network's tensors by its configuration, without memory for them."""
    kinds = [(folder, "diffusers", "")]
    if (folder / "model_index.json").is_file():
        kinds = [(part_folder(folder, n), *kind) for n, kind in parts_of(folder).items() if kind]
    for part, library, name in kinds:
        try:
            config = json.loads((part / "config.json").read_text())
            cls: Any = getattr(sys.modules[library], name or config["_class_name"])
            with torch.device("meta"):
                if library == "diffusers":
                    module = cls.from_config(config)
                else:
                    module = cls(cls.config_class.from_pretrained(str(part)))
            yield part, {key: tuple(z.shape) for key, z in module.state_dict().items()}
        except Exception:  # whatever it is, it is not the shapes
            continue


def listed(names: Iterable[str]) -> str:
    """The first three of some names, for messages."""
    names = sorted(names)
    return ", ".join(f"'{name}'" for name in names[:3]) + (", …" if len(names) > 3 else "")
