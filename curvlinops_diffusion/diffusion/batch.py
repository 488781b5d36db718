"""Batches of examples, clean and noised, and the conditions beside them.

A condition is a nested mapping of the network's keyword arguments. Entries with a row for each
example are tensors with axes, and lists (prompts). Legend: B batch, D entries of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor

from curvlinops_diffusion.runtime.devices import to_device


def mapped(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """Apply a function to the corresponding entries of nested mappings, of every kind."""
    if isinstance(first, Mapping):
        return {key: mapped(function, *(c[key] for c in (first, *others))) for key in first}
    return function(first, *others)


def has_rows(entry: Any) -> bool:
    """Tell whether an entry has a row for each example."""
    return isinstance(entry, list) or (isinstance(entry, Tensor) and entry.ndim > 0)


def merged_rows(merge: Callable[[Sequence[Any]], Any], *several: Any) -> Any:
    """Merge corresponding entries that have rows; what has none is that of the first."""
    return mapped(lambda *own: merge(own) if has_rows(own[0]) else own[0], *several)


def joined_rows(rows: Sequence[Any]) -> Any:
    """Join rows of one kind, tensors or lists."""
    return torch.cat(list(rows)) if isinstance(rows[0], Tensor) else list(chain(*rows))


def rows_of(condition: Any, index: slice | list[int]) -> Any:
    """Select rows of every entry that has them."""

    def rows(entry: Any) -> Any:
        if isinstance(entry, list) and not isinstance(index, slice):
            return [entry[i] for i in index]
        return entry[index] if has_rows(entry) else entry

    return mapped(rows, condition)


def leaves(condition: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of a nested mapping, by names joined with a slash."""
    for key, value in sorted(condition.items()):
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def named(condition: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Build the nested mapping whose entries are the names that :func:`leaves` gives them."""
    return {
        key: named(value, f"{prefix}{key}/") if isinstance(value, Mapping) else f"{prefix}{key}"
        for key, value in condition.items()
    }


@dataclass(frozen=True)
class CleanBatch:
    """Successive clean examples.

    Attributes:
        indices: The examples' indices ``n`` within the data.
        x0: Clean examples, shape ``[B, ...]``.
        condition: Keyword arguments of the model; tensors have first axis ``B``, except those
            without axes.
        mask: Weights of the examples' entries in the loss, ``[B, ...]``; ``None`` for one.
    """

    indices: Sequence[int]
    x0: Tensor
    condition: dict[str, Any]
    mask: Tensor | None = None

    def entries(self) -> list[tuple[str, Any]]:
        """The examples, each entry of the condition, and the mask if there is one, by name."""
        masks = [] if self.mask is None else [("loss mask", self.mask)]
        return [("x0", self.x0), *leaves(self.condition), *masks]

    def select(self, positions: Sequence[int]) -> CleanBatch:
        """The examples at some positions of the batch."""
        index = list(positions)
        mask = None if self.mask is None else self.mask[index]
        indices = [self.indices[i] for i in index]
        return CleanBatch(indices, self.x0[index], rows_of(self.condition, index), mask)


@dataclass(frozen=True)
class NoisedBatch:
    """Draws of some examples: inputs of the network, its target, and the loss' weight.

    The loss of example ``b`` is ``weight_B[b] * ‖prediction_BD[b] - target_BD[b]‖²``, with a factor
    ``mask_BD[b]`` at each entry's square if there is a mask.

    Attributes:
        indices: The examples' indices ``n`` within the data.
        draw_numbers: The number ``r`` of each example's draw; :attr:`draw` has them as a tensor.
        level_B: Noise levels.
        x_t: Noised examples, shape ``[B, ...]``.
        timestep_B: The time that the network is given.
        condition: Further keyword arguments of the network.
        target_BD: The target, flattened, in the working precision.
        weight_B: ``w_t r``.
        mask_BD: Factors of the entries' squares; ``None`` for one.
        state_BD: ``x_t`` in the working precision, flattened, where the network sees it rounded;
            ``None`` for ``x_t`` itself.
    """

    indices: Sequence[int]
    draw_numbers: Sequence[int]
    level_B: Tensor
    x_t: Tensor
    timestep_B: Tensor
    condition: dict[str, Any]
    target_BD: Tensor
    weight_B: Tensor
    mask_BD: Tensor | None = field(default=None, kw_only=True)
    state_BD: Tensor | None = field(default=None, kw_only=True)

    @property
    def draw(self) -> Tensor:
        """The number ``r`` of each example's draw, shape ``[B]``, int64, beside ``x_t``."""
        return to_device(torch.tensor(self.draw_numbers, dtype=torch.int64), self.x_t.device)

    @property
    def common_draw(self) -> int:
        """The number of the draw that all examples of the batch are seen in."""
        (number,) = set(self.draw_numbers)
        return number

    @property
    def noised_BD(self) -> Tensor:
        """The noised examples in the working precision, flattened."""
        state_BD = self.x_t.flatten(1) if self.state_BD is None else self.state_BD
        return state_BD.to(self.target_BD)

    def _of_rows(self) -> list[str]:
        """The fields with a row for each example, besides the numbers of example and draw."""
        return [f.name for f in fields(self) if f.name not in ("indices", "draw_numbers")]

    def select(self, positions: Sequence[int]) -> Self:
        """The examples at some positions of the batch; those of a range are not copied."""
        index: slice | list[int] = list(positions)
        if isinstance(positions, range) and positions.step == 1:
            index = slice(positions.start, positions.stop)
        rows = {name: rows_of(getattr(self, name), index) for name in self._of_rows()}
        indices, numbers = ([of[i] for i in positions] for of in (self.indices, self.draw_numbers))
        return replace(self, indices=indices, draw_numbers=numbers, **rows)

    @staticmethod
    def interleaved(draws: Sequence[NoisedBatch]) -> NoisedBatch:
        """Several draws of the same examples as one batch, the draws of an example in a row."""

        def merge(rows: Sequence[Any]) -> Any:
            if isinstance(rows[0], Tensor):
                return torch.stack(list(rows), 1).flatten(0, 1)
            return [row for of_one in zip(*rows, strict=True) for row in of_one]

        return NoisedBatch._merged(draws, merge)

    @staticmethod
    def joined(batches: Sequence[NoisedBatch]) -> NoisedBatch:
        """One draw of several lots of examples as one batch."""
        return NoisedBatch._merged(batches, joined_rows)

    @staticmethod
    def _merged(
        batches: Sequence[NoisedBatch], merge: Callable[[Sequence[Any]], Any]
    ) -> NoisedBatch:
        """One batch, given how rows are merged; what has no rows is that of the first."""
        first = batches[0]
        if len(batches) == 1:
            return first
        rows = {
            name: merged_rows(merge, *(getattr(b, name) for b in batches))
            for name in first._of_rows()
        }
        for name in ("indices", "draw_numbers"):
            rows[name] = merge([list(getattr(b, name)) for b in batches])
        return replace(first, **rows)

    def squares(self, prediction_BD: Tensor) -> Tensor:
        """The squared errors ``Σ_d m_d (f_d - y_d)²``, shape ``[B]``."""
        return self._masked((prediction_BD - self.target_BD).square()).sum(1)

    def loss(self, prediction_BD: Tensor) -> Tensor:
        """The losses ``ℓ_t = w_t r Σ_d m_d (f_d - y_d)²``, shape ``[B]``."""
        return self.weight_B * self.squares(prediction_BD)

    def loss_gradient(self, prediction_BD: Tensor) -> Tensor:
        """Gradients ``2 w_t r m (f - y)`` of the losses in the prediction, shape ``[B, D]``."""
        return self.loss_hessian_product(prediction_BD - self.target_BD)

    def loss_hessian_product(self, v: Tensor) -> Tensor:
        """The losses' Hessian ``2 w_t r diag(m)`` times ``v``, shape ``[B, D]``."""
        return (2 * self.weight_B).unsqueeze(1) * self._masked(v)

    def loss_hessian_root(self, v: Tensor) -> Tensor:
        """``√(2 w_t r m) v``: turns ``E[v vᵀ] = I`` into the losses' Hessian, shape ``[B, D]``."""
        root_BD = v if self.mask_BD is None else self.mask_BD.sqrt() * v
        return (2 * self.weight_B).sqrt().unsqueeze(1) * root_BD

    def _masked(self, z_BD: Tensor) -> Tensor:
        return z_BD if self.mask_BD is None else self.mask_BD * z_BD
