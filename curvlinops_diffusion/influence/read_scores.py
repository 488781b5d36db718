"""Scores from files of every kind, with the names that belong to them.

What a file is of is told without PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvlinops_diffusion.influence.score_files import SCORES, other_array, read_array

if TYPE_CHECKING:
    from torch import Tensor

    from curvlinops_diffusion.influence.stored_scores import StoredScores


def read_scores(path: Path) -> tuple[Tensor | StoredScores, dict[str, Any]]:
    """Read scores, ``[Q, N]``, and the names and settings that belong to them.

    Scores in several files are read as they are asked for, a query at a time.

    Raises:
        ValueError: If the file is missing, damaged, or of something else.
    """
    header, scores_QN = header_and_scores(path)
    if scores_QN is None:
        raise other_array(path)
    missing = {"queries", "train"} - header.keys()
    if "identity" in header and missing:
        raise ValueError(
            f"'{path}' has no names of images: it was written by StoredScores.create, for Python. "
            "Read it by StoredScores.open, or make scores with names by curvlinops-diffusion score."
        )
    try:
        sizes = (len(header["queries"]), len(header["train"]))
        identity = dict(header["identity"])
    except (KeyError, TypeError, ValueError) as error:
        raise SCORES.damaged(path, f"{type(error).__name__}: {error}") from error
    if tuple(scores_QN.shape) != sizes:
        raise SCORES.damaged(path, f"{tuple(scores_QN.shape)} scores for {sizes} names")
    return scores_QN, {**header, "identity": identity}


def whole(scores: Tensor | StoredScores) -> Tensor:
    """All of them, ``[Q, N]``."""
    return scores.whole() if hasattr(scores, "whole") else scores


def header_and_scores(path: Path) -> tuple[dict[str, Any], Tensor | StoredScores | None]:
    """Header and scores; no scores where they are not those that the header is of.

    Raises:
        ValueError: If the file is missing, damaged, or of something else.
    """
    import torch

    described = None if path.suffix == ".npy" else SCORES.read_header(path)
    if isinstance(described, dict) and "shards" in described:
        from curvlinops_diffusion.influence.stored_scores import StoredScores

        stored = StoredScores.open(path)
        return stored.header, stored
    if path.suffix != ".npy":
        header, tensors = SCORES.read(path)
        if not isinstance(header, dict):
            raise SCORES.damaged(path, f"it is of type {type(header).__name__}")
        return header, tensors.get("scores", torch.empty(0))
    header, array = read_array(path)
    return header, None if array is None else torch.from_numpy(array)
