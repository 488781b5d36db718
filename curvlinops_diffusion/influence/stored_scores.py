"""Scores in files that several processes have written, read a query at a time.

Legend: Q queries, N training examples, n those of a file, P parameters, k the most extreme.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import copy
from glob import escape
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlinops_diffusion.influence.consumers import OwnScores, TopInfluences, TopScores
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.score_files import (
    HALVES,
    SCORES,
    SHARD,
    other_array,
    read_array,
    shards_of,
)
from curvlinops_diffusion.influence.scorers import halved_products, inner_products
from curvlinops_diffusion.influence.scores import (
    curvature_settings,
    query_blocks,
    scored_blocks,
)
from curvlinops_diffusion.influence.split_half import halves_of
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.adapters import common_list
from curvlinops_diffusion.runtime.checkpoints import forget
from curvlinops_diffusion.runtime.digests import digest_of, name_of
from curvlinops_diffusion.runtime.files import FileKind
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions
from curvlinops_diffusion.runtime.processes import ALONE, Processes


class StoredScores:
    """Scores ``[Q, N]`` on disk, of which only the queries that are asked for are read.

    Each process has written the columns of the examples that it has seen, a file for each block of
    queries, beside a file that names them all. ``stored[q]`` are the scores of a query, ``[N]``;
    ``len(stored)``, iteration and ``stored.shape`` are as a tensor's. Files of the program's
    ``score`` are opened alike, with ``--sharded`` or without, ``.safetensors`` or ``.npy``.

    Made by :meth:`create`, opened by :meth:`open`.

    Attributes:
        header: What is known of the scores, as plain values.
        shape: ``(Q, N)``.

    Examples:
        >>> EK_inv = DiffusionEKFACLinearOperator(train).inverse(damping=1e-3)
        >>> J_train = ExampleGradientLinearOperator(train)
        >>> J_query = ExampleGradientLinearOperator(query)
        >>> path = f"{folder}/stored.safetensors"
        >>> stored = StoredScores.create(path, J_query, EK_inv, J_train, query_block=1)
        >>> torch.allclose(stored[1], influence_scores(J_query, EK_inv, J_train)[1], rtol=1e-4)
        True
        >>> StoredScores.open(path).top(3).positive.indices.shape
        torch.Size([2, 3])
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        self.header = header
        self.shape: tuple[int, int] = (int(header["shape"][0]), int(header["shape"][1]))
        self._path = path
        self._name = "scores"
        self._array: np.ndarray | None = None  # of an .npy file, which is read whole
        self._blocks: dict[range, list[Path]] = {}
        for entry in header["shards"]:
            if entry["examples"] > 0:
                own = self._blocks.setdefault(range(*entry["queries"]), [])
                own.append(path.with_name(Path(entry["file"]).name))
        self._index: tuple[range, list[Tensor]] = (range(0), [])

    @classmethod
    def create(
        cls,
        path: str | PathLike[str],
        J_query: ExampleGradientLinearOperator,
        G_inv: PyTorchLinearOperator,
        J_train: ExampleGradientLinearOperator,
        *,
        query_block: int = 64,
        halves: bool = False,
        passes: PassOptions = PLAIN,
    ) -> StoredScores:
        """Compute scores, see :func:`~curvlinops_diffusion.influence_scores`, and write them.

        No process ever holds more than the scores of a block of queries for its own examples. A
        block that is written is not computed again, whatever the number of processes.

        Args:
            path: Of the file that names the others, ending in ``.safetensors``.
            J_query: Gradients of the measured values, ``[Q, P]``.
            G_inv: Inverse curvature, ``[P, P]``; any self-adjoint operator.
            J_train: Gradients of the training losses, ``[N, P]``.
            query_block: Queries whose scores are in a file, and whose preconditioned gradients are
                held at once.
            halves: Whether scores of either half of the draws are kept as well, see
                :func:`~curvlinops_diffusion.split_half_scores`.
            passes: Checkpoints, processes and progress.

        Raises:
            ValueError: If the operators act on different parameters or devices, or a file cannot be
                written.
        """
        path = Path(path)
        identity = {
            "train": J_train.regression.identity(_settings(J_train)),
            "query": J_query.regression.identity(_settings(J_query)),
            "curvature": curvature_settings(G_inv),
        }
        options: dict[str, Any] = {"query_block": query_block, "halves": halves, "passes": passes}
        shards = write_shards(path, J_query, G_inv, J_train, identity, **options)
        header = {"identity": identity, "shape": [J_query.shape[0], J_train.shape[0]]}
        processes = Processes.of(passes.distributed)
        processes.all_or_none(lambda: None if processes.rank else write_index(path, header, shards))
        return cls(path, {**header, "shards": shards})

    @classmethod
    def open(cls, path: str | PathLike[str], *, check: bool = True) -> StoredScores:
        """Open scores.

        Args:
            path: The file that names the others.
            check: Whether to read all of them once, to see that they are as they were written.

        Raises:
            ValueError: If one is missing, damaged or of something else.
        """
        path = Path(path)
        array = None
        if path.suffix == ".npy":
            header, array = read_array(path)
            if array is None:
                raise other_array(path)
        else:
            header = SCORES.read_header(path)
        try:
            if "shards" not in header:  # it holds the scores itself
                shape = [len(header["queries"]), len(header["train"])]
                header = header | {"shards": [], "shape": shape}
                stored = cls(path, header)
                stored._blocks = {range(stored.shape[0]): [path]}
                stored._array = array
            else:
                stored = cls(path, header)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise SCORES.damaged(path, f"{type(error).__name__}: {error}") from error
        if check:
            stored._check()
        return stored

    def __len__(self) -> int:
        """``Q``."""
        return self.shape[0]

    def __getitem__(self, q: int) -> Tensor:
        """The scores of a query, ``[N]``."""
        if not -len(self) <= q < len(self):
            raise IndexError(f"{q} arrived; there are {len(self)} queries.")
        return self.rows(range(q % len(self), q % len(self) + 1))[0]

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the scores of each query."""
        return (self[q] for q in range(len(self)))

    def named(self, name: str) -> StoredScores:
        """Other scores of the same files: ``first`` or ``second``, of halves of the draws.

        Raises:
            ValueError: If the files have none, or the name is another.
        """
        of_halves = dict(zip(("first", "second"), HALVES, strict=True))
        if name not in (*of_halves, *HALVES, "scores"):
            raise ValueError(f"named({name!r}): pass 'first' or 'second', halves of the draws.")
        other = copy(self)
        other._name = of_halves.get(name, name)
        if other._name not in self._names():
            raise ValueError(
                f"'{self._path}' has no scores of halves of the draws. Make it by "
                "StoredScores.create with halves=True, or by curvlinops-diffusion score into a "
                ".safetensors file with multiples of 4 as --num-draws and --query-draws."
            )
        return other

    def rows(self, queries: range) -> Tensor:
        """The scores of successive queries, ``[q, N]``."""
        parts = [
            self._block_rows(block, range(max(block.start, queries.start), stop))
            for block in sorted(self._blocks, key=lambda block: block.start)
            if (stop := min(block.stop, queries.stop)) > max(block.start, queries.start)
        ]
        return torch.cat(parts)

    def whole(self) -> Tensor:
        """All scores, ``[Q, N]``."""
        return self.rows(range(len(self)))

    def top(self, k: int = 10) -> TopInfluences:
        """The extreme and neutral scores; see :func:`~curvlinops_diffusion.top_influences`.

        Args:
            k: How many of each.
        """
        found = []
        for block in sorted(self._blocks, key=lambda block: block.start):
            top = TopScores(lambda: lambda known_qn: {"scores": known_qn}, self.shape[1], k, ALONE)
            top.begin()
            for columns, scores_qn in self._columns(block, block):
                top.add(columns.tolist(), scores_qn)
            found.append(top.result)
        return TopInfluences.of_blocks(found)

    # ---------------------------------------------------------------------------------------------

    def _names(self) -> set[str]:
        """The names of the scores that the files hold."""
        if self._array is not None or not self._blocks:
            return {"scores"}
        file = next(iter(self._blocks.values()))[0]
        return self._kind(file).names(file)

    def _kind(self, file: Path) -> FileKind:
        return SCORES if file == self._path else SHARD

    def _block_rows(self, block: range, queries: range) -> Tensor:
        found = None
        for columns, scores_qn in self._columns(block, queries):
            if found is None:
                found = scores_qn.new_zeros(len(queries), self.shape[1])
            found[:, columns] = scores_qn
        assert found is not None, "a block has files"
        return found

    def _columns(self, block: range, queries: range) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers of examples, and the scores of some of a block's queries for them."""
        rows = slice(queries.start - block.start, queries.stop - block.start)
        index = self._index_of(block)
        for file, columns in zip(self._blocks[block], index, strict=True):
            if self._array is None:
                yield columns, self._kind(file).read_rows(file, self._name, rows)
            else:
                yield columns, torch.from_numpy(self._array[rows])

    def _index_of(self, block: range) -> list[Tensor]:
        """The examples of each file of a block; those of the latest block are kept."""
        if self._index[0] != block:
            every = slice(None)
            self._index = (
                block,
                [
                    torch.arange(self.shape[1])
                    if file == self._path
                    else SHARD.read_rows(file, OwnScores.INDEX, every)
                    for file in self._blocks[block]
                ],
            )
        return self._index[1]

    def _check(self) -> None:
        """Check that the files are as they were written, and hold every score once.

        Raises:
            ValueError: If they do not.
        """
        Q, N = self.shape
        covered = sorted(q for block in self._blocks for q in block)
        if covered != list(range(Q)):
            raise SCORES.damaged(self._path, f"files of other queries than {Q}")
        if self._array is not None:  # whose digest was checked as it was read
            if self._array.shape != (Q, N):
                raise SCORES.damaged(self._path, f"{self._array.shape} scores for {Q} x {N} names")
            return
        for block, files in self._blocks.items():
            for file in files:
                self._kind(file).read(file, wanted=())
                last_qn = self._kind(file).read_rows(file, "scores", slice(len(block) - 1, None))
                if len(last_qn) != 1:
                    raise SCORES.damaged(self._path, f"other queries in '{file.name}'")
                if file == self._path and last_qn.shape[1] != N:
                    raise SCORES.damaged(self._path, f"scores of other examples than {N}")
            columns = torch.cat(self._index_of(block)).sort().values
            if not torch.equal(columns, torch.arange(N)):
                raise SCORES.damaged(self._path, f"files of other examples than {N}")


