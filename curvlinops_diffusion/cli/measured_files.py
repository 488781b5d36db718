"""Files of what was measured under retrained networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from curvlinops_diffusion.runtime.files import FileKind

MEASURED = FileKind(
    "curvlinops_diffusion.measured",
    "measurements of retrained networks",
    "Make it by curvlinops-diffusion validate measure.",
)


def read_measured(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Values ``[S, M, Q]``, and what they are of.

    Raises:
        ValueError: If the file is missing, damaged, or of something else.
    """
    header, tensors = MEASURED.read(path)
    try:
        values_SMQ, sizes = tensors["values"], (len(header["parts"]), len(header["queries"]))
    except (KeyError, TypeError) as error:
        raise MEASURED.damaged(path, f"{type(error).__name__}: {error}") from error
    if values_SMQ.ndim != 3 or tuple(values_SMQ.shape[1:]) != sizes:
        raise MEASURED.damaged(path, f"values {tuple(values_SMQ.shape)} of {sizes} names")
    return values_SMQ, header
