"""Clean data in batches: every form that users pass, as one re-iterable of ``CleanBatch``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any
from zlib import crc32

from torch import Tensor

from curvlinops_diffusion.diffusion.batch import CleanBatch, has_rows
from curvlinops_diffusion.diffusion.checks import check_condition, check_images
from curvlinops_diffusion.diffusion.data_forms import (
    ACCEPTED,
    Run,
    Wanted,
    collated,
    source_of,
    split,
)
from curvlinops_diffusion.diffusion.recipe import loss_mask
from curvlinops_diffusion.runtime.checks import check_count
from curvlinops_diffusion.runtime.digests import tensor_parts

_SAME_EACH_TIME = (
    "Every pass must see the same examples in the same order: switch shuffling and random "
    "augmentation (or a random choice of captions) off."
)


class CleanData:
    """A re-iterable of :class:`CleanBatch` over everything that users pass as data.

    Examples are numbered in the order of iteration, which therefore must be the same each time, or
    by the data set that has a shape for each of its items.

    Attributes:
        batch_size: The same; ``None`` where the data comes in batches.
        num_examples: The number of examples: of those that come, whatever a length says.
        num_batches: The number of batches; ``None`` if only a pass over them would tell.
        identity: A digest of the data, once all of it has been iterated over.
    """

    def __init__(self, data: Any, batch_size: int, mask: str | None, run: Run):
        check_count("batch_size", batch_size)
        self._mask = mask
        self.identity: dict[str, Any] = {}
        # checksums of the batches that were seen, of what need not be the same each time
        self._checksums: dict[int, dict[str, int]] | None = None
        self._source = source_of(data, batch_size, lambda x0, c: run(x0, self._shown(c)))
        self.batch_size = self._source.batch_size
        self.num_batches = self._source.num_batches
        known = self._source.num_examples
        self._counted: int | None = None
        if not self._source.in_memory:
            self._check_same_twice(2 if known is None else 1)
            self._checksums = {}
        self.num_examples = sum(len(b.indices) for b in self) if known is None else known
        self._counted = self.num_examples
        if self.num_examples == 0:
            raise ValueError(f"The data is empty. Pass {ACCEPTED} with at least one example.")

    def __iter__(self) -> Iterator[CleanBatch]:
        """Yield the batches in order."""
        for _, batch in self.numbered():
            yield batch

    def numbered(
        self, wanted: Wanted = lambda number: True, identify: bool = False
    ) -> Iterator[tuple[int, CleanBatch]]:
        """Yield wanted batches with their numbers; the others are not loaded, where possible.

        Args:
            wanted: Whether the batch of a number is asked for.
            identify: Whether to digest the data even if it has to be copied from a GPU.
        """
        end, identity = None, None if self.identity else _Identity()
        for number, indices, batch in self._source.start(wanted):
            if batch is None:
                assert isinstance(indices, range), "of a stream"
                end = indices.start
                continue
            clean = self._clean(batch, indices)
            self._check_seen(number, clean)
            yield number, clean
            # when the next is asked for, so that nothing waits for it where no next one is
            if identity is not None and not identity.takes(number, clean, identify):
                identity = None
        if end is not None and self._counted is not None and end != self._counted:
            raise ValueError(
                f"{end} examples came in this iteration over the data, and {self._counted} are "
                f"known from its length or an earlier one. {_SAME_EACH_TIME}"
            )
        if identity is not None and 0 < identity.num_examples == (self._counted or end):
            self.identity |= identity.result()

    def of_items(self, items: list[Any], indices: Sequence[int]) -> CleanBatch:
        """A batch of other versions of some examples."""
        return self._clean(collated(items), indices)

    def _clean(self, batch: Any, indices: Sequence[int]) -> CleanBatch:
        """A batch that was loaded, checked."""
        x0, condition = split(batch)
        check_images(x0, indices)
        check_condition(condition, len(x0))
        mask = None if self._mask is None else loss_mask(self._mask, condition, x0)
        return CleanBatch(indices, x0, self._shown(condition), mask)

    def _shown(self, condition: Mapping[str, Any]) -> dict[str, Any]:
        """The condition that the network sees."""
        return {key: value for key, value in condition.items() if key != self._mask}

    def _check_seen(self, number: int, clean: CleanBatch) -> None:
        """Compare a batch with what it was when it was first seen."""
        if self._checksums is None:
            return
        now = _checksums(clean)
        varied = _varied(self._checksums.setdefault(number, now), now)
        if varied:
            raise ValueError(
                f"The batch of the examples from {clean.indices[0]} on is not what it was when it "
                f"was read before: {varied} varied. {_SAME_EACH_TIME}"
            )

    def _check_same_twice(self, batches: int) -> None:
        """Compare the first batches of two iterations that go on at the same time."""
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


class _Identity:
    """A digest of all examples with their conditions, and the sizes of batches.

    Sums over other batches of the same examples round differently, and cannot be continued.
    """

    def __init__(self) -> None:
        self._digest = sha256()
        self._sizes: list[int] = []
        self.num_examples = 0

    def takes(self, number: int, clean: CleanBatch, from_gpu: bool) -> bool:
        """Take a batch, if it is the next one, and need not be copied from a GPU."""
        entries = clean.entries()
        on_cpu = all(not isinstance(z, Tensor) or z.device.type == "cpu" for _, z in entries)
        if number != len(self._sizes) or not (on_cpu or from_gpu):
            return False
        self._sizes.append(len(clean.indices))
        for position, n in enumerate(clean.indices):
            if n != self.num_examples:  # batches of one shape each leave the order of the data
                self._digest.update(f"{n}".encode())
            self.num_examples += 1
            for name, value in entries:
                self._digest.update(name.encode())
                one = value[position] if has_rows(value) else value
                parts = tensor_parts(one) if isinstance(one, Tensor) else [repr(one).encode()]
                for part in parts:
                    self._digest.update(part)
        return True

    def result(self) -> dict[str, Any]:
        """The digest, and the size of batches; all of them, if they are not of one size."""
        sizes = self._sizes
        alike = len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]
        return {"digest": self._digest.hexdigest(), "batch_size": sizes[0] if alike else sizes}
