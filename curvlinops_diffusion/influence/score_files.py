"""Files of scores: which training image scores how much for which query.

What a file is of is told without PyTorch.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curvlinops_diffusion.runtime.files import FileKind, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

#: A file of scores holds them as ``scores``, or names the files that do (``shards``).
SCORES = FileKind(
    "curvlinops_diffusion.scores",
    "influence scores",
    "Make it by curvlinops-diffusion score, or StoredScores.create.",
)
SHARD = FileKind(
    "curvlinops_diffusion.scores_shard",
    "a part of influence scores",
    "Make the scores again; what other files hold is not computed anew.",
)
#: The names of the scores of two halves of the draws, beside ``scores``, in files of either kind.
HALVES = ("first_half", "second_half")


def shards_of(path: Path) -> set[Path]:
    """The files that a file of scores names, beside it; none if it holds the scores itself."""
    if path.suffix != ".safetensors" or not SCORES.holds(path):
        return set()
    listed = SCORES.read_header(path).get("shards", [])
    return {path.with_name(Path(entry["file"]).name) for entry in listed}


def write_array(path: Path, scores_QN: np.ndarray, header: dict[str, Any]) -> None:
    """Write scores as an ``.npy`` file, with an index of what else is known beside it.

    Two files cannot appear at once: the index, which comes first, says which array it is of.

    Raises:
        ValueError: If one cannot be written.
    """
    buffer = io.BytesIO()
    np.save(buffer, scores_QN, allow_pickle=False)
    header = {**header, "sha256": sha256(buffer.getvalue()).hexdigest()}
    header["header_sha256"] = _digest(header)
    write_bytes(index_of(path), json.dumps(header, indent=1).encode())
    write_bytes(path, buffer.getvalue())


def read_array(path: Path) -> tuple[dict[str, Any], np.ndarray | None]:
    """Read an ``.npy`` file with its index; no scores where the index is of others.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    for needed in (path, index_of(path)):
        if not needed.is_file():
            raise ValueError(f"There is no file '{needed}'. {SCORES.advice}")
    try:
        raw = path.read_bytes()
        header = dict(json.loads(index_of(path).read_text()))
        scores_QN = np.load(io.BytesIO(raw), allow_pickle=False)
    except Exception as error:  # numpy's reader raises many kinds
        raise SCORES.damaged(path, f"{type(error).__name__}: {error}") from error
    if header.get("header_sha256") != _digest(header):
        raise SCORES.damaged(index_of(path), "it is not what was written")
    same = header.get("sha256") == sha256(raw).hexdigest()
    return header, scores_QN if same else None


def other_array(path: Path) -> ValueError:
    """An error that says that array and index do not belong together."""
    return ValueError(
        f"'{index_of(path)}' is not the index of '{path}': the program was stopped between the "
        "two, or one was replaced. Run score again with the same options."
    )


def index_of(path: Path) -> Path:
    """The index of an ``.npy`` file."""
    return path.with_suffix(".index.json")


def _digest(header: dict[str, Any]) -> str:
    """Of all of an index but the digest itself."""
    rest = {key: value for key, value in header.items() if key != "header_sha256"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_scores(
    path: Path,
    scores_QN: Tensor,
    names: Mapping[str, Sequence[str]],
    identity: dict[str, Any],
    halves: Sequence[Tensor] | None = None,
    others: Mapping[str, Tensor] | None = None,
    **told: Any,
) -> None:
    """Write scores with the names of queries and training images.

    Args:
        path: The file, ``.safetensors`` or ``.npy``.
        scores_QN: The scores.
        names: Names of the ``train`` images and the ``queries``.
        identity: What they were made from.
        halves: Scores of either half of the draws; left out of an ``.npy`` file.
        others: Scores of further methods by name, likewise.
        told: What else is told of them, as plain values.

    Raises:
        ValueError: If the file cannot be written.
    """
    header = {**{key: list(own) for key, own in names.items()}, "identity": identity, **told}
    tensors = {"scores": scores_QN, **(others or {})}
    if halves is not None:
        tensors |= dict(zip(HALVES, halves, strict=True))
    plain = {name: z.detach().cpu().contiguous() for name, z in tensors.items()}
    if path.suffix != ".safetensors":
        write_array(path, plain["scores"].numpy(), header)
        return
    old = shards_of(path)
    SCORES.write(path, plain, header)
    for other in old:
        other.unlink(missing_ok=True)
