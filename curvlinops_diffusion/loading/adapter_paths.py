"""The files of an adapter that a path names, found and checked without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from curvlinops_diffusion.loading.saved_networks import check_whole

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
_PEFT = "adapter_config.json"
_DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
ACCEPTED = (
    "Pass a .safetensors file of diffusers' save_lora_weights or of kohya's scripts, or a folder "
    "of one of these or of PEFT's save_pretrained"
)


def check_adapter(path: Path, parts: Sequence[str]) -> None:
    """Check that the files of an adapter that would be read are there and whole.

    Args:
        path: Its file or folder.
        parts: The names of the pipeline's parts.

    Raises:
        ValueError: If they are not.
    """
    folders = peft_folders(path, parts).values()
    for file in [folder / PEFT_WEIGHTS for folder in folders] or [weights_file(path)]:
        check_whole(file)


def peft_folders(path: Path, parts: Sequence[str]) -> dict[str, Path]:
    """The folders that PEFT's ``save_pretrained`` wrote, by part; none if it wrote none.

    Args:
        path: The folder of the first part's adapter, or one with a folder for each part.
        parts: The names of the pipeline's parts.

    Raises:
        ValueError: If one lacks its weights.
    """
    if path.name == PEFT_WEIGHTS and path.is_file():  # the scales stand beside it
        path = path.parent
    found = {part: path / part for part in parts if (path / part / _PEFT).is_file()}
    if (path / _PEFT).is_file():
        found = {parts[0]: path}
    for folder in found.values():
        if not (folder / PEFT_WEIGHTS).is_file():
            raise ValueError(f"'{folder}' holds {_PEFT} and no {PEFT_WEIGHTS}. {ACCEPTED}.")
    return found


def weights_file(path: Path) -> Path:
    """The single file that a path names.

    Raises:
        ValueError: If there is none, or several, or its scales stand in a file that is missing.
    """
    file = path if path.is_file() else path / PEFT_WEIGHTS
    # other programs call files the same
    if file.name == PEFT_WEIGHTS and file.is_file() and _is_pefts(file):
        raise ValueError(
            f"The adapter '{path}' is PEFT's without its {_PEFT}, which holds the scale. Pass the "
            "folder that save_pretrained wrote."
        )
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"The adapter '{path}' is no .safetensors file. {ACCEPTED}.")
        return path
    if (path / _DIFFUSERS_WEIGHTS).is_file():
        return path / _DIFFUSERS_WEIGHTS
    files = [f for f in sorted(path.glob("*.safetensors")) if f.name[0] != "."]
    if len(files) == 1:
        return files[0]
    some = ", ".join(f"'{f.name}'" for f in files[:3]) + ", …" * (len(files) > 3)
    there = f"{len(files)} .safetensors files ({some})" if files else "none"
    raise ValueError(
        f"'{path}' should hold the weights of one adapter, and holds {there}. {ACCEPTED}."
    )


def _is_pefts(file: Path) -> bool:
    return any(name.startswith(PEFT_PREFIX) for name in check_whole(file))
