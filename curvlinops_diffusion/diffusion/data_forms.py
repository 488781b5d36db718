"""Forms of data: each as a source of batches, with what is known of their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from curvlinops_diffusion.diffusion.checks import check_condition, check_images
from curvlinops_diffusion.diffusion.conditions import rows_of
from curvlinops_diffusion.diffusion.loaders import (
    check_loader,
    check_whole,
    iterated,
    known_batches,
    known_size,
)
from curvlinops_diffusion.runtime.checks import plain, plain_labels, quoted

T = TypeVar("T")

ACCEPTED = (
    "a tensor of clean examples [N, ...], a dict of tensors with key 'x0', a Dataset, a "
    "DataLoader, or a list of batches"
)

ITEM_ACCEPTED = (
    "Each batch (or item of a Dataset) must be a tensor of clean examples, a pair of these and "
    "integer labels or prompts, or a dict with key 'x0' whose other entries are passed to the "
    "model as keyword arguments"
)

#: Whether the batch of a number is asked for.
Wanted = Callable[[int], bool]
#: Runs the network on clean examples and their condition; whatever it raises, it cannot.
Run = Callable[[Tensor, dict[str, Any]], Any]
#: A batch with its number and the index of its first example; without the batch, where it is not
#: asked for, or comes after the last one.
Numbered = tuple[int, int, Any]


@dataclass(frozen=True)
class BatchSource:
    """Data as batches.

    Attributes:
        start: Starts an iteration over the wanted batches.
        num_examples: The number of examples; ``None`` if only a pass over them would tell.
        num_batches: The number of batches; ``None`` likewise.
        batch_size: Examples in a batch; ``None`` where the data comes in batches.
        in_memory: Whether the data is there as a whole, and so the same each time.
    """

    start: Callable[[Wanted], Iterator[Numbered]]
    num_examples: int | None = None
    num_batches: int | None = None
    batch_size: int | None = None
    in_memory: bool = False


def batch_source(data: Any, batch_size: int, run: Run) -> BatchSource:
    """The source of batches that some data is.

    Args:
        data: See :class:`~curvlinops_diffusion.NoisedRegression`.
        batch_size: Examples in a batch, where the data does not come in batches.
        run: Runs the network: tells a single example from a batch where their forms do not.

    Raises:
        ValueError: If the data is of no known form, or leaves out examples.
    """
    data = _whole_pair(data)
    if isinstance(data, Tensor | Mapping):
        return _of_rows(data, batch_size)
    if isinstance(data, DataLoader):
        check_loader(data)
        if data.batch_sampler is None:  # what the data set yields, as it is
            return _of_things(lambda: iterated(data), None, batch_size, run)
        return BatchSource(_all_of(lambda: iterated(data)), known_size(data), known_batches(data))
    if isinstance(data, IterableDataset):
        check_whole(data)
        raw: DataLoader[Any] = DataLoader(data, batch_size=None)
        if _is_batch(_first(lambda: iterated(raw)), run):
            return BatchSource(_all_of(lambda: iterated(raw)))
        loader: DataLoader[Any] = DataLoader(data, batch_size, collate_fn=_collated)
        return BatchSource(_all_of(lambda: iterated(loader)), batch_size=batch_size)
    if _has_items(data):
        return _of_items(data, batch_size)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | Iterator | np.ndarray):
        items = data if isinstance(data, Sequence) else None
        return _of_things(lambda: iter(data), items, batch_size, run)
    hint = " (it can be iterated only once)" if isinstance(data, Iterator) else ""
    hint = " (pass torch.from_numpy(...) of it)" if isinstance(data, np.ndarray) else hint
    hint = " (it has neither a length nor an iterator)" if isinstance(data, Dataset) else hint
    raise ValueError(f"The data arrived as {type(data).__name__}{hint}. Pass {ACCEPTED}.")


def _whole_pair(data: Any) -> Any:
    """All examples and all labels or prompts, as a mapping; other data as it is."""
    if isinstance(data, list | tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        x0, second = data
        labels = isinstance(second, Tensor) and second.ndim > 0 and _whole(second)
        prompts = isinstance(second, list | tuple) and all(isinstance(z, str) for z in second)
        if (labels or prompts) and len(second) == len(x0):
            x0, condition = split(data)
            return {"x0": x0, **condition}
    return data


def _has_items(data: Any) -> bool:
    """Whether items are got by their number; a ``datasets.Dataset`` is no torch one.

    Lists and other sequences of Python may as well be of batches, if they are no ``Dataset``.
    """
    if isinstance(data, Sequence | np.ndarray) and not isinstance(data, Dataset):
        return False
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _of_rows(data: Tensor | Mapping[str, Any], batch_size: int) -> BatchSource:
    """Batches of what is there as a whole."""
    x0, condition = split(data)
    check_images(x0, 0)
    check_condition(condition, len(x0))
    whole = {"x0": x0, **condition}
    return _by_number(
        len(x0), batch_size, lambda chosen: (rows_of(whole, r) for r in chosen), in_memory=True
    )


def _of_items(data: Any, batch_size: int) -> BatchSource:
    """Batches of items that are got by their number."""
    if len(data) == 0:
        return BatchSource(_all_of(lambda: ()), 0, 0)
    try:
        data[0]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"The data arrived as {type(data).__name__}, of which item 0 cannot be read "
            f"({quoted(error)}). Pass {ACCEPTED}."
        ) from error
    return _by_number(len(data), batch_size, lambda chosen: _load(data, chosen))


def _of_things(
    again: Callable[[], Iterable[Any]],
    items: Sequence[Any] | None,
    batch_size: int,
    run: Run,
) -> BatchSource:
    """Batches of what yields either batches or single examples.

    Args:
        again: Starts an iteration.
        items: The sequence that is iterated over, if it is one.
        batch_size: Examples in a batch, where single ones come.
        run: Runs the network.
    """
    if not _is_single(_first(again), run):
        return BatchSource(
            _all_of(again),
            num_batches=len(items) if isinstance(items, list | tuple) else None,
            in_memory=isinstance(items, list | tuple),
        )
    if items is not None:
        return _by_number(len(items), batch_size, lambda chosen: _load(items, chosen))
    grouped = _all_of(lambda: (_collated(some) for some in batched(again(), batch_size)))
    return BatchSource(grouped, batch_size=batch_size)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of ``size`` successive items, the last one perhaps shorter."""
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some