def write_shards(
    path: Path,
    J_query: ExampleGradientLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    identity: dict[str, Any],
    *,
    query_block: int,
    halves: bool,
    passes: PassOptions,
) -> list[dict[str, Any]]:
    """Compute scores, and write those of this process, a file for each block of queries.

    Args:
        path: The file that is to name them, :func:`write_index`.
        J_query: Gradients of the measured values.
        G_inv: Inverse curvature.
        J_train: Gradients of the training losses.
        identity: What the scores depend on, as plain values.
        query_block: Queries in a file.
        halves: Whether scores of halves of the draws are written as well.
        passes: Checkpoints, processes and progress.

    Returns:
        What is to be said of each file: its name, its queries, and how many examples it holds.

    Raises:
        ValueError: As :meth:`StoredScores.create`.
    """
    processes, N = Processes.of(passes.distributed), J_train.shape[0]
    token = digest_of([identity, HALVES if halves else ()])[:12]
    blocks = {
        queries: f"{path.stem}.{token}.{queries.start}to{queries.stop}"
        for queries in query_blocks(J_query, query_block)
    }
    found = {queries: _written(path.parent, prefix) for queries, prefix in blocks.items()}
    processes.check_alike(f"what they see in '{path.parent}'", list(found.values()))
    loop = scored_blocks(
        halves_of(J_query) if halves else J_query,
        G_inv,
        halves_of(J_train) if halves else J_train,
        halved_products(N) if halves else inner_products(N),
        lambda make: OwnScores(make, processes),
        name="Own scores",
        settings={"halves": halves},
        query_block=query_block,
        passes=passes,
        summed=False,
        wanted=lambda queries: not found[queries],
    )
    for queries, own in loop:
        found[queries] = _write(path.parent, blocks[queries], own, processes)
        forget(passes.checkpoint, f"Own scores from query {queries.start}", processes)
    return [
        {"file": file, "queries": [queries.start, queries.stop], "examples": examples}
        for queries, written in found.items()
        for file, examples in written
    ]


