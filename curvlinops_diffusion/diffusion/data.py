"""Clean data in batches: every form that users pass, as one re-iterable of ``CleanBatch``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from torch import Tensor

from curvlinops_diffusion.diffusion.checks import check_condition, check_images
from curvlinops_diffusion.diffusion.conditions import leaves, rows_of
from curvlinops_diffusion.diffusion.data_forms import ACCEPTED, Run, Wanted, batch_source, split
from curvlinops_diffusion.diffusion.masks import loss_mask
from curvlinops_diffusion.runtime.checks import check_count
from curvlinops_diffusion.runtime.digests import tensor_parts

_SAME_EACH_TIME = (
    "Every pass must see the same examples in the same order: switch shuffling and random "
    "augmentation (or a random choice of captions) off."
)


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
        condition = {key: rows_of(value, index) for key, value in self.condition.items()}
        mask = None if self.mask is None else self.mask[index]
        return CleanBatch([self.indices[i] for i in index], self.x0[index], condition, mask)


class CleanData:
    """A re-iterable of :class:`CleanBatch` over everything that users pass as data.

    Examples are numbered in the order of iteration, which therefore must be the same each time.

    Args:
        data: See :class:`~curvlinops_diffusion.NoisedRegression`.
        batch_size: Examples in a batch, where the data does not come in batches.
        mask: The name of the entry that is the loss' mask; ``None`` if there is none.
        run: Runs the network on clean examples and their condition.

    Attributes:
        batch_size: The same; ``None`` where it does.
        num_examples: The number of examples: of those that come, whatever a length says.
        num_batches: The number of batches; ``None`` if only a pass over them would tell.

    Raises:
        ValueError: If the data is empty, of no known form, or changes between iterations.
    """

    def __init__(self, data: Any, batch_size: int, mask: str | None, run: Run):
        check_count("batch_size", batch_size)
        self._mask = mask
        # checksums of the batches that were seen, of what need not be the same each time
        self._digests: dict[int, dict[str, int]] | None = None
        self._source = batch_source(data, batch_size, lambda x0, c: run(x0, self._shown(c)))
        self.batch_size = self._source.batch_size
        known = self._source.num_examples
        self._counted: int | None = None
        if not self._source.in_memory:
            self._check_same_twice(2 if known is None else 1)
            self._digests = {}
        self.num_examples = sum(len(b.indices) for b in self) if known is None else known
        self._counted = self.num_examples
        if self.num_examples == 0:
            raise ValueError(
                f"The data is empty. Pass {ACCEPTED} with at least one example, which can be "
                "iterated more than once."
            )
        self.num_batches = self._source.num_batches

    def __iter__(self) -> Iterator[CleanBatch]:
        """Yield the batches in order.

        Raises:
            ValueError: If a batch is malformed.
        """
        for _, batch in self.numbered():
            yield batch

    def numbered(self, wanted: Wanted = lambda number: True) -> Iterator[tuple[int, CleanBatch]]:
        """Yield wanted batches with their numbers; the others are not loaded, where possible.

        Raises:
            ValueError: If a batch is malformed, or not as many examples come as before.
        """
        end = None
        for number, start, batch in self._source.start(wanted):
            if batch is None:
                end = start
                continue
            x0, condition = split(batch)
            check_images(x0, start)
            check_condition(condition, len(x0))
            mask = None if self._mask is None else loss_mask(self._mask, condition, x0)
            indices = range(start, start + len(x0))
            clean = CleanBatch(indices, x0, self._shown(condition), mask)
            self._check_seen(number, clean)
            yield number, clean
        if end is not None and self._counted is not None and end != self._counted:
            raise ValueError(
                f"{end} examples came in this iteration over the data, and {self._counted} are "
                f"known from its length or an earlier one. {_SAME_EACH_TIME}"
            )

    def _shown(self, condition: Mapping[str, Any]) -> dict[str, Any]:
        """The condition that the network sees."""
        return {key: value for key, value in condition.items() if key != self._mask}

    def _check_seen(self, number: int, clean: CleanBatch) -> None:
        """Compare a batch with what it was when it was first seen.

        Raises:
            ValueError: If it is another one.
        """
        if self._digests is None:
            return
        now = _checksums(clean)
        varied = _varied(self._digests.setdefault(number, now), now)
        if varied:
            raise ValueError(
                f"The batch of the examples from {clean.indices[0]} on is not what it was when it "
                f"was read before: {varied} varied. {_SAME_EACH_TIME}"
            )

    def _check_same_twice(self, batches: int) -> None:
        """Compare the first batches of two iterations that go on at the same time.

        Raises:
            ValueError: If they are not the same.
        """
        one, two = iter(self), iter(self)
        for _ in range(batches):
            pair = [next(iteration, None) for iteration in (one, two)]
            varied = _varied(*({} if batch is None else _checksums(batch) for batch in pair))
            if varied:
                raise ValueError(
                    f"Two iterations over the data began with different batches: {varied} varied. "
                    f"{_SAME_EACH_TIME} Iterations must not share their place in the data, as "
                    "those of an __iter__ that returns a stored iterator do."
                )


def _checksums(clean: CleanBatch) -> dict[str, int]:
    """A number for each entry of a batch."""

    def checksum(value: Any) -> int:
        if not isinstance(value, Tensor):
            return crc32(repr(value).encode())
        form, contents = tensor_parts(value)
        return crc32(contents, crc32(form))

    return {name: checksum(value) for name, value in clean.entries()}


def _varied(before: Mapping[str, int], now: Mapping[str, int]) -> str:
    """The names of the entries that are not the same; empty if all are."""
    names = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
    return ", ".join(f"'{name}'" for name in names)
