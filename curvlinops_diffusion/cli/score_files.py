"""Files of scores: which training image scores how much for which query."""

from __future__ import annotations

import io
import json
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from curvlinops_diffusion.influence.score_files import SCORES, shards_of
from curvlinops_diffusion.runtime.files import write_bytes

if TYPE_CHECKING:  # to say what a file is of, PyTorch need not be imported
    from torch import Tensor

    from curvlinops_diffusion.influence.stored_scores import StoredScores

#: The names of the scores of two halves of the draws.
HALVES = ("first_half", "second_half")


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
    scores_QN = tensors["scores"]
    buffer = io.BytesIO()
    np.save(buffer, scores_QN.numpy(), allow_pickle=False)
    # two files cannot appear at once: the index says which array it is of
    header["sha256"] = sha256(buffer.getvalue()).hexdigest()
    header["header_sha256"] = _digest(header)
    write_bytes(_index(path), json.dumps(header, indent=1).encode())
    write_bytes(path, buffer.getvalue())


def read_scores(path: Path) -> tuple[Tensor | StoredScores, dict[str, Any]]:
    """Read scores, ``[Q, N]``, and the names and settings that belong to them.

    Scores in several files are read as they are asked for, a query at a time.

    Raises:
        ValueError: If the file is missing, damaged, or of something else.
    """
    header, scores_QN = header_and_scores(path)
    if scores_QN is None:
        raise ValueError(
            f"'{_index(path)}' is not the index of '{path}': the program was stopped between the "
            "two, or one was replaced. Run score again with the same options."
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
    for needed in (path, _index(path)):
        if not needed.is_file():
            raise ValueError(f"There is no file '{needed}'. {SCORES.advice}")
    try:
        raw = path.read_bytes()
        header = dict(json.loads(_index(path).read_text()))
        scores_QN = torch.from_numpy(np.load(io.BytesIO(raw), allow_pickle=False))
    except Exception as error:  # numpy's reader raises many kinds
        raise SCORES.damaged(path, f"{type(error).__name__}: {error}") from error
    if header.get("header_sha256", "") not in ("", _digest(header)):  # older files have none
        raise SCORES.damaged(_index(path), "it is not what was written")
    same = header.get("sha256", "") in ("", sha256(raw).hexdigest())
    return header, scores_QN if same else None


def _digest(header: dict[str, Any]) -> str:
    """Of all of an index but the digest itself."""
    rest = {key: value for key, value in header.items() if key != "header_sha256"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _index(path: Path) -> Path:
    return path.with_suffix(".index.json")
