"""The format and the header of an operator's file, read without PyTorch."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from math import prod
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvlinops_diffusion.runtime.files import FileKind

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "curvlinops_diffusion.operator"
OPERATOR = FileKind(
    FORMAT, "an operator of curvlinops_diffusion", "Pass one that operator.save(path) wrote."
)


def read_header(path: str | PathLike[str]) -> dict[str, Any]:
    """Read the header alone: kind, parameters, blocks, how it was made."""
    return _checked(Path(path), OPERATOR.read_header(Path(path)))


def read_file(
    path: Path, wanted: Container[str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an operator's header, and its tensors, or those of wanted names.

    Raises:
        ValueError: If the file is missing, truncated, foreign or of another format.
    """
    header, tensors = OPERATOR.read(path, wanted)
    return _checked(path, header), tensors


def _checked(path: Path, header: Any) -> dict[str, Any]:
    with damaged_if_malformed(path):
        complete = header.keys() >= {"kind", "parameters", "dtype", "blocks", "info"}
    if not complete:
        raise OPERATOR.damaged(path, "entries are missing")
    return dict(header)


@contextmanager
def damaged_if_malformed(path: Path) -> Iterator[None]:
    """Report a file as damaged if its header is not made as expected."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError) as error:
        raise OPERATOR.damaged(path, f"{type(error).__name__}: {error}") from error


def block_rows(header: dict[str, Any]) -> list[dict[str, Any]]:
    """List of each block its ``name``, its ``kind`` and the entries of its ``parameters``."""
    sizes = {name: prod(shape) for name, shape in header["parameters"]}
    return [
        {
            "name": block["name"],
            "kind": block["type"],
            "parameters": sum(sizes[name] for name in block["params"]),
        }
        for block in header["blocks"]
    ]
