"""The folder of a saved pipeline or network: whether its parts are there, and fit each other."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from curvlinops_diffusion.cli.weights import listed
from curvlinops_diffusion.runtime.messages import quoted

_AGAIN = "Copy the whole folder that save_pretrained wrote"
# what tokenizers keep their words in
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")


def check_folder(folder: Path, index: str) -> None:
    """Check that a folder is one of save_pretrained.

    Args:
        folder: The folder.
        index: The file that it must hold.

    Raises:
        ValueError: If it is not.
    """
    if folder.is_file():
        raise ValueError(
            f"'{folder}' is a file. Pass a folder that was written by save_pretrained: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER) makes one of a "
            "single file, and adapters are passed by --lora."
        )
    if (folder / index).is_file():
        return
    instead = ""
    if (folder / "config.json").is_file():
        instead = f" '{folder}' is a network alone: pass it by --model."
    elif (folder / "model_index.json").is_file():
        instead = f" '{folder}' is a pipeline: pass it by --pipeline."
    raise ValueError(
        f"'{folder}' holds no {index}. Pass a folder on this machine that was written by "
        f"save_pretrained; nothing is downloaded.{instead}"
    )


def parts_of(folder: Path) -> dict[str, tuple[str | None, str | None]]:
    """The library and class of each part that a pipeline's index names.

    Raises:
        ValueError: If the index is not understood.
    """
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text())
        if not isinstance(index, dict):
            raise TypeError(f"it holds a {type(index).__name__}")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"'{path}' is no index of a pipeline ({quoted(error)}). {_AGAIN}.") from (
            error
        )
    return {
        name: (kind[0], kind[1])
        for name, kind in index.items()
        if isinstance(kind, list) and len(kind) == 2 and not name.startswith("_")
    }


def check_parts(folder: Path) -> None:
    """Check that a pipeline's folder holds the parts that its index names.

    Loaded without its words, a tokenizer makes every prompt the same, in silence.

    Raises:
        ValueError: If a part is missing, a tokenizer's words are, or a file is damaged.
    """
    parts = {name: cls for name, (_, cls) in parts_of(folder).items() if cls is not None}
    missing = [name for name in parts if not (folder / name).is_dir()]
    if missing:
        raise ValueError(
            f"'{folder}' holds no folder {listed(missing)}, which its model_index.json names. "
            f"{_AGAIN}."
        )
    for name, cls in parts.items():
        if "ByT5" in cls:  # its words are bytes
            continue
        if "Tokenizer" in cls and not any(any((folder / name).glob(v)) for v in _VOCABULARIES):
            raise ValueError(
                f"The tokenizer in '{folder / name}' has no vocabulary (tokenizer.json, vocab.json "
                f"or another). {_AGAIN}."
            )
    for name in parts:
        check_files(folder / name, folder)


def check_files(folder: Path, given: Path) -> None:
    """Check that the files of a network's weights are whole.

    Args:
        folder: The network's folder.
        given: It or its pipeline's, as messages call it.

    Raises:
        ValueError: If one is not.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "np"):
                pass
        except Exception as error:
            raise ValueError(
                f"'{given}' cannot be loaded: '{path}' is no whole safetensors file "
                f"({quoted(error)}). Copy it again."
            ) from error


def misfits(folder: Path) -> list[str]:
    """Say which weights have other shapes than the configuration beside them asks for.

    Libraries name one of them, or refer to their log.

    Args:
        folder: The folder of a pipeline, or of a network.
    """
    found = []
    for part, shapes in _expected_shapes(folder):
        other = {}
        for path in sorted(part.glob("*.safetensors")):
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
    kinds: dict[Path, tuple[str | None, str | None]] = {folder: ("diffusers", None)}
    if (folder / "model_index.json").is_file():
        kinds = {folder / name: kind for name, kind in parts_of(folder).items()}
    for part, (library, name) in kinds.items():
        try:
            config = json.loads((part / "config.json").read_text())
            cls: Any = getattr(sys.modules[library or ""], name or config["_class_name"])
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
