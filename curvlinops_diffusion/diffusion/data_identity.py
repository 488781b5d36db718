"""What data is known by, taken from its batches as they pass by."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from torch import Tensor

from curvlinops_diffusion.diffusion.conditions import has_rows
from curvlinops_diffusion.diffusion.data import CleanBatch
from curvlinops_diffusion.runtime.digests import tensor_parts


class DataIdentity:
    """A digest of all examples with their conditions, and the sizes of batches.

    Sums over other batches of the same examples round differently, and cannot be continued.
    """

    def __init__(self) -> None:
        self._digest = sha256()
        self._sizes: list[int] = []

    @property
    def num_examples(self) -> int:
        """How many have passed by."""
        return sum(self._sizes)

    def add(self, clean: CleanBatch) -> None:
        """Take the next batch."""
        self._sizes.append(len(clean.indices))
        entries = clean.entries()
        for position in range(len(clean.indices)):
            for name, value in entries:
                self._digest.update(name.encode())
                one = value[position] if has_rows(value) else value
                if isinstance(one, Tensor):
                    for part in tensor_parts(one):
                        self._digest.update(part)
                else:
                    self._digest.update(repr(one).encode())

    def result(self) -> dict[str, Any]:
        """The digest, and the size of batches; all of them, if they are not of one size."""
        sizes = self._sizes
        alike = len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]
        return {"digest": self._digest.hexdigest(), "batch_size": sizes[0] if alike else sizes}


def can_pass_by(clean: CleanBatch) -> bool:
    """Whether a batch can be read without waiting for a GPU."""
    return all(not isinstance(z, Tensor) or z.device.type == "cpu" for _, z in clean.entries())
