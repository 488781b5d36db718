"""The layout of scores in files: shards with the columns of some examples, and a file over them.

The file's header names training examples (``train``) and ``queries``, says what the scores were
made from (``identity``), and lists the shards (``shards``): each with its file, the block of
queries and the number of examples that it has scores of. Where it lists none, the file is itself
the one shard. A shard holds, by name, scores ``[q, n]`` of its queries and examples, and the
numbers of these examples (``index``): ``scores``, of all draws by the first method; ``first`` and
``second``, of either half of the draws; of further methods ``regression``, ``regression/first``, …

Without PyTorch, so that the program starts without.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS, Better
from curvlinops_diffusion.runtime.files import FileKind

if TYPE_CHECKING:
    from torch import Tensor

SCORES = FileKind(
    "curvlinops_diffusion.scores",
    "influence scores",
    "Make it by curvlinops-diffusion score, or StoredScores.create, which go on from whole shards.",
)
#: The names of the scores of all draws, and of either half of them.
HALVED = ("scores", "first", "second")
#: The name of the examples' numbers, ``[n]``.
INDEX = "index"


def shards_of(path: Path) -> set[Path]:
    """The files that a file of scores names, beside it; none if it holds the scores itself."""
    try:
        listed = SCORES.read_header(path).get("shards", [])
        return {path.with_name(Path(entry["file"]).name) for entry in listed}
    except (AttributeError, KeyError, TypeError, ValueError):  # none, damaged, of another version
        return set()


def write_scores(
    path: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    shards: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a file of scores, after the shards that it names; then delete those of an older one."""
    import torch

    old = shards_of(path)
    # of a run that was stopped and went on with another number of processes
    for token in {entry["file"].removeprefix(f"{path.stem}.").split(".")[0] for entry in shards}:
        old |= set(path.parent.glob(f"{escape(path.stem)}.{token}.*.safetensors"))
    if tensors:
        tensors = {**tensors, INDEX: torch.arange(len(header["train"]))}
    SCORES.write(path, tensors, {**header, "shards": list(shards)})
    for other in old - shards_of(path):
        other.unlink(missing_ok=True)


def written_shards(folder: Path, prefix: str) -> list[dict[str, Any]]:
    """The shards of a block of queries that an earlier run has written, if all are there."""
    by_count: dict[int, dict[int, str]] = {}
    for path in folder.glob(f"{escape(prefix)}.*of*.safetensors"):
        match = re.fullmatch(re.escape(prefix) + r"\.(\d+)of(\d+)\.safetensors", path.name)
        if match:
            rank, count = map(int, match.groups())
            by_count.setdefault(count, {})[rank] = path.name
    for count, files in sorted(by_count.items()):
        if len(files) == count:
            return [dict(SCORES.read_header(folder / files[rank])) for rank in range(count)]
    return []


def better_of(header: Mapping[str, Any]) -> Better:
    """Values of what was measured that are good; lower ones where that is not known."""
    entry = MEASUREMENTS.get(header["identity"].get("query", {}).get("measurement", ""))
    return Better.LOWER if entry is None else entry.better


def helpful_sign(header: Mapping[str, Any]) -> int:
    """The sign of the scores that come first: that of helpful ones, 1 where neither sign is."""
    return better_of(header).helpful_sign or 1
