"""Files of scores: which training image scores how much for which query."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from curvlinops_diffusion.influence.score_files import (
    HALVES,
    SCORES,
    other_array,
    read_array,
    shards_of,
    write_array,
)

if TYPE_CHECKING:  # to say what a file is of, PyTorch need not be imported
    from torch import Tensor

    from curvlinops_diffusion.influence.stored_scores import StoredScores


def agreement(header: dict[str, Any], q: int | None = None) -> tuple[float, float | None] | None:
    """How far two halves of the draws agree, for a query or in the median over all.

    Returns:
        How many of the largest scores both have, and their rank correlation (``None`` if it is
        undefined); ``None`` where there are no halves.
    """
    if "top_shared" not in header:
        return None
    chosen = slice(None) if q is None else slice(q, q + 1)
    known = [r for r in header["rank_correlation"][chosen] if r is not None]
    shared = median(header["top_shared"][chosen]) * header["top"]
    return shared, median(known) if known else None


def write_scores(
    path: Path,
    scores_QN: Tensor,
    names: dict[str, list[str]],
    identity: dict[str, Any],
    halves: tuple[Tensor, Tensor] | None = None,
    **told: Any,
) -> None:
    """Write scores with the names of queries and training images.

    Args:
        path: The file.
        scores_QN: The scores.
        names: Names of the ``train`` images and the ``queries``.
        identity: What they were made from.
        halves: Scores of either half of the draws; left out of an ``.npy`` file.
        told: What else is told of them, as plain values.

    Raises:
        ValueError: If the file cannot be written.
    """
    header = {**names, "identity": identity, **told}
    tensors = {"scores": scores_QN}
    if halves is not None:
        tensors |= dict(zip(HALVES, halves, strict=True))
    tensors = {name: z.detach().cpu().contiguous() for name, z in tensors.items()}
    if path.suffix == ".safetensors":
        old = shards_of(path)
        SCORES.write(path, tensors, header)
        for other in old:
            other.unlink(missing_ok=True)
        return
    write_array(path, tensors["scores"].numpy(), header)


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
