"""Clean data in batches: every form that users pass, as one re-iterable of ``CleanBatch``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from curvlinops_diffusion.diffusion.checks import check_condition, check_images
from curvlinops_diffusion.diffusion.conditions import leaves, rows_of
from curvlinops_diffusion.diffusion.masks import loss_mask
from curvlinops_diffusion.runtime.checks import check_count
from curvlinops_diffusion.runtime.digests import tensor_parts
from curvlinops_diffusion.runtime.messages import quoted
from curvlinops_diffusion.runtime.plain import plain, plain_labels

_ACCEPTED = (
    "a tensor of clean examples [N, ...], a dict of tensors with key 'x0', a Dataset, a "
    "DataLoader, or a list of batches"
)


_ITEM_ACCEPTED = (
    "Each batch (or item of a Dataset) must be a tensor of clean examples, a pair of these and "
    "integer labels or prompts, or a dict with key 'x0' whose other entries are passed to the "
    "model as keyword arguments"
)


_SAME_EACH_TIME = (
    "Every pass must see the same examples in the same order: switch shuffling and random "
    "augmentation (or a random choice of captions) off."
)


#: Whether the batch of a number is asked for.
Wanted = Callable[[int], bool]
#: Starts an iteration over the wanted batches: (number, index of the first example, batch).
Source = Callable[[Wanted], Iterator[tuple[int, int, Any]]]


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

    Attributes:
        batch_size: The same; ``None`` where it does.
        num_examples: The number of examples.
        num_batches: The number of batches; ``None`` if only a pass over them would tell.

    Raises:
        ValueError: If the data is empty, of no known form, or changes between iterations.
    """

    def __init__(self, data: Any, batch_size: int, mask: str | None = None):
        check_count("batch_size", batch_size)
        self._mask = mask
        # checksums of the batches that were seen, of what need not be the same each time
        self._digests: dict[int, dict[str, int]] | None = None
        self._source: Source = _batch_source(data, batch_size)
        by_items = isinstance(data, Tensor | Mapping) or _is_dataset(data)
        self.batch_size = batch_size if by_items else None
        if isinstance(data, DataLoader) or _is_dataset(data):
            self._check_same_twice()
        if not isinstance(data, Tensor | Mapping | list | tuple):  # which are in memory
            self._digests = {}
        known = _known_length(data)
        self.num_examples = sum(len(b.indices) for b in self) if known is None else known
        if self.num_examples == 0:
            raise ValueError(f"The data is empty. Pass {_ACCEPTED} with at least one example.")

        self.num_batches = _known_batches(data, batch_size)

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
            ValueError: If a batch is malformed.
        """
        for number, start, batch in self._source(wanted):
            x0, condition = _split(batch)
            check_images(x0, start)
            check_condition(condition, len(x0))
            mask = None if self._mask is None else loss_mask(self._mask, condition, x0)
            condition = {key: value for key, value in condition.items() if key != self._mask}
            clean = CleanBatch(range(start, start + len(x0)), x0, condition, mask)
            self._check_seen(number, clean)
            yield number, clean

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

    def _check_same_twice(self) -> None:
        first, second = next(iter(self), None), next(iter(self), None)
        if first is None or second is None:
            return
        varied = _varied(_checksums(first), _checksums(second))
        if varied:
            raise ValueError(
                f"Two iterations over the data began with different batches: {varied} varied. "
                f"{_SAME_EACH_TIME}"
            )


def _is_dataset(data: Any) -> bool:
    """Whether items are got by their number (a ``datasets.Dataset`` is no torch one), or streamed.

    Lists and other sequences of Python are of batches, unless a label or prompt for a single
    example shows that they are of examples.
    """
    if isinstance(data, Dataset):
        return True
    if isinstance(data, Sequence) and not isinstance(data, str | bytes) and len(data) > 0:
        return _is_example(data[0])
    own = isinstance(data, Tensor | Mapping | Sequence | DataLoader | np.ndarray)
    return not own and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _is_example(item: Any) -> bool:
    """Whether an item is a single example: there is a label, a prompt or the like for it alone."""
    if isinstance(item, Mapping) and "x0" in item:
        beside = [value for key, value in item.items() if key != "x0"]
    elif isinstance(item, Sequence) and len(item) == 2 and isinstance(item[0], Tensor):
        beside = [item[1]]
    else:
        return False
    of_one = [isinstance(z, str | int) or (isinstance(z, Tensor) and z.ndim == 0) for z in beside]
    return bool(of_one) and all(of_one) and any(isinstance(z, str) or _whole(z) for z in beside)


def _whole(value: Any) -> bool:
    """Whether a value may be a label."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() and value.dtype != torch.bool
    return isinstance(value, int) and not isinstance(value, bool)


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


def _batch_source(data: Any, batch_size: int) -> Source:
    """A function that starts a new iteration over the batches of ``data``."""
    if isinstance(data, Tensor):
        check_images(_split(data)[0], 0)
        return _ranges(len(data), batch_size, lambda chosen: (data[r] for r in chosen))
    if isinstance(data, Mapping):
        x0, condition = _split(data)
        check_images(x0, 0)
        check_condition(condition, len(x0))
        whole = {"x0": x0, **condition}
        return _ranges(len(x0), batch_size, lambda chosen: (rows_of(whole, r) for r in chosen))
    if isinstance(data, DataLoader):
        _check_order(data)
        return _all_of(lambda: _iterate_loader(data))
    if _is_dataset(data):
        if not hasattr(data, "__len__"):  # a stream
            loader: DataLoader[Any] = DataLoader(data, batch_size, collate_fn=_collated)
            return _all_of(lambda: _iterate_loader(loader))
        return _ranges(len(data), batch_size, lambda chosen: _load(data, chosen))
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | Iterator | np.ndarray):
        return _all_of(lambda: data)
    hint = " (it can be iterated only once)" if isinstance(data, Iterator) else ""
    hint = " (pass torch.from_numpy(...) of it)" if isinstance(data, np.ndarray) else hint
    raise ValueError(f"The data arrived as {type(data).__name__}{hint}. Pass {_ACCEPTED}.")


