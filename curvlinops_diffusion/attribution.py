"""Results of attribution: scores of the training images for each query, and how sure they are.

Legend: Q queries, N training images, k the first of a query's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from curvlinops_diffusion.influence.agreement import Agreement, SplitHalfScores
from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS, Better
from curvlinops_diffusion.influence.score_files import (
    COLUMNS,
    helpful_sign,
    table_rows,
    write_scores,
    write_table,
)
from curvlinops_diffusion.page.gallery import Gallery
from curvlinops_diffusion.runtime.checks import check_count

if TYPE_CHECKING:
    import pandas as pd


class RankedImage(NamedTuple):
    """A training image among those of a query.

    Attributes:
        name: Its name.
        score: Its score.
        rank: Its place, from 1.
    """

    name: str
    score: float
    rank: int


@dataclass(frozen=True, eq=False)
class Attribution:
    """Scores of every training image for every query.

    Attributes:
        scores: The scores of the first method, ``[Q, N]``. Of ``influence``, predicted changes of
            the measured value had the model been trained without the image; those of
            ``regression`` have no unit, only their order says something.
        by_method: The scores of each method.
        halves: Those of two halves of the draws, by method; ``None`` where the draws cannot be
            halved.
        header: What the scores were made from, as a file of scores holds it.
        train: The training images, with names and captions.
        queries: The queries, likewise.
    """

    by_method: Mapping[str, Tensor]
    halves: Mapping[str, SplitHalfScores | None]
    header: Mapping[str, Any]
    train: Gallery = field(repr=False)
    queries: Gallery = field(repr=False)

    @property
    def scores(self) -> Tensor:
        """The scores of the first method, ``[Q, N]``."""
        return next(iter(self.by_method.values()))

    @property
    def agreement(self) -> Agreement | None:
        """Agreement of two halves of the draws; ``None`` where the draws cannot be halved."""
        return Agreement.of_header(self.header)

    @property
    def better(self) -> Better:
        """Which values of what was measured are good, and so which sign of a score helps."""
        measured = self.header["identity"]["query"].get("measurement", "")
        entry = MEASUREMENTS.get(measured)
        return Better.LOWER if entry is None else entry.better

    def top(self, k: int = 5) -> list[list[RankedImage]]:
        """The ``k`` training images that helped each query most, the most helpful first.

        Where neither sign means helpful (:attr:`better`), those with the largest scores.

        Args:
            k: How many.

        Raises:
            ValueError: If ``k`` is no whole number of at least 1.
        """
        k = min(check_count("k", k), self.scores.shape[1])
        order_Qk = (helpful_sign(self.header) * self.scores).topk(k).indices
        return [
            [
                RankedImage(self.train.names[n], float(scores_N[n]), rank)
                for rank, n in enumerate(order_k.tolist(), 1)
            ]
            for scores_N, order_k in zip(self.scores, order_Qk, strict=True)
        ]

    def to_pandas(self) -> pd.DataFrame:
        """The scores as a table, a row for each method, query and training image.

        The most helpful first. Columns: ``query``, ``image``, ``score``, ``rank`` (1 is the most
        helpful), ``method``, and ``caption`` (the image's).

        Raises:
            ValueError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ValueError("A table needs pandas: pip install pandas.") from error
        table = pd.DataFrame(table_rows(self.by_method, self.header), columns=COLUMNS)
        captions = {name: self.train.caption(n) for n, name in enumerate(self.train.names)}
        return table.assign(caption=table["image"].map(captions))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the scores with everything that is known of them to a safetensors file, or a table.

        Those of the first method are called ``scores``, with halves of the draws ``first`` and
        ``second``; those of others by their methods, with halves ``regression/first``, say. Never
        half-written. :class:`~curvlinops_diffusion.StoredScores` and the program's ``report``
        read it.

        Args:
            path: Where to; ending in ``.csv`` or ``.parquet`` for the table of :meth:`to_pandas`,
                without captions.

        Raises:
            ValueError: If the file cannot be written.
        """
        path = Path(path)
        if path.suffix in (".csv", ".parquet"):
            write_table(path, table_rows(self.by_method, self.header))
            return
        tensors: dict[str, Tensor] = {}
        for place, (method, scores_QN) in enumerate(self.by_method.items()):
            halves, prefix = self.halves[method], f"{method}/" if place else ""
            tensors[method if place else "scores"] = scores_QN
            if halves is not None:
                tensors[f"{prefix}first"] = halves.first
                tensors[f"{prefix}second"] = halves.second
        write_scores(path, tensors, self.header)

    def report(self, path: str | PathLike[str], *, top: int = 8) -> None:
        """Write a page with the images that helped and hindered each query most.

        One HTML file, with the images in it.

        Args:
            path: Where to.
            top: Training images in each row of a query.

        Raises:
            ValueError: If the examples are no images, or the page cannot be written.
        """
        try:
            from curvlinops_diffusion.page.report import write_report
        except ImportError as error:
            raise ValueError(
                f"A page needs {error.name}: pip install 'curvlinops-diffusion[cli]'."
            ) from error
        write_report(path, self.scores, self.header, self.train, self.queries, top=top)

    def __str__(self) -> str:
        """Say what there is and how sure it is."""
        Q, N = self.scores.shape
        sure = self.agreement
        told = "How sure they are is not known." if sure is None else f"{sure}"
        return f"{Q} × {N} scores, of queries and training images, by {self._methods()}. {told}"

    def _methods(self) -> str:
        names: Sequence[str] = list(self.by_method)
        return " and ".join(names)
