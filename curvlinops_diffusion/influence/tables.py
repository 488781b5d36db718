"""Tables of scores, or of their sums over groups of images, made and written in blocks of queries.

Legend: Q queries, q those of a block, N training images, K groups, M rows of a query: N or K.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlinops_diffusion.influence.agreement import NOT_TOLD, Agreement, SplitHalfScores
from curvlinops_diffusion.influence.measurements.registry import Better
from curvlinops_diffusion.influence.methods import Method
from curvlinops_diffusion.influence.score_files import better_of, helpful_sign
from curvlinops_diffusion.runtime.files import write_whole

#: Columns of a table by name, of some rows.
Columns = dict[str, np.ndarray]
# rows that are made at once, at least those of a query; and that are Python's objects at once
_ROWS = 1 << 18
_LINES = 1 << 14
_NUMBERS = dict.fromkeys(("score", "sum", "mean", "share"), "float64")
_TYPES = {**_NUMBERS, "rank": "int64", "count": "int64", "agreement": "bool"}
_OF_ROWS = ("image", "group", "score", "sum", "count", "mean")
_ORDER = ("query", *_OF_ROWS, "share", "rank", "effect", "agreement", "told", "method")
_TOLD = np.array(["no", "yes", "noise"], dtype=object)
# what a score says, of either sign; and one that looks at the images alone, and is never negative
_EFFECTS = {
    Better.LOWER: ("helps", "hinders"),
    Better.HIGHER: ("hinders", "helps"),
    Better.NEITHER: ("lowers it", "raises it"),
}
_ALIKE = ("alike", "unlike")


def table_blocks(
    by_method: Mapping[str, Any],
    header: Mapping[str, Any],
    halves: Mapping[str, Any] | None = None,
    *,
    groups: Sequence[str] | None = None,
    beside: Mapping[str, Sequence[str | None]] | None = None,
) -> Iterator[Columns]:
    """Yield the columns of a table, of each method and query the most helpful rows first.

    ``by_method`` has scores ``[Q, N]``, tensors or in files, ``halves`` pairs of those of either
    half of the draws or ``None``, and ``beside`` further columns with an entry for each training
    image. With ``groups``, one for each training image, rows are of groups: the sum of their scores
    is the influence of leaving out all of a group, to first order.

    Columns: ``query``; ``image`` and ``score``, or ``group``, ``sum``, ``count`` and ``mean``;
    ``share`` (of the query's measured value; none of methods without a unit), ``rank`` (from 1, the
    most helpful), ``effect`` (``helps``, ``hinders``; ``lowers it``, ``raises it`` where neither is
    good; ``alike`` of methods that look at the images alone), ``agreement`` (whether either half of
    the draws gives it the same sign, which of noise alone at most half of the rows have), ``told``
    (of images: ``yes``; ``no`` for what is within twice its uncertainty; ``noise`` for all of a
    query about which the halves agree no better than chance), ``method``.
    """
    queries, sign = _texts(header["queries"]), helpful_sign(header)
    own = {"image": _texts(header["train"])}
    own |= {name: _texts(column) for name, column in (beside or {}).items()}
    of_rows: Callable[[Tensor], Tensor] = torch.Tensor.double
    value = "score"
    if groups is not None:
        own, of_rows = _of_groups(groups)
        value = "sum"
    values = header.get("values") or [None] * len(queries)
    values_Q = np.array([abs(each) if each else np.nan for each in values])
    size = max(1, _ROWS // len(header["train"]))
    for method, scores in by_method.items():
        pair = None if halves is None else halves.get(method)
        named = Method(method)
        unit_Q = values_Q * (1 if named.has_unit(header) else np.nan)
        effects = _texts(("", *(_EFFECTS[better_of(header)] if named.takes_draws else _ALIKE)))
        for block in (slice(start, start + size) for start in range(0, len(queries), size)):
            z_qM = of_rows(_block(scores, block))
            order_qM = (sign * z_qM).argsort(dim=1, descending=True, stable=True)
            numbers, (q, M) = order_qM.flatten().numpy(), z_qM.shape
            z = z_qM.gather(1, order_qM).flatten().numpy()
            agreement, told = (np.full(q * M, None, dtype=object) for _ in range(2))
            if pair is not None:
                one_qM, other_qM = (of_rows(_block(half, block)) for half in pair)
                alike_qM = (one_qM.sign() == z_qM.sign()) & (other_qM.sign() == z_qM.sign())
                agreement = alike_qM.gather(1, order_qM).flatten().numpy()
                if groups is None:
                    told_qN = _told(z_qM, one_qM, other_qM)
                    told = _TOLD[told_qN.gather(1, order_qM).flatten().numpy()]
            found = {
                **{name: column[numbers] for name, column in own.items()},
                "query": queries[block].repeat(M),
                value: z,
                "share": z / unit_Q[block].repeat(M),
                "rank": np.tile(np.arange(1, M + 1), q),
                "effect": effects[1 * (z > 0) + 2 * (z < 0)],
                "agreement": agreement,
                "method": _texts([method]).repeat(q * M),
            }
            found |= {"told": told} if groups is None else {"mean": z / found["count"]}
            yield {name: found[name] for name in (*_ORDER, *(beside or ())) if name in found}


def _told(z_qN: Tensor, one_qN: Tensor, other_qN: Tensor) -> Tensor:
    """Places in ``_TOLD`` of scores, by whether they differ from zero by more than noise."""
    found = Agreement.of_halves(one_qN, other_qN)
    error_q = SplitHalfScores(z_qN, one_qN, other_qN).standard_error()
    told_qN = (z_qN.abs() > NOT_TOLD * error_q.unsqueeze(1)).long()
    told_qN[[q for q in range(len(z_qN)) if found.is_noise(q)]] = 2
    return told_qN


def _of_groups(groups: Sequence[str]) -> tuple[Columns, Callable[[Tensor], Tensor]]:
    """Columns of groups, and what sums scores ``[q, N]`` over them, ``[q, K]``."""
    numbers = {name: k for k, name in enumerate(dict.fromkeys(groups))}
    group_N = torch.tensor([numbers[name] for name in groups])

    def sums(z_qN: Tensor) -> Tensor:
        zeros_qK = torch.zeros(len(z_qN), len(numbers), dtype=torch.float64)
        return zeros_qK.index_add_(1, group_N, z_qN.double())

    return {"group": _texts(list(numbers)), "count": np.bincount(group_N.numpy())}, sums


def _block(scores: Any, block: slice) -> Tensor:
    """The scores of successive queries, ``[q, N]``, in main memory."""
    if isinstance(scores, Tensor):
        return scores[block].detach().cpu()
    found: Tensor = scores.rows(range(*block.indices(len(scores))))
    return found


def _texts(texts: Sequence[str | None]) -> np.ndarray:
    """Texts as an array, with what is no UTF-8 of file names spelled out."""
    found = np.empty(len(texts), dtype=object)
    found[:] = [None if t is None else t.encode(errors="backslashreplace").decode() for t in texts]
    return found


def check_table(path: Path) -> None:
    """Refuse, before anything is computed, a name or a package that makes a table impossible."""
    if path.suffix not in _WRITERS:
        raise ValueError(
            f"The name of a table must end in {' or '.join(_WRITERS)}, and that of scores with all "
            f"that is known of them in .safetensors, got '{path}'."
        )
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ValueError("Parquet needs pyarrow: pip install pyarrow.") from error


def write_table(path: Path, blocks: Iterable[Columns]) -> None:
    """Write a table as CSV or Parquet, whole or not at all, one block after the other."""
    check_table(path)
    write_whole(path, lambda temporary: _WRITERS[path.suffix](temporary, iter(blocks)))


def _write_csv(path: str, blocks: Iterator[Columns]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        for number, block in enumerate(blocks):
            if number == 0:
                table.writerow(block)
            for start in range(0, len(block["rank"]), _LINES):
                table.writerows(lines_of(block, slice(start, start + _LINES)))


def lines_of(block: Columns, rows: slice = slice(None)) -> Iterator[tuple[Any, ...]]:
    """The rows of a block as Python's objects, ``None`` for what is not known."""
    columns = (column[rows].tolist() for column in block.values())
    # NaN is the one that is not itself
    return zip(*([None if z != z else z for z in column] for column in columns), strict=True)  # noqa: PLR0124


def _write_parquet(path: str, blocks: Iterator[Columns]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    def table(block: Columns) -> Any:
        kinds = {name: pa.type_for_alias(_TYPES.get(name, "string")) for name in block}
        return pa.table({n: pa.array(z, kinds[n], from_pandas=True) for n, z in block.items()})

    first = table(next(blocks))
    with parquet.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        for block in blocks:
            writer.write_table(table(block))


_WRITERS = {".csv": _write_csv, ".parquet": _write_parquet}
