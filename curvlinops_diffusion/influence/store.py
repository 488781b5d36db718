"""Whitened training gradients in a folder, from which the scores of any query are read.

Legend: Q queries, N training examples, B a batch of them, P parameters, k coordinates kept, g
groups, O outputs, I inputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.influence.compression import Compression, Projection
from curvlinops_diffusion.influence.consumers import Scored, TopInfluences, TopScores
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.kernel_regression import iterated_solution, ridge_solution
from curvlinops_diffusion.influence.kernels import SOLVED, KernelOptions
from curvlinops_diffusion.influence.streaming import of_gradients
from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
from curvlinops_diffusion.linalg.operator import check_same_parameters, check_whole
from curvlinops_diffusion.linalg.placement import Arrangement
from curvlinops_diffusion.linalg.upstream import LinearOperator
from curvlinops_diffusion.runtime.adapters import common_list
from curvlinops_diffusion.runtime.checks import check_positive
from curvlinops_diffusion.runtime.files import FileKind, check_same, check_space, make_folder
from curvlinops_diffusion.runtime.passes import PLAIN, DrawsBar, PassOptions
from curvlinops_diffusion.runtime.processes import ALONE, Processes
from curvlinops_diffusion.runtime.sharded_networks import check_whole_parameters

GRADIENTS = FileKind(
    "curvlinops_diffusion.gradients",
    "a store of gradients",
    "Delete it, and call GradientStore.create again.",
)
# the file in a store's folder that says what it is of, and holds what all batches share
_HEADER = "store.safetensors"


class Whitening:
    r"""``z = (Λ + λ)^{-1/2} Uᵀ g``, with the eigenbasis of a K-FAC or EK-FAC operator.

    Inner products of whitened gradients are those with the damped inverse between them::

        z_q · z_n = ∇m_qᵀ (U Λ Uᵀ + λ)⁻¹ ∇ℓ_n

    Coordinates are ordered block by block.
    """

    def __init__(
        self, curvature: BlockDiagonalLinearOperator, damping: float, relative: bool = False
    ):
        check_whole(curvature, "Whitening")
        root = curvature.power(-0.5, damping, relative=relative)
        self._space = curvature.space
        self._placed = [
            (placed, placed.block.eigen(placed.name), rooted.block.eigen(placed.name).eigenvalues)
            for placed, rooted in zip(curvature.blocks, root.blocks, strict=True)
        ]

    def __call__(self, rows_BP: Tensor) -> Tensor:
        """Whiten gradients, ``[B, P] -> [B, P]``."""
        pieces = zip(self._space.shapes.items(), rows_BP.split(self._space.sizes, 1), strict=True)
        named = {name: piece.T.reshape(*shape, -1) for (name, shape), piece in pieces}
        coordinates = []
        for placed, block, scale in self._placed:
            arrangement = Arrangement(block.shape, placed.transposed)
            X_gOIB = arrangement.gather([named[name] for name in placed.params])
            there = placed.with_block(block).on(rows_BP.device).block.eigen(placed.name)
            z_gOIB = there.coordinates(X_gOIB) * scale.to(rows_BP.device).unsqueeze(-1)
            coordinates.append(z_gOIB.flatten(0, -2).T)
        return torch.cat(coordinates, 1)


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
                f"`curvature` must be K-FAC or EK-FAC itself, which the store inverts with its own "
                f"damping, got its power {exponent:g}."
            )
        folder = Path(folder)
        processes = Processes.of(passes.distributed)
        identity = J_train.regression.identity(
            {
                **of_gradients(J_train),
                "curvature": curvature.info,
                "damping": damping,
                "compression": compression.as_dict(),
                "relative": relative,
            },
        )
        whiten = Whitening(curvature, damping, relative)
        if processes.rank == 0 and not (folder / _HEADER).exists():
            make_folder(folder)
            N, size, projection = J_train.shape[0], compression.size or J_train.shape[1], {}
            if compression.projection is Projection.SVD:
                spaced = torch.linspace(0, N - 1, min(N, compression.sample), dtype=torch.float64)
                projection = compression.fit(whiten(J_train.rows(spaced.round().long().tolist())))
            GRADIENTS.write(folder / _HEADER, projection, {"identity": identity, "size": size})
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
        regression, shown = J_train.regression, passes.progressbar and processes.rank == 0
        with DrawsBar(regression.num_samples, "Storing gradients", shown) as bar:
            for number, clean in regression.numbered_batches(
                lambda n: processes.takes(n) and not store._shard(n).exists()
            ):
                z_Bk = compression.project(whiten(J_train.rows_of(clean)), store._projection)
                header = {"indices": list(clean.indices)}
                GRADIENTS.write(store._shard(number), compression.encode(z_Bk), header)
                bar.batch_done(len(clean.indices) * regression.num_draws)
        processes.barrier()
        return store

    @classmethod
    def open(cls, folder: str | PathLike[str]) -> GradientStore:
        """Open a folder.

        Raises:
            ValueError: If it holds no gradients, or they are damaged.
        """
        folder = Path(folder)
        path = folder / _HEADER
        header, projection = GRADIENTS.read(path)
        try:
            store = cls(folder, header, projection)
            expected = {"basis"} if store._compression.projection is Projection.SVD else set()
            if set(projection) != expected:
                raise ValueError(f"a projection that keeps {sorted(projection)}")
            if any(basis.shape[1:] != (store.size,) for basis in projection.values()):
                raise ValueError("a basis of another shape")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise GRADIENTS.damaged(path, f"{type(error).__name__}: {error}") from error
        return store

    @property
    def bytes_per_example(self) -> float:
        """Bytes on disk for each training example, without what all share."""
        return self._stored_bytes() / self.num_data

    def _stored_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._folder.glob("rows.*.safetensors"))

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
        top = TopScores(self.num_data, k, ALONE)
        scored = Scored(top, [lambda: query_Qk.T], self.num_data)
        scored.begin()
        for indices, rows_Bk in self.rows(query_Qk.device):
            scored.add(indices, rows_Bk)
        return top.result

    def regression_scores(
        self,
        J_query: ExampleGradientLinearOperator,
        curvature: BlockDiagonalLinearOperator,
        ridge: float = 1.0,
        options: KernelOptions = SOLVED,
    ) -> Tensor:
        """Scores of :func:`~curvlinops_diffusion.kernel_regression_scores`, of one function.

        The folder is read once if its gradients, in float32, fit into ``options.gradient_bytes``;
        else once more for each part that does, or twice an iteration beyond
        ``options.largest_gram``.

        Args:
            J_query: The queries' gradients.
            curvature: The operator that the store was made with.
            ridge: ``ρ``.
            options: How the regression is solved.

        Raises:
            ValueError: As :meth:`scores`, or if the ridge is too small.
        """
        check_positive("ridge", ridge)
        N, query_Qk = self.num_data, self.query_rows(J_query, curvature)
        if options.largest_gram < N:
            cross_QN = self._products(query_Qk)
            squares = sum(float(rows.square().sum()) for _, rows in self.rows(query_Qk.device))
            gram = _StoredGram(self, query_Qk)
            return iterated_solution(cross_QN, gram, ridge * squares / N, options)
        cross_QN, gram_NN = query_Qk.new_zeros(len(query_Qk), N), torch.zeros(N, N)
        for indices, held_bk in self._parts(options.gradient_bytes):
            cross_QN[:, indices] = query_Qk @ held_bk.to(query_Qk).T
            whole = [(indices, held_bk)] if len(indices) == N else self.rows(query_Qk.device)
            for others, rows_Bk in whole:
                place = torch.tensor(indices).unsqueeze(1), torch.tensor(others)
                gram_NN[place] = (held_bk.to(query_Qk) @ rows_Bk.to(query_Qk).T).cpu()
        return ridge_solution(cross_QN, gram_NN, ridge).to(query_Qk)

    def _parts(self, held: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield rows in parts of so many bytes, of at least one file."""
        indices: list[int] = []
        rows: list[Tensor] = []
        for some, rows_Bk in self.rows():
            if indices and (len(indices) + len(some)) * 4 * self.size > held:
                yield indices, torch.cat(rows)
                indices, rows = [], []
            indices = [*indices, *some]
            rows.append(rows_Bk)
        yield indices, torch.cat(rows)

    def query_rows(
        self, J_query: ExampleGradientLinearOperator, curvature: BlockDiagonalLinearOperator
    ) -> Tensor:
        """Return the queries' gradients in the store's coordinates, ``[Q, k]``, float32.

        Raises:
            ValueError: If the curvature is another one than the store was made with.
        """
        identity = self.header["identity"]
        here = {"curvature": curvature.info, "params": common_list(J_query.param_names)}
        check_same(
            {key: identity[key] for key in here},
            json.loads(json.dumps(here)),
            f"'{self._folder}' holds gradients for another curvature",
            "Pass the operator that it was made with.",
        )
        whiten = Whitening(curvature, identity["damping"], identity["relative"])
        projection = {name: z.to(curvature.device) for name, z in self._projection.items()}
        P = curvature.shape[0]
        if any(len(basis) != P for basis in projection.values()):
            reason = f"coordinates of other than {P} parameters"
            raise GRADIENTS.damaged(self._folder / _HEADER, reason)
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
    """``Z Zᵀ`` of stored rows, ``[N, N]``, which are read twice for each product."""

    def __init__(self, store: GradientStore, like: Tensor):
        self._rows = store.rows
        super().__init__([(store.num_data,)], [(store.num_data,)], like=like)

    def multiply_tensors(self, X: list[Tensor]) -> list[Tensor]:
        """``Z (Zᵀ X)``."""
        (X_NK,) = X
        sums_kK = sum(rows_Bk.to(X_NK).T @ X_NK[some] for some, rows_Bk in self._rows(self.device))
        product_NK = torch.zeros_like(X_NK)
        for some, rows_Bk in self._rows(self.device):
            product_NK[some] = rows_Bk.to(X_NK) @ sums_kK
        return [product_NK]