def _first(again: Callable[[], Iterable[Any]]) -> Any:
    return next(iter(again()), None)


# ---------------------------------------------------------------------------------------------
# Iterations
# ---------------------------------------------------------------------------------------------


def _by_number(
    count: int,
    batch_size: int,
    load: Callable[[list[slice]], Iterable[Any]],
    in_memory: bool = False,
) -> BatchSource:
    """Batches of what can be loaded at any place."""
    num_batches = -(-count // batch_size)

    def start(wanted: Wanted) -> Iterator[Numbered]:
        numbers = [n for n in range(num_batches) if wanted(n)]
        slices = [slice(n * batch_size, min((n + 1) * batch_size, count)) for n in numbers]
        for number, part, batch in zip(numbers, slices, load(slices), strict=True):
            x0, _ = split(batch)
            size = len(x0) if isinstance(x0, Tensor) else None
            if size not in (None, part.stop - part.start):
                raise ValueError(
                    f"{size} examples came where items {part.start} to {part.stop - 1} of the data "
                    f"were asked for. Each of its {count} items must be one example."
                )
            yield number, part.start, batch

    return BatchSource(start, count, num_batches, batch_size, in_memory)


def _load(data: Any, chosen: list[slice]) -> Iterator[Any]:
    """Items of a data set, in batches."""
    indices = [list(range(part.start, part.stop)) for part in chosen]
    return iterated(DataLoader(data, batch_sampler=indices, collate_fn=_collated))


def _all_of(batches: Callable[[], Iterable[Any]]) -> Callable[[Wanted], Iterator[Numbered]]:
    """Batches of what can only be iterated over."""

    def start(wanted: Wanted) -> Iterator[Numbered]:
        number = first = 0
        for number, batch in enumerate(batches(), start=1):  # noqa: B007  how many came
            yield number - 1, first, batch if wanted(number - 1) else None
            first += len(split(batch)[0])
        yield number, first, None

    return start


# ---------------------------------------------------------------------------------------------
# Batches and single examples
# ---------------------------------------------------------------------------------------------


def _is_single(thing: Any, run: Run) -> bool:
    """Whether a thing is a single example, where batches are expected."""
    x0, beside = _parts(thing)
    if not isinstance(x0, Tensor):
        return False
    of_one = [isinstance(z, str | int) or (isinstance(z, Tensor) and z.ndim == 0) for z in beside]
    if of_one and all(of_one) and any(isinstance(z, str) or _whole(z) for z in beside):
        return True  # a label, a prompt or the like for it alone
    if any(_is_of_rows(z, len(x0)) for z in beside if x0.ndim > 1):
        return False
    return x0.ndim == 1 or (not _runs_on(thing, run) and _runs_on([thing], run, default_collate))


def _is_of_rows(entry: Any, count: int) -> bool:
    """Whether there is a label or a prompt for each of so many examples."""
    if isinstance(entry, Tensor):
        return entry.shape == (count,) and _whole(entry)
    texts = isinstance(entry, list | tuple) and all(isinstance(z, str) for z in entry)
    return texts and len(entry) == count


def _is_batch(thing: Any, run: Run) -> bool:
    """Whether a thing is a batch, where single examples are expected."""
    return not _runs_on([thing], run, default_collate) and _runs_on(thing, run)


def _runs_on(thing: Any, run: Run, batch_of: Callable[[Any], Any] = lambda thing: thing) -> bool:
    """Whether the network takes some rows of a batch.

    Other numbers of them than there are, as convolutions take an example without an axis of them.
    """
    with suppress(Exception):  # whatever a network raises
        x0, condition = split(batch_of(thing))
        rows = [0, 0] if len(x0) == 1 else [0]
        run(x0[rows], rows_of(condition, rows))
        return True
    return False


def _parts(thing: Any) -> tuple[Any, list[Any]]:
    """The images of a batch or of a single example, and what is beside them."""
    if isinstance(thing, Mapping):
        return thing.get("x0"), [value for key, value in thing.items() if key != "x0"]
    if isinstance(thing, list | tuple) and len(thing) in (1, 2):
        return thing[0], list(thing[1:])
    return thing, []


def _whole(value: Any) -> bool:
    """Whether a value may be a label."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() and value.dtype != torch.bool
    return isinstance(value, int) and not isinstance(value, bool)


def split(batch: Any) -> tuple[Any, dict[str, Any]]:
    """The clean examples and the condition of a batch, as plain tensors.

    Raises:
        ValueError: If it is of no known form.
    """
    x0, condition = _entries(batch)
    condition = {key: plain(value, f"'{key}' of the data") for key, value in condition.items()}
    if "class_labels" in condition:
        condition["class_labels"] = plain_labels(condition["class_labels"])
    return plain(x0, "The data") if isinstance(x0, Tensor) else x0, condition


def _entries(batch: Any) -> tuple[Any, dict[str, Any]]:
    """The clean examples and the condition of a batch, as they are given."""
    if isinstance(batch, Mapping):
        if "x0" not in batch:
            raise ValueError(f"A batch arrived with keys {sorted(batch)}. {ITEM_ACCEPTED}.")
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
        raise ValueError(f"A batch arrived as {type(batch).__name__}{size}. {ITEM_ACCEPTED}.")
    return batch, {}


def _collated(items: list[Any]) -> Any:
    """Items as a batch.

    Raises:
        ValueError: If they hold something that no network takes.
    """
    try:
        return default_collate(items)
    except (TypeError, RuntimeError, KeyError) as error:
        first = items[0]
        entries = first.items() if isinstance(first, Mapping) else [("item", first)]
        shown = ", ".join(f"'{key}' as {_shown(value)}" for key, value in entries)
        raise ValueError(
            f"Items of the data cannot be put into a batch: they hold {shown} "
            f"({quoted(error)}). {ITEM_ACCEPTED}."
        ) from error


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    inside = f" of {type(value[0]).__name__}" if isinstance(value, list | tuple) and value else ""
    return type(value).__name__ + inside
