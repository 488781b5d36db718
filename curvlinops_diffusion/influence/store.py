"""Training gradients in a folder, from which the scores of any query are read.

Legend: Q queries, N training examples, B a batch of them, P parameters, k coordinates kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.influence.compression import Compression, Projection
from curvlinops_diffusion.influence.consumers import TopInfluences, TopScores
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.kernel_regression import (
    GRADIENT_BYTES,
    iterated_solution,
    ridge_solution,
)
from curvlinops_diffusion.influence.scorers import inner_products
from curvlinops_diffusion.influence.whitening import Whitening
from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
from curvlinops_diffusion.linalg.operator import check_same_parameters
from curvlinops_diffusion.linalg.upstream import LinearOperator
from curvlinops_diffusion.runtime.adapters import common_list
from curvlinops_diffusion.runtime.checks import check_count, check_positive
from curvlinops_diffusion.runtime.digests import name_of
from curvlinops_diffusion.runtime.files import FileKind, check_same, check_space, make_folder
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions, draws_bar
from curvlinops_diffusion.runtime.processes import ALONE, Processes
from curvlinops_diffusion.runtime.sharded_networks import check_whole_parameters

GRADIENTS = FileKind(
    "curvlinops_diffusion.gradients",
    "a store of gradients",
    "Delete it, and call GradientStore.create again.",
)


# The file in a store's folder that says what it is of, and holds what all batches share
HEADER = "store.safetensors"


class GradientStore:
    r"""Whitened training gradients on disk; queries come later, one by one or many at once.

    Of each training example ``z_n = (Λ + λ)^{-1/2} Uᵀ ∇ℓ_n`` is kept, possibly in fewer
    coordinates and bits, so that scores are inner products::

        τ(q, n) = 1/N z_q · z_n

    Whitened coordinates have similar sizes, which is what quantisation in blocks wants
    (``docs/attribution.rst`` has what each form costs in scores and ranks).

    Made by :meth:`create`, opened by :meth:`open`.

    Attributes:
        header: What the store was made of.
        num_data: The number ``N`` of training examples.
        size: The number ``k`` of coordinates.

    Examples:
        >>> EK = DiffusionEKFACLinearOperator(train)
        >>> J_train = ExampleGradientLinearOperator(train, EK.param_names)
        >>> store = GradientStore.create(f"{folder}/store", J_train, EK, damping=1e-8)
        >>> J_query = ExampleGradientLinearOperator(query, EK.param_names)
        >>> plain = influence_scores(J_query, EK.inverse(damping=1e-8), J_train)
        >>> bool((store.scores(J_query, EK) - plain).norm() < 0.02 * plain.norm())
        True
    """

    def __init__(self, folder: Path, header: dict[str, Any], projection: dict[str, Tensor]):
        self.header = header
        self.num_data: int = header["identity"]["regression"]["num_data"]
        self._folder = folder
        self._projection = projection
        self._compression = Compression(**header["identity"]["compression"])
        self.size: int = header["size"]

    # -----------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        folder: str | PathLike[str],
        J_train: ExampleGradientLinearOperator,
        curvature: BlockDiagonalLinearOperator,
        damping: float,
        compression: Compression = Compression(),  # noqa: B008 - immutable
        *,
        relative: bool = False,
        passes: PassOptions = PLAIN,
    ) -> GradientStore:
        """Compute and store all training gradients: one file for each batch of the data.

        Called again on the same folder after an interruption, it goes on with the batches that are
        missing. With ``passes.distributed`` every process writes its own.

        Args:
            folder: Where to.
            J_train: The training gradients.
            curvature: K-FAC or EK-FAC, not inverted.
            damping: ``λ``.
            compression: How they are stored.
            relative: Whether the damping is in units of each block's mean eigenvalue.
            passes: Processes and progress; every file is a checkpoint.

        Raises:
            ValueError: If the curvature is an inverse or of other parameters, or the folder holds
                gradients of something else or cannot be written to.
        """
        check_same_parameters({"J_train": J_train}, {"the curvature": curvature})
        check_whole_parameters(
            J_train.regression.objective.model,
            "A store, whose batches processes compute one by one,",
            "Pass the whole network to each process, or take influence_scores.",
        )
        exponent = curvature.info.get("power", 1)
        if exponent != 1:
            raise ValueError(
                f"The curvature arrived as its power {exponent:g}. Pass K-FAC or EK-FAC itself: "
                "the store inverts it, with its own damping."
            )
        folder = Path(folder)
        processes = Processes.of(passes.distributed)
        identity = J_train.regression.identity(
            {
                "params": common_list(J_train.param_names),
                "measurement": name_of(J_train.measurement),
                "curvature": curvature.info,
                "damping": damping,
                "compression": compression.as_dict(),
                **({"relative": True} if relative else {}),
            },
        )
        whiten = Whitening(curvature, damping, relative)
        if processes.rank == 0 and not (folder / HEADER).exists():
            make_folder(folder)
            projection = _fitted_projection(J_train, whiten, compression)
            size = _size(J_train, projection, compression)
            header = {"identity": identity, "size": size}
            GRADIENTS.write(folder / HEADER, projection, header)
        processes.barrier()
        store = cls.open(folder)
        check_same(
            store.header["identity"],
            identity,
            f"'{folder}' holds gradients of something else",
            "Pass another folder, or delete it.",
        )
        whole = compression.bytes_per_row(store.size) * store.num_data
        check_space(folder, whole - store._stored_bytes(), "The gradients of the other examples")
        processes.barrier()  # or a process would measure what another one is writing
        store._write_missing(J_train, whiten, processes, passes.progressbar and processes.rank == 0)
        processes.barrier()
        return store

    def _write_missing(
        self,
        J_train: ExampleGradientLinearOperator,
        whiten: Whitening,
        processes: Processes,
        shown: bool,
    ) -> None:
        """Compute and write the batches that have no file yet; each process its own."""
        regression, compression = J_train.regression, self._compression
        with draws_bar(regression.num_samples, "Storing gradients", shown) as bar:
            for number, clean in regression.numbered_batches(
                lambda n: processes.takes(n) and not self._shard(n).exists()
            ):
                z_Bk = compression.project(whiten(J_train.rows_of(clean)), self._projection)
                header = {"indices": list(clean.indices)}
                GRADIENTS.write(self._shard(number), compression.encode(z_Bk), header)
                bar.update(len(clean.indices) * regression.num_draws)

    @classmethod
    def open(cls, folder: str | PathLike[str]) -> GradientStore:
        """Open a folder.

        Raises:
            ValueError: If it holds no gradients, or they are damaged.
        """
        folder = Path(folder)
        path = folder / HEADER
        header, projection = GRADIENTS.read(path)
        try:
            store = cls(folder, header, projection)
            _check_projection(projection, store._compression, store.size)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise GRADIENTS.damaged(path, f"{type(error).__name__}: {error}") from error
        return store

    @property
    def bytes_per_example(self) -> float:
        """Bytes on disk for each training example, without what all share."""
        return self._stored_bytes() / self.num_data

    def _stored_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._folder.glob("rows.*.safetensors"))

    # -----------------------------------------------------------------------------------------

    def scores(
        self, J_query: ExampleGradientLinearOperator, curvature: BlockDiagonalLinearOperator
    ) -> Tensor:
        """Influence scores, ``[Q, N]``; see :func:`~curvlinops_diffusion.influence_scores`.

        Args:
            J_query: The queries' gradients.
            curvature: The operator that the store was made with.

        Raises:
            ValueError: If it is another one, or batches are missing.
        """
        return self._products(self.query_rows(J_query, curvature)) / self.num_data

    def _products(self, query_Qk: Tensor) -> Tensor:
        """``z_q · z_n``, ``[Q, N]``."""
        products_QN = query_Qk.new_zeros(len(query_Qk), self.num_data)
        for indices, rows_Bk in self.rows(query_Qk.device):
            products_QN[:, indices] = query_Qk @ rows_Bk.T
        return products_QN

    def top(
        self,
        J_query: ExampleGradientLinearOperator,
        curvature: BlockDiagonalLinearOperator,
        k: int = 10,
    ) -> TopInfluences:
        """The extreme and neutral scores; see :func:`~curvlinops_diffusion.top_influences`.

        Args:
            J_query: The queries' gradients.
            curvature: The operator that the store was made with.
            k: How many of each.

        Raises:
            ValueError: As :meth:`scores`.
        """
        query_Qk = self.query_rows(J_query, curvature)
        N = self.num_data
        scorer = inner_products(N)([query_Qk.T])
        top = TopScores(lambda: scorer, N, check_count("k", k), ALONE)
        top.begin()
        for indices, rows_Bk in self.rows(query_Qk.device):
            top.add(indices, rows_Bk)
        return top.result

    def regression_scores(
        self,
        J_query: ExampleGradientLinearOperator,
        curvature: BlockDiagonalLinearOperator,
        ridge: float = 1.0,
        *,
        largest_gram: int = 20_000,
        gradient_bytes: int = GRADIENT_BYTES,
        max_iter: int = 100,
        tolerance: float = 1e-3,
    ) -> Tensor:
        """Those of :func:`~curvlinops_diffusion.kernel_regression_scores` of one function, read.

        The folder is read once if its gradients, in float32, fit into ``gradient_bytes``; else once
        more for each part that does, or twice an iteration beyond ``largest_gram``.

        Args:
            J_query: The queries' gradients.
            curvature: The operator that the store was made with.
            ridge: ``ρ``.
            largest_gram: Training examples up to which their kernel matrix is formed.
            gradient_bytes: Bytes of training gradients that are held at once.
            max_iter: Iterations of conjugate gradients at most.
            tolerance: Their relative residual.

        Raises:
            ValueError: As :meth:`scores`, or if the ridge is too small.
        """
        check_positive("ridge", ridge)
        N, query_Qk = self.num_data, self.query_rows(J_query, curvature)
        if check_count("largest_gram", largest_gram) < N:
            cross_QN = self._products(query_Qk)
            squares = sum(float(rows.square().sum()) for _, rows in self.rows(query_Qk.device))
            gram = _StoredGram(self.rows, N, query_Qk)
            return iterated_solution(cross_QN, gram, ridge * squares / N, max_iter, tolerance)
        cross_QN, gram_NN = query_Qk.new_zeros(len(query_Qk), N), torch.zeros(N, N)
        per_row = 4 * self.size
        for indices, held_bk in self._parts(check_count("gradient_bytes", gradient_bytes), per_row):
            cross_QN[:, indices] = query_Qk @ held_bk.to(query_Qk).T
            whole = [(indices, held_bk)] if len(indices) == N else self.rows(query_Qk.device)
            for others, rows_Bk in whole:
                products_bB = held_bk.to(query_Qk) @ rows_Bk.to(query_Qk).T
                gram_NN[torch.tensor(indices).unsqueeze(1), torch.tensor(others)] = (
                    products_bB.cpu()
                )
        return ridge_solution(cross_QN, gram_NN, ridge).to(query_Qk)

    def _parts(self, held: int, per_row: int) -> Iterator[tuple[list[int], Tensor]]:
        """Rows in parts of so many bytes, of at least one file."""
        indices: list[int] = []
        rows: list[Tensor] = []
        for some, rows_Bk in self.rows(torch.device("cpu")):
            if indices and (len(indices) + len(some)) * per_row > held:
                yield indices, torch.cat(rows)
                indices, rows = [], []
            indices = [*indices, *some]
            rows.append(rows_Bk)
        yield indices, torch.cat(rows)

    def query_rows(
        self, J_query: ExampleGradientLinearOperator, curvature: BlockDiagonalLinearOperator
    ) -> Tensor:
        """The queries' gradients in the store's coordinates, ``[Q, k]``, float32.

        Raises:
            ValueError: If the curvature is another one than the store was made with.
        """
        identity = self.header["identity"]
        here = {"curvature": curvature.info, "params": common_list(J_query.param_names)}
        there = {key: identity[key] for key in here}
        check_same(
            there,
            json.loads(json.dumps(here)),
            f"'{self._folder}' holds gradients for another curvature",
            "Pass the operator that it was made with.",
        )
        whiten = Whitening(curvature, identity["damping"], identity.get("relative", False))
        projection = {name: z.to(curvature.device) for name, z in self._projection.items()}
        P = curvature.shape[0]
        if "basis" in projection and len(projection["basis"]) != P:
            raise GRADIENTS.damaged(
                self._folder / "store.safetensors", f"coordinates of other than {P} parameters"
            )
        parts = [
            self._compression.project(whiten(rows_BP), projection)
            for _, rows_BP in J_query.row_batches()
        ]
        return torch.cat(parts).float()

    def rows(self, device: torch.device | None = None) -> Iterator[tuple[list[int], Tensor]]:
        """Yield indices and rows ``[B, k]`` of the training examples, float32.

        Args:
            device: Where to; ``None`` for the CPU.

        Raises:
            ValueError: If batches are missing, or damaged.
        """
        seen = 0
        for path in sorted(self._folder.glob("rows.*.safetensors")):
            header, stored = GRADIENTS.read(path)
            try:
                indices = [int(n) for n in header["indices"]]
                rows_Bk = self._compression.decode(stored, self.size)
                fits = rows_Bk.shape == (len(indices), self.size)
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                raise GRADIENTS.damaged(path, f"{type(error).__name__}: {error}") from error
            if not fits or not all(0 <= n < self.num_data for n in indices):
                raise GRADIENTS.damaged(path, "rows and examples do not fit together")
            seen += len(indices)
            yield indices, rows_Bk if device is None else rows_Bk.to(device)
        if seen < self.num_data:
            raise ValueError(
                f"'{self._folder}' holds {seen} of {self.num_data} training examples. Call "
                "GradientStore.create again with the same arguments to compute the others."
            )

    def _shard(self, number: int) -> Path:
        return self._folder / f"rows.{number:07}.safetensors"


class _StoredGram(LinearOperator):
    """``Z Zᵀ`` of stored rows, ``[N, N]``, which are read twice for each product.

    Args:
        rows: Yields indices and rows on a device.
        num_data: ``N``.
        like: Has the precision and device of the vectors.
    """

    def __init__(
        self,
        rows: Callable[[torch.device], Iterator[tuple[list[int], Tensor]]],
        num_data: int,
        like: Tensor,
    ):
        self._rows = rows
        super().__init__([(num_data,)], [(num_data,)], like=like)

    def multiply_tensors(self, X: list[Tensor]) -> list[Tensor]:
        """``Z (Zᵀ X)``."""
        (X_NK,) = X
        sums_kK = sum(rows_Bk.to(X_NK).T @ X_NK[some] for some, rows_Bk in self._rows(self.device))
        product_NK = torch.zeros_like(X_NK)
        for some, rows_Bk in self._rows(self.device):
            product_NK[some] = rows_Bk.to(X_NK) @ sums_kK
        return [product_NK]


def _fitted_projection(
    J_train: ExampleGradientLinearOperator, whiten: Whitening, compression: Compression
) -> dict[str, Tensor]:
    """Choose the coordinates that are kept, from evenly spaced training examples."""
    if compression.size is None or compression.projection is Projection.RANDOM:
        return {}
    N = J_train.shape[0]
    count = min(N, compression.sample)
    spaced = torch.linspace(0, N - 1, count, dtype=torch.float64).round().long().tolist()
    return compression.fit(whiten(J_train.rows(spaced)))


def _check_projection(projection: dict[str, Tensor], compression: Compression, size: int) -> None:
    """Check a projection that was read from a file.

    Raises:
        ValueError: If it is not what the compression chooses.
    """
    expected = {"basis"} if compression.projection is Projection.SVD else set()
    if set(projection) != expected:
        raise ValueError(f"a projection that keeps {sorted(projection)}")
    basis = projection.get("basis")
    if basis is not None and (basis.ndim != 2 or basis.shape[1] != size):
        raise ValueError("a basis of another shape")


def _size(
    J_train: ExampleGradientLinearOperator, projection: dict[str, Tensor], compression: Compression
) -> int:
    if compression.projection is Projection.RANDOM:
        assert compression.size is not None
        return compression.size
    return projection["basis"].shape[1] if "basis" in projection else J_train.shape[1]
