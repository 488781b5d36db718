"""Results of attribution: scores of the training images for each query, and how sure they are.

Legend: Q queries, N training images, k the first of a query's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from torch import Tensor

from curvlinops_diffusion.influence.agreement import Agreement, SplitHalfScores
from curvlinops_diffusion.influence.measurements.registry import Better
from curvlinops_diffusion.influence.methods import Method
from curvlinops_diffusion.influence.score_files import better_of, helpful_sign, write_scores
from curvlinops_diffusion.influence.stored_scores import StoredScores
from curvlinops_diffusion.influence.tables import Columns, lines_of, table_blocks, write_table
from curvlinops_diffusion.linalg.operator_files import read_header
from curvlinops_diffusion.page.gallery import Gallery, group_names
from curvlinops_diffusion.runtime.checks import check_count
from curvlinops_diffusion.runtime.files import check_same

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


@dataclass(frozen=True)
class GroupInfluence:
    """The influence of a group of training images on a query.

    Attributes:
        query: The query's name.
        group: The group's.
        sum: The sum of its images' scores: where these are predicted changes of the measured value,
            that had the model been trained without any of them, to first order (Koh et al., 2019).
        count: How many images it has.
        mean: The sum of one image, on average.
        share: The sum as a share of the query's measured value; ``None`` where that is not known.
        rank: Its place among the groups, from 1, the most helpful.
        effect: ``'helps'`` or ``'hinders'``; ``'lowers it'`` or ``'raises it'`` where neither sign
            of what was measured is good; ``'alike'`` of methods that look at the images alone.
        agreement: Whether the sums of either half of the draws have the same sign; ``None`` where
            the draws cannot be halved.
        method: The method.
    """

    query: str
    group: str
    sum: float
    count: int
    mean: float
    share: float | None
    rank: int
    effect: str
    agreement: bool | None
    method: str


@dataclass(frozen=True, eq=False)
class Attribution:
    """Scores of every training image for every query.

    Attributes:
        scores: The scores of the first method, ``[Q, N]``. Of ``influence``, and of ``regression``
            with held-out images that tell the generalisation gap, predicted changes of the measured
            value had the model been trained without the image; of others, only their order says
            something.
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
        stored = StoredScores.open(path)
        header = stored.header
        if not all(hasattr(given, "caption") for given in (images, queries)):
            with needs_extra("Reading images"):
                from curvlinops_diffusion.loading.images import open_images
                from curvlinops_diffusion.loading.labels import Condition
                from curvlinops_diffusion.loading.layout import Layout
                from curvlinops_diffusion.loading.preprocessing import Form
            form: dict[str, Any] = {"channels": None, "resolution": None, **header.get("form", {})}
            # whatever stands beside images, where the network's condition is not known
            known = header.get("condition")
            seen = Form(size=None, **form)
            condition = None if known is None else Condition(**known)
            beside: dict[str, Any] = {"layout": Layout(**header.get("layout", {}))}
            images = open_images(images, seen, condition, **beside)
            beside |= {"prompts": header.get("prompt")}
            queries = open_images(queries, seen, condition, images, **beside)
        for gallery, names, what in (
            (images, header["train"], "images"),
            (queries, header["queries"], "queries"),
        ):
            if list(gallery.names) != names:
                raise ValueError(
                    f"`{what}` must be the {len(names)} images that '{path}' is of, got "
                    f"{len(gallery.names)} others. Pass those that were scored."
                )
        by_method, halves = stored.by_method, dict.fromkeys(stored.by_method)
        if not header.get("shards"):  # of many shards too large to be held
            for method, pair in stored.halves.items():
                whole = [scores.whole() for scores in (by_method[method], *(pair or ()))]
                halves[method] = None if pair is None else SplitHalfScores(*whole)
        return cls(by_method, halves, header, images, queries)

    @property
    def scores(self) -> Tensor:
        """The scores of the first method, ``[Q, N]``."""
        return _whole(next(iter(self.by_method.values())))

    @property
    def agreement(self) -> Agreement | None:
        """Agreement of two halves of the draws; ``None`` where the draws cannot be halved."""
        return Agreement.of_header(self.header)

    @property
    def better(self) -> Better:
        """Which values of what was measured are good, and so which sign of a score helps."""
        return better_of(self.header)

    def top(self, k: int = 5) -> list[list[RankedImage]]:
        """The ``k`` training images that helped each query most, the most helpful first.

        Where neither sign means helpful (:attr:`better`), those with the largest scores.

        Args:
            k: How many.

        Raises:
            ValueError: If ``k`` is no whole number of at least 1.
        """
        check_count("k", k)
        sign = helpful_sign(self.header)
        return [
            [
                RankedImage(self.train.names[n], float(scores_N[n]), rank)
                for rank, n in enumerate((sign * scores_N).argsort(descending=True).tolist()[:k], 1)
            ]
            for scores_N in next(iter(self.by_method.values()))
        ]

    def groups(self, by: str | Sequence[str]) -> list[GroupInfluence]:
        """The influence of groups of training images on each query, the most helpful first.

        By several methods the first comes first. ``pandas.DataFrame`` makes a table of them.

        Args:
            by: ``'folder'`` of the images; ``'class'``; a column of the metadata or data set,
                ``'artist'`` say; or the name of a group for each image.

        Raises:
            ValueError: If the images have nothing of that name, or names are not one for each.
        """
        return [GroupInfluence(*line) for block in self._blocks(by) for line in lines_of(block)]

    def to_pandas(self) -> pd.DataFrame:
        """The scores as a table, a row for each method, query and training image.

        The most helpful first. Columns: ``query``; ``image``; ``score``; ``share``, the score
        divided by the query's measured value; ``rank``, from 1; ``effect``, what the image does
        (``helps``, ``hinders``); ``agreement``, whether either half of the draws gives the score
        the same sign, which of noise alone at most half of the rows have; ``told``, ``yes``, ``no``
        for what is within twice its uncertainty, or ``noise`` where the halves agree about the
        query no better than chance; ``method``; and the image's ``caption`` and ``path``, if it has
        any.

        Raises:
            ValueError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ValueError("A table needs pandas: pip install pandas.") from error
        return pd.concat(map(pd.DataFrame, self._blocks()), ignore_index=True)

    def pair_of(self, method: str) -> tuple[Tensor | StoredScores, Tensor | StoredScores] | None:
        """The scores of either half of the draws, in memory or in files; ``None`` without halves.

        Args:
            method: The method.
        """
        held, scores = self.halves[method], self.by_method[method]
        if held is not None:
            return held.first, held.second
        return scores.halves[method] if isinstance(scores, StoredScores) else None

    def _blocks(self, group_by: str | Sequence[str] | None = None) -> Iterator[Columns]:
        """Blocks of a table of images, or of groups."""
        halves = {method: self.pair_of(method) for method in self.by_method}
        if group_by is not None:
            groups = group_names(self.train, group_by)
            return table_blocks(self.by_method, self.header, halves, groups=groups)
        numbers, paths = range(len(self.train.names)), getattr(self.train, "paths", None)
        beside: dict[str, Sequence[str | None]] = {
            "caption": [self.train.caption(n) for n in numbers],
            "path": [None for n in numbers] if paths is None else paths,
        }
        return table_blocks(self.by_method, self.header, halves, beside=beside)

    def save(
        self, path: str | PathLike[str], *, group_by: str | Sequence[str] | None = None
    ) -> None:
        """Write the scores with everything that is known of them to a safetensors file, or a table.

        Those of the first method are called ``scores``, with halves of the draws ``first`` and
        ``second``; those of others by their methods, with halves ``regression/first``, say. Never
        half-written. :class:`~curvlinops_diffusion.StoredScores` and the program's ``report``
        read it.

        Args:
            path: Where to; ending in ``.safetensors``, or in ``.csv`` or ``.parquet`` for the table
                of :meth:`to_pandas`, which is written as it is made, however long.
            group_by: For a table of groups, what :meth:`groups` takes.

        Raises:
            ValueError: If the name ends in something else, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            write_table(path, self._blocks(group_by))
            return
        if group_by is not None:
            raise ValueError(
                f"`group_by` must be left out for a file of scores, got '{path}'. Pass a name that "
                "ends in .csv or .parquet."
            )
        tensors: dict[str, Tensor] = {}
        for place, (method, scores_QN) in enumerate(self.by_method.items()):
            halves, prefix = self.halves[method], f"{method}/" if place else ""
            tensors[method if place else "scores"] = _whole(scores_QN)
            if halves is not None:
                tensors[f"{prefix}first"] = halves.first
                tensors[f"{prefix}second"] = halves.second
        write_scores(path, tensors, self.header)

    def report(
        self,
        path: str | PathLike[str],
        *,
        top: int = 8,
        group_by: str | Sequence[str] | None = None,
        operator: str | PathLike[str] | None = None,
    ) -> int:
        """Write a page with the images that helped and hindered each query most.

        One HTML file, with the images in it. The first method orders, and each has its number.

        Args:
            path: Where to.
            top: Training images in each row of a query.
            group_by: What groups of training images do to each query is shown, too: by their
                ``'folder'`` or ``'class'``, by a column of their metadata, or by a name for each.
            operator: A file of the curvature, to show its spectrum and blocks.

        Returns:
            The size of the page in bytes.

        Raises:
            ValueError: If the examples are no images or not those that were scored, the operator is
                another, or the page cannot be written.
        """
        with needs_extra("A page"):
            from curvlinops_diffusion.page.report import write_report
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
        groups = () if group_by is None else self.groups(group_by)
        return write_report(path, self.by_method, *shown, top=top, groups=groups, operator=operator)

    def __str__(self) -> str:
        """Say what there is and how sure it is."""
        Q, N = next(iter(self.by_method.values())).shape
        sure = self.agreement
        told = sure or "How sure they are is not known: that takes multiples of 4 draws."
        if not Method(next(iter(self.by_method))).takes_draws:
            told = "They look at the images alone: no draws could make them surer."
        methods = " and ".join(self.by_method)
        return f"{Q} × {N} scores, of queries and training images, by {methods}. {told}"


def _whole(scores: Tensor | StoredScores) -> Tensor:
    return scores.whole() if isinstance(scores, StoredScores) else scores


@contextmanager
def needs_extra(what: str) -> Iterator[None]:
    """Say what to install if a package is missing that something needs.

    Raises:
        ValueError: If it is.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{what} needs {error.name}: pip install 'curvlinops-diffusion[cli]'."
        ) from error