def _write(
    folder: Path, prefix: str, own: OwnScores, processes: Processes
) -> list[tuple[str, int]]:
    """Write what this process has seen; returns the files of all, with their examples' number."""
    file = f"{prefix}.{processes.rank}of{processes.count}.safetensors"
    tensors = own.found
    examples = len(tensors[OwnScores.INDEX]) if tensors else 0
    processes.all_or_none(lambda: SHARD.write(folder / file, tensors, {"examples": examples}))
    written = [(file, examples) for file, examples in processes.all_gather((file, examples))]
    processes.all_or_none(lambda: _check_seen(folder, [file for file, _ in written]))
    return written


def _check_seen(folder: Path, files: Sequence[str]) -> None:
    """Check that this process sees what the others have written.

    Raises:
        ValueError: If it does not.
    """
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise ValueError(
            f"'{folder}' has no '{missing[0]}' here, which another process has written. Pass a "
            "folder that all processes see."
        )


def _written(folder: Path, prefix: str) -> list[tuple[str, int]]:
    """The files of a block that an earlier run has written, if those of all processes are there."""
    by_count: dict[int, dict[int, str]] = {}
    for path in folder.glob(f"{escape(prefix)}.*of*.safetensors"):
        match = re.fullmatch(re.escape(prefix) + r"\.(\d+)of(\d+)\.safetensors", path.name)
        if match:
            rank, count = (int(number) for number in match.groups())
            by_count.setdefault(count, {})[rank] = path.name
    for count, files in sorted(by_count.items()):
        if len(files) == count:
            names = [files[rank] for rank in range(count)]
            return [(name, int(SHARD.read_header(folder / name)["examples"])) for name in names]
    return []


def write_index(path: Path, header: dict[str, Any], shards: Sequence[dict[str, Any]]) -> None:
    """Write the file that names the others, the last of all; then delete those of an older one.

    Args:
        path: The file.
        header: What is said of the scores, with their ``shape``.
        shards: What :func:`write_shards` has returned.

    Raises:
        ValueError: If it cannot be written; an older file of that name is unchanged.
    """
    old = shards_of(path)
    # of a run that was stopped and went on with another number of processes
    tokens = {entry["file"].removeprefix(f"{path.stem}.").split(".")[0] for entry in shards}
    for token in tokens:
        old |= set(path.parent.glob(f"{escape(path.stem)}.{token}.*.safetensors"))
    SCORES.write(path, {}, {**header, "shards": list(shards)})
    for other in old - shards_of(path):
        other.unlink(missing_ok=True)


def _settings(J: ExampleGradientLinearOperator) -> dict[str, Any]:
    return {"params": common_list(J.param_names), "measurement": name_of(J.measurement)}
