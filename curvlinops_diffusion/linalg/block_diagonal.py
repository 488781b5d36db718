"""Block-diagonal matrices on a parameter space: K-FAC, EK-FAC, their inverses and powers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape
from os import PathLike
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from curvlinops_diffusion.linalg.blocks import EigenBlock
from curvlinops_diffusion.linalg.operator import ParameterSpaceOperator
from curvlinops_diffusion.linalg.parameters import ParameterSpace
from curvlinops_diffusion.linalg.placement import PlacedBlock, moved
from curvlinops_diffusion.linalg.storage import save_blocks
from curvlinops_diffusion.runtime.checks import check_non_negative
from curvlinops_diffusion.runtime.processes import ALONE, Processes

_COLUMNS = ("block", "kind", "parameters", "shape", "MiB", "trace")
_SHOWN = 12  # rows at the start and at the end of a shortened table


class BlockDiagonalLinearOperator(ParameterSpaceOperator):
    """``P @ blockdiag(F_1, F_2, …) @ Pᵀ``, with ``P`` sorting parameters into blocks.

    The common form of K-FAC, EK-FAC, their inverses and powers. Vectors are in the formats of
    ``curvlinops``: flat ``[P]``, matrix ``[P, K]``, or a list of tensors shaped like the
    parameters, optionally with a trailing axis ``K``.

    Blocks may be shared among processes: each holds some, and what is done with the operator is
    done by all of them together. Each process passes the same vectors and has the whole product,
    for which the blocks' products are gathered once.

    Args:
        space: The parameter space.
        blocks: The blocks; those of all processes together hold every parameter once.
        info: How the operator was made, for the header of a saved file.
        processes: The processes that hold blocks.

    Attributes:
        blocks: The blocks of this process.
        info: How the operator was made.
        processes: The processes that hold blocks.
    """

    KIND: ClassVar[str] = "block-diagonal"

    def __init__(
        self,
        space: ParameterSpace,
        blocks: Sequence[PlacedBlock],
        info: dict[str, Any],
        processes: Processes = ALONE,
    ):
        super().__init__(space)
        self.blocks = tuple(blocks)
        self.info = info
        self.processes = processes
        own = [name for placed in self.blocks for name in placed.params]
        held = [name for names in processes.all_gather(own) for name in names]
        assert sorted(held) == sorted(space.shapes), "blocks must hold every parameter once"

    @classmethod
    def of_blocks(
        cls,
        space: ParameterSpace,
        blocks: Sequence[PlacedBlock],
        info: dict[str, Any],
        processes: Processes = ALONE,
    ) -> Self:
        """An operator of this class with given blocks, which its own constructor would compute."""
        operator = cls.__new__(cls)
        BlockDiagonalLinearOperator.__init__(operator, space, blocks, info, processes)
        return operator

    @property
    def nbytes(self) -> int:
        """Memory of this process' blocks; tensors that two share are counted once."""
        tensors = [z for placed in self.blocks for z in placed.block.tensors().values()]
        return sum({(z.data_ptr(), z.shape): z.nbytes for z in tensors}.values())

    def multiply_tensors(self, X: list[Tensor]) -> list[Tensor]:
        """Multiply onto matrices in tensor list format ``[*shape, K]``."""
        given = {name: x.to(self.dtype) for name, x in zip(self.space.shapes, X, strict=True)}
        result: dict[str, Tensor] = {}
        for placed in self.blocks:
            result |= placed.on(self.device).multiply(given)
        result = self.processes.all_gather_tensors(result, X[0].device)
        return [result[name] for name in self.space.shapes]

    def table(self) -> list[dict[str, Any]]:
        """A row for each block of this process, as plain values.

        Returns:
            Rows with ``block`` (its name), ``kind`` (``'Kronecker'``, ``'eigenbasis'``,
            ``'dense'``, ``'diagonal'``), ``parameters`` (entries), ``shape`` (``[*groups, outputs,
            inputs]``), ``bytes`` (memory) and ``trace_share`` (of these blocks' trace).
        """
        traces = [float(placed.block.trace()) for placed in self.blocks]
        total = sum(traces)
        return [
            {
                "block": placed.name,
                "kind": placed.kind,
                "parameters": placed.num_entries,
                "shape": placed.block.shape,
                "bytes": placed.num_bytes,
                "trace_share": trace / total if total > 0 else 0.0,
            }
            for placed, trace in zip(self.blocks, traces, strict=True)
        ]

    def __str__(self) -> str:
        """The blocks as a table, and what is covered."""
        return self._text(self._rows())

    def __repr__(self) -> str:
        """The table, the middle of a long one left out."""
        return self._text(self._shortened_rows())

    def _repr_html_(self) -> str:
        """The shortened table in HTML, as notebooks show it."""
        head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._shortened_rows()
        )
        notes = "".join(f"<p>{escape(note)}</p>" for note in self._notes())
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<div><p><b>{escape(self._title())}</b></p>{table}{notes}</div>"

    def _text(self, rows: list[tuple[str, ...]]) -> str:
        width = max(len(row[0]) for row in rows)
        table = (_line(row, width) for row in (_COLUMNS, *rows))
        return "\n".join([self._title(), *table, *self._notes()])

    def _title(self) -> str:
        covered = sum(placed.num_entries for placed in self.blocks)
        return f"{type(self).__name__} with {covered:,} parameters in {len(self.blocks)} blocks"

    def _rows(self) -> list[tuple[str, ...]]:
        return [_texts(row) for row in self.table()]

    def _shortened_rows(self) -> list[tuple[str, ...]]:
        rows = self._rows()
        hidden = len(rows) - 2 * _SHOWN
        if hidden <= 1:
            return rows
        line = (f"… {hidden} more, which print() shows", *[""] * (len(_COLUMNS) - 1))
        return [*rows[:_SHOWN], line, *rows[-_SHOWN:]]

    def _notes(self) -> list[str]:
        others, left_out = (self.info.get(key, {}) for key in ("others", "left_out"))
        notes = [f"by automatic differentiation: {name} ({why})" for name, why in others.items()]
        names = ", ".join(left_out)
        return [*notes, f"left out: {names}" if names else "nothing selected is left out"]

    def to(self, device: torch.device | str | torch.dtype | None = None, dtype: Any = None) -> Self:
        """Move to another device, or convert to another precision; itself if nothing changes.

        Its ``param_names`` stay those of the model, which is not moved.

        Args:
            device: The device (or, alone, the precision).
            dtype: ``torch.float32`` or ``torch.float64``.

        Raises:
            ValueError: If the precision is another.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        device = self.device if device is None else torch.device(device)
        dtype = self.dtype if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"`dtype` must be torch.float32 or torch.float64, got {dtype}.")
        if (device, dtype) == (self.device, self.dtype):
            return self
        blocks = moved(self.blocks, device, dtype)
        space = replace(self.space, device=device, dtype=dtype)
        return self.of_blocks(space, blocks, self.info, self.processes)

    def save(self, path: str | PathLike[str]) -> None:
        """Save to a safetensors file, see :func:`~curvlinops_diffusion.load_operator`.

        The file is written under another name and then renamed, so that it is never half-written.
        Where blocks are shared among processes each writes a file of its own beside it, and the
        first one a file that names them.

        Args:
            path: Where to.

        Raises:
            ValueError: If the file cannot be written there.
        """
        save_blocks(path, self.KIND, self.space, self.blocks, self.info, self.processes)

    def eigenvalues(self) -> Tensor:
        """All eigenvalues in descending order, shape ``[P]``."""
        own = {
            placed.name: block.eigenvalues.flatten().to(self.device)
            for placed, block in zip(self.blocks, self._eigen_blocks(), strict=True)
        }
        each = self.processes.all_gather_tensors(own, self.device)
        return torch.cat(list(each.values())).sort(descending=True).values

    def trace(self) -> Tensor:
        """The trace."""
        return self._total(p.block.trace() for p in self.blocks)

    def logdet(self) -> Tensor:
        """The logarithm of the determinant; minus infinity for a singular operator."""
        return self._total(
            (block.all_null() if null else block).logdet() for block, null in self._null_or_not()
        )

    def det(self) -> Tensor:
        """The determinant; under- or overflows for all but the smallest operators."""
        return self.logdet().exp()

    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm."""
        return self._total(p.block.squared_frobenius_norm() for p in self.blocks).sqrt()

    def _eigen_blocks(self) -> list[EigenBlock]:
        """The blocks in their eigenbases, each where it was; decomposed on the device."""
        found = []
        for placed in self.blocks:
            block = placed.block
            if not isinstance(block, EigenBlock):
                eigen = placed.on(self.device).block.eigen(placed.name)
                block = placed.with_block(eigen).on(placed.device).block.eigen(placed.name)
            found.append(block)
        return found

    def _null_or_not(self) -> list[tuple[EigenBlock, bool]]:
        """The blocks in their eigenbases, and whether each is zero, perhaps up to rounding.

        A gradient that vanishes (of the bias of attention's keys, or of one that a norm subtracts)
        is computed as rounding errors, and its block is of their squares. Their size does not
        distinguish them from the small gradients of a branch that has hardly begun to be trained;
        so a trial of the network finds them, and ``info['rounding']`` lists them. A power has none:
        there they were dealt with.
        """
        rounding = set() if "power" in self.info else set(self.info.get("rounding", ()))
        return [
            (block, block.largest() == 0 or {*placed.params} <= rounding)
            for placed, block in zip(self.blocks, self._eigen_blocks(), strict=True)
        ]

    def _total(self, of_blocks: Iterable[Tensor]) -> Tensor:
        """The sum over the blocks of all processes."""
        values = [value.to(self.device) for value in of_blocks]
        own = torch.stack(values).sum() if values else self._zero()
        return self.processes.all_reduce({"total": own}, self.device)["total"]

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=self.dtype, device=self.device)

    def power(
        self,
        exponent: float,
        damping: float = 0.0,
        *,
        relative: bool = False,
        rtol: float | None = None,
    ) -> BlockDiagonalLinearOperator:
        """The damped real power ``(F + λ I)^p``, exact in the eigenbasis.

        Args:
            exponent: The power ``p``; ``-1/2`` turns white noise into samples of ``N(0, F⁻¹)``.
            damping: ``λ ≥ 0``.
            relative: Whether the damping is in units of each block's mean eigenvalue, so that block
                ``b`` is damped by ``λ trace(F_b) / P_b`` (kronfluence's damping factor). Blocks of
                parameters without effect, which are zero or listed in ``info['rounding']``, are
                left out: the power is zero there.
            rtol: Eigenvalues of at most this part of the operator's largest are left out, as by
                :func:`torch.linalg.pinv`: the power is zero there. ``None`` to leave out none.

        Returns:
            The power, block-diagonal as well.

        Raises:
            ValueError: If a number is negative, a negative power meets a zero eigenvalue, or the
                damping is relative and all blocks are zero.
        """
        damping = check_non_negative("damping", damping)
        rtol = None if rtol is None else check_non_negative("rtol", rtol)
        found = self.processes.all_or_none(self._null_or_not)
        if relative and all(self.processes.all_gather(all(null for _, null in found))):
            raise ValueError(
                "Every block is zero, perhaps up to rounding, and so is a damping of "
                f"{damping:g} times its mean eigenvalue: none of the parameters has an effect on "
                "the prediction. Pass parameters that have one, or an absolute damping."
            )
        floor = None
        if rtol is not None:
            own = max((block.largest() for block, _ in found), default=0.0)
            floor = torch.tensor(rtol * max(self.processes.all_gather(own)), dtype=self.dtype)

        def powers() -> list[PlacedBlock]:
            blocks = []
            for placed, (block, is_null) in zip(self.blocks, found, strict=True):
                if relative and is_null:
                    power = block.zero()
                elif damping == 0 and is_null:
                    power = block.all_null().power(exponent, damping, placed.name, floor)
                else:
                    own = damping * float(block.eigenvalues.mean()) if relative else damping
                    power = block.power(exponent, own, placed.name, floor)
                blocks.append(placed.with_block(power))
            return blocks

        blocks = self.processes.all_or_none(powers)
        info = {**self.info, "power": exponent, "damping": damping}
        info |= {"relative": True} if relative else {}
        info |= {} if rtol is None else {"rtol": rtol}
        return BlockDiagonalLinearOperator(self.space, blocks, info, self.processes)

    def inverse(
        self,
        damping: float = 0.0,
        *,
        relative: bool = False,
        rtol: float | None = None,
        use_exact_damping: bool | None = None,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
    ) -> BlockDiagonalLinearOperator:
        """The damped inverse ``(F + λ I)⁻¹``, or the truncated pseudo-inverse.

        Args:
            damping: ``λ ≥ 0``.
            relative: As for :meth:`power`.
            rtol: Likewise.
            use_exact_damping: ``False`` to damp K-FAC's Kronecker factors instead, as
                ``curvlinops`` does by default: ``(B + λ I)⁻¹ ⊗ (A + λ I)⁻¹``. ``None`` for exact
                damping, unless the heuristic is asked for.
            use_heuristic_damping: Damp the factors by ``√λ π`` (A) and ``√λ / π`` (B) with ``π²``
                the ratio of their mean eigenvalues (Martens & Grosse, 2015, Section 6.3).
            min_damping: Lower bound of the two heuristic dampings.

        Returns:
            The inverse, block-diagonal as well. Blocks without Kronecker form (biases of their
            own, norms) are damped exactly in each case.

        Raises:
            ValueError: If a damping is negative, the options contradict each other, or the matrix
                to invert is singular.
        """
        min_damping = check_non_negative("min_damping", min_damping)
        if not use_heuristic_damping and use_exact_damping is not False:
            return self.power(-1.0, damping, relative=relative, rtol=rtol)
        damping = check_non_negative("damping", damping)
        if use_exact_damping or relative or rtol is not None:
            raise ValueError(
                "`use_exact_damping`, `relative` and `rtol` damp the operator and not its factors, "
                f"got {use_exact_damping}, {relative} and {rtol} with `use_heuristic_damping` "
                f"{use_heuristic_damping}. Pass one or the other."
            )
        self.processes.all_or_none(self._check_factored)

        def inverted() -> list[PlacedBlock]:
            arguments = damping, use_heuristic_damping, min_damping
            return [p.with_block(p.block.factored_inverse(*arguments, p.name)) for p in self.blocks]

        rule = "heuristic" if use_heuristic_damping else "factored"
        info = {**self.info, "power": -1.0, "damping": damping, "damping_rule": rule}
        blocks = self.processes.all_or_none(inverted)
        return BlockDiagonalLinearOperator(self.space, blocks, info, self.processes)

    def _check_factored(self) -> None:
        if any(p.kind == "eigenbasis" and p.block.shape[-1] > 1 for p in self.blocks):
            raise ValueError(
                f"{type(self).__name__} has no Kronecker factors to damp apart: its eigenvalues "
                "are not a product. Use the exact damping (the default)."
            )


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["block"],
        row["kind"],
        f"{row['parameters']:,}",
        "×".join(map(str, row["shape"])),
        f"{row['bytes'] / 2**20:.2f}",
        f"{row['trace_share']:.2%}",
    )


def _line(row: tuple[str, ...], width: int) -> str:
    block, kind, parameters, shape, size, trace = row
    line = f"{block:{width}}  {kind:10}  {parameters:>12}  {shape:>16}  {size:>9}  {trace}"
    return line.rstrip()
