"""Results of attribution: scores of the training images for each query, and how sure they are.

Legend: Q queries, N training images, k the first of a query's.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from torch import Tensor

from curvlinops_diffusion.influence.agreement import Agreement
from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS, Better
from curvlinops_diffusion.influence.read_scores import read_scores, whole
from curvlinops_diffusion.influence.score_files import SCORES, write_scores
from curvlinops_diffusion.influence.split_half import SplitHalfScores
from curvlinops_diffusion.influence.stored_scores import StoredScores
from curvlinops_diffusion.linalg.operator_files import read_header
from curvlinops_diffusion.page.gallery import Gallery
from curvlinops_diffusion.runtime.checks import check_count
from curvlinops_diffusion.runtime.files import check_same, write_bytes

if TYPE_CHECKING:
    import pandas as pd


#: The columns of the table of scores.
COLUMNS = ("query", "image", "score", "rank", "caption", "method")


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
        by_method: The scores of each method, of which the first orders; in files if each process
            has written its own.
        halves: Those of two halves of the draws, by method; ``None`` where the draws cannot be
            halved, and of a file.
        header: What the scores were made from, as a file of scores holds it.
        train: The training images, with names and captions.
        queries: The queries, likewise.
    """

    by_method: Mapping[str, Tensor | StoredScores]
    halves: Mapping[str, SplitHalfScores | None]
    header: Mapping[str, Any]
    train: Gallery = field(repr=False)
    queries: Gallery = field(repr=False)

    @classmethod
    def load(cls, path: str | PathLike[str], images: Any, queries: Any) -> Self:
        """Scores of a file, with the images that they are of.

        Args:
            path: The file that :meth:`save` or the program wrote.
            images: The training images, as they were given to
                :meth:`Attributor.from_pipeline`: a folder, say.
            queries: The queries, likewise.

        Raises:
            ValueError: If the file is damaged or of another version, or was made of other images.
        """
        path = Path(path)
        scores, header = read_scores(path)
        if not all(hasattr(given, "caption") for given in (images, queries)):
            try:
                from curvlinops_diffusion.loading.given import given_images
                from curvlinops_diffusion.loading.labels import Condition
                from curvlinops_diffusion.loading.preprocessing import Form
            except ImportError as error:
                raise _needs_extra("Reading images", error) from error
            seen = header.get("form", {"channels": None, "resolution": None})
            form = Form(seen["channels"], None, seen["resolution"])
            # whatever stands beside images, where the network's condition is not known
            known = header.get("condition")
            condition: Any = None if known is None else Condition(**known)
            images = given_images(images, form, condition)
            prompt = {"prompts": header.get("prompt")}
            queries = given_images(queries, form, condition, images, **prompt)
        for gallery, names, what in (
            (images, header["train"], "images"),
            (queries, header["queries"], "queries"),
        ):
            if list(gallery.names) != names:
                raise ValueError(
                    f"`{what}` are {len(gallery.names)} that are not the {len(names)} that "
                    f"'{path}' is of. Pass those that were scored."
                )
        first, *others = header.get("methods", ["influence"])
        tensors = SCORES.read(path)[1] if others else {}
        by_method = {first: scores, **{name: tensors[name] for name in others}}
        return cls(by_method, dict.fromkeys(by_method), header, images, queries)

    @property
    def scores(self) -> Tensor:
        """The scores of the first method, ``[Q, N]``."""
        return whole(next(iter(self.by_method.values())))

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
        check_count("k", k)
        return [
            [
                RankedImage(self.train.names[n], float(scores_N[n]), rank)
                for rank, n in enumerate(self._order(scores_N)[:k], 1)
            ]
            for scores_N in next(iter(self.by_method.values()))
        ]

    def _order(self, scores_N: Tensor) -> list[int]:
        """The numbers of the training images, the most helpful first."""
        sign = -1 if self.better is Better.HIGHER else 1
        order: list[int] = (sign * scores_N).argsort(descending=True, stable=True).tolist()
        return order

    def rows(self) -> Iterator[tuple[str, str, float, int, str, str]]:
        """Yield a row of the table for each method, query and training image, in their order.

        The query, the image, the score, its rank (1 is the most helpful), the image's caption, and
        the method.
        """
        captions = [self.train.caption(n) for n in range(len(self.train.names))]
        for method, scores_QN in self.by_method.items():
            for query, scores_N in zip(self.queries.names, scores_QN, strict=True):
                for rank, n in enumerate(self._order(scores_N), 1):
                    image = self.train.names[n]
                    yield query, image, float(scores_N[n]), rank, captions[n], method

    def to_pandas(self) -> pd.DataFrame:
        """The scores as a table with a row for each method, query and training image.

        Columns: ``query``, ``image``, ``score``, ``rank`` (1 is the most helpful), ``caption`` (the
        image's), and ``method``.

        Raises:
            ValueError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ValueError("A table needs pandas: pip install pandas.") from error
        return pd.DataFrame(self.rows(), columns=COLUMNS)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the table of :meth:`to_pandas` to a file, without pandas.

        Args:
            path: Where to.

        Raises:
            ValueError: If the file cannot be written.
        """
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(self.rows())
        write_bytes(Path(path), text.getvalue().encode())

    def save(self, path: str | PathLike[str]) -> None:
        """Write the scores with everything that is known of them to a safetensors file.

        Those of the first method are called ``scores``, those of others by their methods. Never
        half-written. :class:`~curvlinops_diffusion.StoredScores` and the program's ``report``
        read it.

        Args:
            path: Where to.

        Raises:
            ValueError: If the file cannot be written.
        """
        (first, scores_QN), *others = self.by_method.items()
        halves = self.halves[first]
        write_scores(
            Path(path),
            whole(scores_QN),
            {"train": self.train.names, "queries": self.queries.names},
            halves=None if halves is None else (halves.first, halves.second),
            others={name: whole(scores) for name, scores in others},
            **{k: v for k, v in self.header.items() if k not in ("train", "queries")},
        )

    def report(
        self,
        path: str | PathLike[str],
        *,
        top: int = 8,
        operator: str | PathLike[str] | None = None,
    ) -> int:
        """Write a page with the images that helped and hindered each query most.

        One HTML file, with the images in it. The first method orders, and each has its number.

        Args:
            path: Where to.
            top: Training images in each row of a query.
            operator: A file of the curvature, to show its spectrum and blocks.

        Returns:
            The size of the page in bytes.

        Raises:
            ValueError: If the examples are no images or not those that were scored, the operator is
                another, or the page cannot be written.
        """
        try:
            from curvlinops_diffusion.page.report import write_report
        except ImportError as error:
            raise _needs_extra("A page", error) from error
        if operator is not None:
            there = {k: v for k, v in read_header(operator)["info"].items() if k != "run"}
            check_same(
                self.header["identity"].get("operator", {}),
                there,
                f"`operator` '{operator}' is not that of the scores",
                "Pass the one that they were made with.",
            )
        check_count("top", top)
        shown = (self.header, self.train, self.queries)
        return write_report(path, self.by_method, *shown, top=top, operator=operator)

    def __str__(self) -> str:
        """Say what there is and how sure it is."""
        Q, N = next(iter(self.by_method.values())).shape
        sure = self.agreement
        told = f"{sure}" if sure else "How sure they are is not known."
        methods = " and ".join(self.by_method)
        return f"{Q} × {N} scores, of queries and training images, by {methods}. {told}"


def _needs_extra(what: str, error: ImportError) -> ValueError:
    return ValueError(f"{what} needs {error.name}: pip install 'curvlinops-diffusion[cli]'.")
