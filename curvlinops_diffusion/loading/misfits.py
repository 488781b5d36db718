"""Weights of saved networks against the configurations beside them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from curvlinops_diffusion.loading.saved_networks import part_folder, parts_of, weights_files


def misfits(folder: Path, variant: str | None) -> list[str]:
    """Say which weights have other shapes than the configuration beside them asks for.

    Libraries name one of them, or refer to their log.

    Args:
        folder: The folder of a pipeline, or of a network.
        variant: The variant of the weights that was asked for.
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
                        other[key] = f"{_sizes(there)} in the file and {_sizes(here)} by its config"
        if other:
            key, told = next(iter(other.items()))
            more = f" ({len(other) - 1} more weights differ)" if len(other) > 1 else ""
            found.append(f"in '{part.name}', '{key}' is {told}.json{more}")
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


def _sizes(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