def _ranges(count: int, batch_size: int, load: Callable[[list[slice]], Iterable[Any]]) -> Source:
    """Batches of what can be loaded at any place."""

    def source(wanted: Wanted) -> Iterator[tuple[int, int, Any]]:
        numbers = [n for n in range(-(-count // batch_size)) if wanted(n)]
        starts = [number * batch_size for number in numbers]
        slices = [slice(start, min(start + batch_size, count)) for start in starts]
        yield from zip(numbers, starts, load(slices), strict=True)

    return source


def _load(data: Dataset[Any], chosen: list[slice]) -> Iterator[Any]:
    """Items of a data set, in batches."""
    indices = [list(range(part.start, part.stop)) for part in chosen]
    return _iterate_loader(DataLoader(data, batch_sampler=indices, collate_fn=_collated))


def _collated(items: list[Any]) -> Any:
    """Items as a batch.

    Raises:
        ValueError: If they hold something that no network takes.
    """
    try:
        return default_collate(items)
    except (TypeError, RuntimeError) as error:
        first = items[0]
        entries = first.items() if isinstance(first, Mapping) else [("item", first)]
        shown = ", ".join(f"'{key}' as {_shown(value)}" for key, value in entries)
        raise ValueError(
            f"Items of the data cannot be put into a batch: they hold {shown} "
            f"({quoted(error)}). {_ITEM_ACCEPTED}."
        ) from error


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    inside = f" of {type(value[0]).__name__}" if isinstance(value, list | tuple) and value else ""
    return type(value).__name__ + inside


def _all_of(batches: Callable[[], Iterable[Any]]) -> Source:
    """Batches of what can only be iterated over."""

    def source(wanted: Wanted) -> Iterator[tuple[int, int, Any]]:
        start = 0
        for number, batch in enumerate(batches()):
            if wanted(number):
                yield number, start, batch
            start += len(_split(batch)[0])

    return source


def _known_length(data: Any) -> int | None:
    """The number of examples where it can be told without a pass over the data."""
    if isinstance(data, Tensor):
        return len(data)
    if isinstance(data, Mapping):
        return len(data["x0"])
    if _is_dataset(data) and hasattr(data, "__len__"):
        return len(data)
    if isinstance(data, DataLoader):
        sampler: Any = data.sampler
        plain = isinstance(sampler, SequentialSampler) and type(data.batch_sampler) is BatchSampler
        return len(sampler) if plain else None
    return None


def _known_batches(data: Any, batch_size: int) -> int | None:
    """The number of batches where it can be told without a pass over the data."""
    if isinstance(data, DataLoader):
        return None if _known_length(data) is None else len(data)
    count = _known_length(data)
    if count is not None:
        return -(-count // batch_size)
    return len(data) if isinstance(data, list | tuple) else None


def _iterate_loader(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate without touching torch's random state, from which a new iterator draws a seed."""
    state = torch.get_rng_state()
    iterator = iter(loader)
    torch.set_rng_state(state)
    yield from iterator


def _check_order(loader: DataLoader[Any]) -> None:
    if isinstance(loader.sampler, RandomSampler):
        raise ValueError(
            "The DataLoader shuffles. Every pass must see the same examples in the same order: "
            "pass shuffle=False."
        )
    if loader.drop_last and isinstance(loader.sampler, SequentialSampler):
        size, batch = len(loader.sampler), loader.batch_size or 1
        if size % batch:
            raise ValueError(
                f"The DataLoader has drop_last=True and would leave out {size % batch} of {size} "
                "examples. Pass drop_last=False."
            )


def _split(batch: Any) -> tuple[Any, dict[str, Any]]:
    """The clean examples and the condition of a batch, as plain tensors."""
    x0, condition = _parts(batch)
    condition = {key: plain(value, f"'{key}' of the data") for key, value in condition.items()}
    if "class_labels" in condition:
        condition["class_labels"] = plain_labels(condition["class_labels"])
    return plain(x0, "The data") if isinstance(x0, Tensor) else x0, condition


def _parts(batch: Any) -> tuple[Any, dict[str, Any]]:
    """The clean examples and the condition of a batch, as they are given."""
    if isinstance(batch, Mapping):
        if "x0" not in batch:
            raise ValueError(f"A batch arrived with keys {sorted(batch)}. {_ITEM_ACCEPTED}.")
        return batch["x0"], {key: value for key, value in batch.items() if key != "x0"}
    if isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[0], Tensor):
        x0, second = batch
        if isinstance(second, Tensor) and not second.is_floating_point():
            return x0, {"class_labels": second}
        if isinstance(second, Sequence) and all(isinstance(prompt, str) for prompt in second):
            return x0, {"prompt": list(second)}
    if isinstance(batch, Sequence) and len(batch) == 1:  # a TensorDataset of images alone
        batch = batch[0]
    if not isinstance(batch, Tensor):
        size = f" of length {len(batch)}" if isinstance(batch, Sequence) else ""
        raise ValueError(f"A batch arrived as {type(batch).__name__}{size}. {_ITEM_ACCEPTED}.")
    return batch, {}
