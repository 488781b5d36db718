"""A nearest-neighbour index of stored gradients: the most helpful examples without all scores.

Legend: Q queries, N training examples, k coordinates kept, K examples found.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curvlinops_diffusion.influence.consumers import Ranked
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.store import GradientStore
from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
from curvlinops_diffusion.runtime.checks import check_count
from curvlinops_diffusion.runtime.files import FileKind, check_same
from curvlinops_diffusion.runtime.messages import quoted

INDEX = FileKind(
    "curvlinops_diffusion.index",
    "an index of stored gradients",
    "Make it by NearestGradients.build.",
)


class NearestGradients:
    """An index of faiss over a :class:`~curvlinops_diffusion.GradientStore`.

    Scores are inner products of whitened gradients, so that the most helpful examples are the
    nearest ones by that product. The index holds the store's coordinates in memory: project and
    compress there first. How many of the truly most helpful examples an index finds is measured in
    ``docs/attribution.rst``.

    Made by :meth:`build`, opened by :meth:`open`.

    Attributes:
        store: The store that it is of.

    Examples:
        >>> EK = DiffusionEKFACLinearOperator(train)
        >>> J_train = ExampleGradientLinearOperator(train)
        >>> store = GradientStore.create(f"{folder}/nearest", J_train, EK, damping=1e-3)
        >>> index = NearestGradients.build(store, f"{folder}/index.safetensors")
        >>> J_query = ExampleGradientLinearOperator(query)
        >>> found = index.search(J_query, EK, k=3)
        >>> torch.equal(found.indices, store.scores(J_query, EK).topk(3).indices)
        True
    """

    def __init__(self, store: GradientStore, index: Any):
        self.store = store
        self._index = index

    @classmethod
    def build(
        cls, store: GradientStore, path: str | PathLike[str], factory: str = "Flat"
    ) -> NearestGradients:
        """Build an index, and write it.

        Args:
            store: The stored gradients.
            path: The file to write, ``.safetensors``.
            factory: What faiss builds: ``'Flat'`` compares with all examples, exactly; ``'SQ8'``
                the same in 8 bits; ``'IVF64,Flat'`` with those of the nearest of 64 clusters.

        Raises:
            ValueError: If faiss is missing or knows no such index, or the store or the file cannot
                be read or written.
        """
        faiss = _faiss()
        rows = np.zeros((store.num_data, store.size), dtype=np.float32)
        for indices, rows_Bk in store.rows():
            rows[indices] = rows_Bk.numpy()
        try:
            index = faiss.index_factory(store.size, factory, faiss.METRIC_INNER_PRODUCT)
            index.train(rows)
            index.add(rows)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"factory={factory!r} makes no index: {quoted(error)}.") from error
        stored = torch.from_numpy(faiss.serialize_index(index).copy())
        header = {"store": store.header["identity"], "factory": factory}
        INDEX.write(Path(path), {"index": stored}, header)
        return cls(store, index)

    @classmethod
    def open(cls, store: GradientStore, path: str | PathLike[str]) -> NearestGradients:
        """Read an index of a store.

        Raises:
            ValueError: If it is missing, damaged, or of another store.
        """
        faiss = _faiss()
        header, tensors = INDEX.read(Path(path))
        check_same(
            header["store"],
            store.header["identity"],
            f"'{path}' is an index of another store",
            "Pass its own, or build it anew.",
        )
        try:
            index = faiss.deserialize_index(tensors["index"].numpy())
        except (KeyError, RuntimeError) as error:
            raise INDEX.damaged(Path(path), f"{type(error).__name__}: {error}") from error
        return cls(store, index)

    def search(
        self,
        J_query: ExampleGradientLinearOperator,
        curvature: BlockDiagonalLinearOperator,
        k: int = 10,
        *,
        probes: int = 8,
    ) -> Ranked:
        """The training examples with the largest scores for each query.

        Args:
            J_query: The queries' gradients.
            curvature: The operator that the store was made with.
            k: How many.
            probes: Clusters that are looked through, of an index that has some.

        Returns:
            Indices and scores, ``[Q, K]``, the largest first; an index that looked through too few
            examples leaves −1 and minus infinity.

        Raises:
            ValueError: If the operator is another one.
        """
        check_count("k", k)
        query_Qk = self.store.query_rows(J_query, curvature)
        if hasattr(self._index, "nprobe"):
            self._index.nprobe = check_count("probes", probes)
        products, indices = self._index.search(query_Qk.cpu().numpy(), min(k, self.store.num_data))
        scores = torch.from_numpy(products) / self.store.num_data
        found = torch.from_numpy(indices)
        return Ranked(found, scores.masked_fill(found < 0, -torch.inf))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            "An index of stored gradients needs faiss: pip install 'curvlinops-diffusion[index]'."
        ) from error
    return faiss
