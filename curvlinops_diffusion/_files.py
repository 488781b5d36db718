"""Files that are never half-written, and digests of models."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Digests of a model's parameters and buffers: of their names and shapes, and of their values.

    Args:
        model: The model.

    Returns:
        Hexadecimal digests under ``'structure'`` and ``'weights'``.
    """
    structure, weights = sha256(), sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        structure.update(f"{name}:{tuple(tensor.shape)};".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        weights.update(raw.numpy().tobytes())
    return {"structure": structure.hexdigest(), "weights": weights.hexdigest()}


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under another name in the same folder, then rename it.

    Raises:
        ValueError: If it cannot be written; an older file of that name is unchanged.
    """
    _written(path, lambda temporary: save_file(tensors, temporary, metadata))


def write_bytes(path: Path, contents: bytes) -> None:
    """Write any file in the same way.

    Raises:
        ValueError: If it cannot be written; an older file of that name is unchanged.
    """
    _written(path, lambda temporary: Path(temporary).write_bytes(contents))


def _written(path: Path, write: Callable[[str], object]) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"The folder '{path.parent}' does not exist. Create it first.")
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder. Pass the name of a file.")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ValueError(f"'{path.parent}' cannot be written to: {error}.") from error
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())  # the name must not appear before the contents
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"'{path}' could not be written: {error}. An older file of that name is unchanged."
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder where there is none.

    Raises:
        ValueError: If that is not possible.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"The folder '{path}' cannot be made: {error}. Pass another one."
        ) from error


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, which the safetensors format refuses."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        if not whole or tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def _umask() -> int:
    """The permissions that new files are denied; temporary files are made without any others'."""
    current = os.umask(0)
    os.umask(current)
    return current
