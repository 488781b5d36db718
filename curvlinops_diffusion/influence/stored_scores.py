"""Scores in files, read a query at a time.

Legend: Q queries, N training examples, n those of a shard, P parameters, k the most extreme.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.influence.agreement import Agreement
from curvlinops_diffusion.influence.consumers import OwnScores, TopInfluences, TopScores
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.score_files import (
    HALVED,
    INDEX,
    SCORES,
    write_scores,
    written_shards,
)
from curvlinops_diffusion.influence.streaming import (
    curvature_settings,
    of_gradients,
    query_blocks,
    scored_blocks,
)
from curvlinops_diffusion.influence.tables import table_blocks, write_table
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.checkpoints import forget
from curvlinops_diffusion.runtime.digests import digest_of
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions
from curvlinops_diffusion.runtime.processes import ALONE, Processes


class StoredScores:
    """Scores ``[Q, N]`` on disk, of which only the queries that are asked for are read.

    In one file, or in shards that several processes have written (:meth:`create`), beside a file
    that names them all. ``stored[q]`` are the scores of a query, ``[N]``; ``len(stored)``,
    iteration and ``stored.shape`` are as a tensor's. :meth:`open` opens every file of scores, those
    of the program's ``score`` and of :meth:`Attribution.save` as well.

    Attributes:
        header: What is known of the scores, as plain values: the names of the training examples
            (``train``) and of the ``queries``, and what they were made from (``identity``).
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

    def __init__(self, path: Path, header: Mapping[str, Any], name: str = HALVED[0]):
        self.header = dict(header)
        self.shape = (len(header["queries"]), len(header["train"]))
        self._path, self._name = path, name
        blocks: dict[range, list[Path]] = {}
        for entry in header["shards"]:
            if entry["examples"] > 0:
                files = blocks.setdefault(range(*entry["queries"]), [])
                files.append(path.with_name(Path(entry["file"]).name))
        if not header["shards"]:
            blocks[range(self.shape[0])] = [path]
        self._blocks = dict(sorted(blocks.items(), key=lambda item: item[0].start))
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
        header: Mapping[str, Any] | None = None,
        passes: PassOptions = PLAIN,
    ) -> StoredScores:
        """Compute scores, see :func:`~curvlinops_diffusion.influence_scores`, and write them.

        No process ever holds more than the scores of a block of queries for its own examples. A
        block that is written is not computed again, whatever the number of processes.

        Args:
            path: Of the file that names the shards, ending in ``.safetensors``.
            J_query: Gradients of the measured values, ``[Q, P]``.
            G_inv: Inverse curvature, ``[P, P]``; any self-adjoint operator.
            J_train: Gradients of the training losses, ``[N, P]``.
            query_block: Queries whose scores are in a shard, and whose preconditioned gradients are
                held at once.
            halves: Whether scores of either half of the draws are kept as well, with how far they
                agree, see :func:`~curvlinops_diffusion.split_half_scores`.
            header: What else is known of the scores, or known better than by the operators, as
                plain values.
            passes: Checkpoints, processes and progress.

        Raises:
            ValueError: If the operators act on different parameters or devices, or a file cannot be
                written.
        """
        path, processes = Path(path), Processes.of(passes.distributed)
        header = {
            "train": J_train.regression.names,
            "queries": J_query.regression.names,
            "methods": ["influence"],
            **(header or {}),
        }
        if "identity" not in header:
            sides = (("train", J_train), ("query", J_query))
            identity = {side: J.regression.identity(of_gradients(J)) for side, J in sides}
            header["identity"] = {**identity, "curvature": curvature_settings(G_inv)}
        names = HALVED if halves else HALVED[:1]
        token = digest_of([header["identity"], names])[:12]
        prefixes = {
            queries: f"{path.stem}.{token}.{queries.start}to{queries.stop}"
            for queries in query_blocks(J_query, query_block)
        }
        shards = {block: written_shards(path.parent, own) for block, own in prefixes.items()}
        processes.check_alike(f"what they see in '{path.parent}'", list(shards.values()))
        loop = scored_blocks(
            J_query,
            G_inv,
            J_train,
            lambda: OwnScores(names, processes),
            halves=halves,
            name="Own scores",
            settings={"halves": halves},
            query_block=query_block,
            passes=passes,
            summed=False,
            wanted=lambda block: not shards[block],
        )
        for block, own in loop:
            shards[block] = _write_shards(path.parent, prefixes[block], block, own, processes)
            forget(passes.checkpoint, f"Own scores from query {block.start}", processes)
        every = [entry for entries in shards.values() for entry in entries]

        def finish() -> None:
            stored = cls(path, {**header, "shards": every})
            if halves:
                both = Agreement.of_halves(stored.named("first"), stored.named("second"))
                header.update(both.as_header())
            write_scores(path, {}, header, every)

        processes.all_or_none(finish if processes.rank == 0 else lambda: None)
        return cls.open(path, check=False)

    @classmethod
    def open(cls, path: str | PathLike[str], *, check: bool = True) -> StoredScores:
        """Open scores.

        Args:
            path: The file that names the shards, or holds the scores itself.
            check: Whether to read all of them once, to see that they are as they were written.

        Raises:
            ValueError: If a file is missing, damaged, or of something else.
        """
        path = Path(path)
        header = SCORES.read_header(path)
        if isinstance(header, dict) and "shards" not in header:
            raise ValueError(
                f"'{path}' is a shard of scores. Pass the file that names it, beside it."
            )
        try:
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
            raise IndexError(f"Queries are 0 to {len(self) - 1}, got {q}.")
        return self.rows(range(q % len(self), q % len(self) + 1))[0]

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the scores of each query."""
        return (self[q] for q in range(len(self)))

    @property
    def names(self) -> list[str]:
        """The names of the scores in the files: ``'scores'``, perhaps ``'first'`` and others."""
        file = next((files[0] for files in self._blocks.values()), self._path)
        return sorted(SCORES.names(file) - {INDEX})

    def named(self, name: str) -> StoredScores:
        """Other scores of the same files.

        Args:
            name: ``'first'`` or ``'second'``, of halves of the draws; or another of :attr:`names`.

        Raises:
            ValueError: If the files hold none of that name.
        """
        if name not in self.names:
            raise ValueError(
                f"`name` must be one of {self.names}, which '{self._path}' holds, got {name!r}. "
                "Halves of the draws are scored from multiples of 4 draws, or with halves=True."
            )
        return StoredScores(self._path, self.header, name)

    @property
    def by_method(self) -> dict[str, StoredScores]:
        """The scores of each method, of which the first orders."""
        first, *others = self.header.get("methods", ["influence"])
        return {first: self.named(HALVED[0]), **{name: self.named(name) for name in others}}

    @property
    def halves(self) -> dict[str, tuple[StoredScores, StoredScores] | None]:
        """The scores of either half of the draws by method; ``None`` where there are none."""
        found: dict[str, tuple[StoredScores, StoredScores] | None] = {}
        names = set(self.names)
        for place, method in enumerate(self.by_method):
            first, second = (f"{method}/{half}" if place else half for half in HALVED[1:])
            there = {first, second} <= names
            found[method] = (self.named(first), self.named(second)) if there else None
        return found

    def rows(self, queries: range) -> Tensor:
        """The scores of successive queries, ``[q, N]``."""
        parts = []
        for block in self._blocks:
            own = range(max(block.start, queries.start), min(block.stop, queries.stop))
            if own:
                columns, scores = zip(*self._columns(block, own), strict=True)
                found_qN = scores[0].new_empty(len(own), self.shape[1])
                found_qN[:, torch.cat(columns)] = torch.cat(scores, 1)
                parts.append(found_qN)
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
        for block in self._blocks:
            top = TopScores(self.shape[1], k, ALONE)
            for columns, scores_qn in self._columns(block, block):
                top.add(columns.tolist(), scores_qn.T)
            found.append(top.result)
        return TopInfluences.of_blocks(found)

    def export(self, path: str | PathLike[str]) -> None:
        """Write a table, a row for each method, query and training example, the most helpful first.

        Its columns are those of :meth:`Attribution.to_pandas`, but for captions and paths.

        Args:
            path: Where to, ending in ``.csv`` or ``.parquet`` (which needs pyarrow).

        Raises:
            ValueError: If it ends in something else, a package is missing, or the file cannot be
                written.
        """
        write_table(Path(path), table_blocks(self.by_method, self.header, self.halves))

    def _columns(self, block: range, queries: range) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield numbers of examples, and the scores of some of a block's queries for them."""
        rows = slice(queries.start - block.start, queries.stop - block.start)
        for file, columns in zip(self._blocks[block], self._index_of(block), strict=True):
            yield columns, SCORES.read_rows(file, self._name, rows)

    def _index_of(self, block: range) -> list[Tensor]:
        """The examples of each file of a block; those of the latest block are kept."""
        if self._index[0] != block:
            read = partial(SCORES.read_rows, name=INDEX, rows=slice(None))
            self._index = (block, list(map(read, self._blocks[block])))
        return self._index[1]

    def _check(self) -> None:
        """Check that the files are as they were written, and hold every score once."""
        Q, N = self.shape
        for file in {self._path, *(file for files in self._blocks.values() for file in files)}:
            SCORES.read(file, wanted=())
        if sorted(q for block in self._blocks for q in block) != list(range(Q)):
            raise SCORES.damaged(self._path, f"shards of other queries than {Q}")
        for block in self._blocks:
            index, rest = self._index_of(block), slice(len(block) - 1, None)
            for file, columns in zip(self._blocks[block], index, strict=True):
                if SCORES.read_rows(file, self._name, rest).shape != (1, len(columns)):
                    raise SCORES.damaged(file, f"other scores than of {len(block)} queries")
            if not torch.equal(torch.cat(index).sort().values, torch.arange(N)):
                raise SCORES.damaged(self._path, f"shards of other examples than {N}")


def _write_shards(
    folder: Path, prefix: str, queries: range, own: OwnScores, processes: Processes
) -> list[dict[str, Any]]:
    """Write the shard of this process; return the entries of all."""
    tensors, file = own.found, f"{prefix}.{processes.rank}of{processes.count}.safetensors"
    entry = {
        "file": file,
        "queries": [queries.start, queries.stop],
        "examples": len(tensors[INDEX]) if tensors else 0,
    }
    processes.all_or_none(lambda: SCORES.write(folder / file, tensors, entry))
    every = processes.all_gather(entry)

    def check_seen() -> None:
        for written in every:
            if not (folder / written["file"]).exists():
                raise ValueError(
                    f"'{folder}' has no '{written['file']}' here, which another process has "
                    "written. Pass a folder that all processes see."
                )

    processes.all_or_none(check_seen)
    return every
