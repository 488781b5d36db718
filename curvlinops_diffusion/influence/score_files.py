"""The formats of files of scores; read without PyTorch."""

from __future__ import annotations

from pathlib import Path

from curvlinops_diffusion.runtime.files import FileKind

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


def shards_of(path: Path) -> set[Path]:
    """The files that a file of scores names, beside it; none if it holds the scores itself."""
    if path.suffix != ".safetensors" or not SCORES.holds(path):
        return set()
    listed = SCORES.read_header(path).get("shards", [])
    return {path.with_name(Path(entry["file"]).name) for entry in listed}
