"""Forms of data: each as a source of raw batches, which are taken apart here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from curvlinops_diffusion.diffusion.batch import rows_of
from curvlinops_diffusion.diffusion.checks import check_condition, check_images
from curvlinops_diffusion.runtime.checks import plain, plain_labels, quoted

T = TypeVar("T")

ACCEPTED = (
    "a tensor of clean examples [N, ...], a dict of tensors with key 'x0', a Dataset, a "
    "DataLoader, or a list of batches"
)
_ITEM_ACCEPTED = (
    "Each batch (or item of a Dataset) must be a tensor of clean examples, a pair of these and "
    "integer labels or prompts, or a dict with key 'x0' whose other entries are passed to the "
    "model as keyword arguments"
)
# libraries whose data sets may hold one process' part
_SHARDING = ("accelerate", "datasets", "transformers")
#: Whether the batch of a number is asked for.
Wanted = Callable[[int], bool]
#: Runs the network on clean examples and their condition, or raises whatever it raises.
Run = Callable[[Tensor, dict[str, Any]], Any]


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of ``size`` successive items, the last one perhaps shorter."""
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some


#: A batch' number, the indices of its examples, and the batch; ``None`` for one that is not
#: wanted, and after the last one of a stream.
Numbered = tuple[int, range | list[int], Any]


@dataclass(frozen=True)
class Source:
    """Data as raw batches; ``None`` for a number that only a pass over them would tell."""

    start: Callable[[Wanted], Iterator[Numbered]]
    num_examples: int | None = None
    num_batches: int | None = None
    batch_size: int | None = None  # None where the data comes in batches
    in_memory: bool = False  # and so the same each time


def source_of(data: Any, batch_size: int, run: Run) -> Source:
    """Read the form of some data; ``run`` tells a single example from a batch where it does not."""
    data = _whole_pair(data)
    if isinstance(data, Tensor | Mapping):
        x0, condition = split(data)
        check_images(x0)
        check_condition(condition, len(x0))
        whole = {"x0": x0, **condition}

        def rows(chosen: list[range | list[int]]) -> Iterator[Any]:
            return (rows_of(whole, slice(part[0], part[-1] + 1)) for part in chosen)

        return _by_number(len(x0), batch_size, rows, in_memory=True)
    if isinstance(data, DataLoader):
        _check_loader(data)
        if data.batch_sampler is None:  # what the data set yields, as it is
            return _of_things(lambda: _iterated(data), None, batch_size, run)
        size = _known_size(data)
        return Source(_all_of(lambda: _iterated(data)), size, None if size is None else len(data))
    if isinstance(data, IterableDataset):
        _check_whole(data)
        raw: DataLoader[Any] = DataLoader(data, batch_size=None)
        first = next(_iterated(raw), None)
        if not _runs_on([first], run, default_collate) and _runs_on(first, run):
            return Source(_all_of(lambda: _iterated(raw)))
        loader: DataLoader[Any] = DataLoader(data, batch_size, collate_fn=collated)
        return Source(_all_of(lambda: _iterated(loader)), batch_size=batch_size)
    # lists and other sequences of Python may be of batches, if they are no Dataset; a
    # datasets.Dataset is no torch one
    sequence = isinstance(data, Sequence | np.ndarray) and not isinstance(data, Dataset)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not sequence:
        return _of_items(data, batch_size)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | Iterator | np.ndarray):
        items = data if isinstance(data, Sequence) else None
        return _of_things(lambda: iter(data), items, batch_size, run)
    hints = {
        Iterator: " (it can be iterated only once)",
        np.ndarray: " (pass torch.from_numpy(...) of it)",
        Dataset: " (it has neither a length nor an iterator)",
    }
    hint = next((hint for kind, hint in hints.items() if isinstance(data, kind)), "")
    raise ValueError(f"The data must be {ACCEPTED}, got {type(data).__name__}{hint}.")


def _whole_pair(data: Any) -> Any:
    """All examples and all labels or prompts, as a mapping; other data as it is."""
    if isinstance(data, list | tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        x0, second = data
        labels = isinstance(second, Tensor) and second.ndim > 0 and _is_label(second)
        if (labels or _are_texts(second)) and len(second) == len(x0):
            x0, condition = split(data)
            return {"x0": x0, **condition}
    return data


def _of_items(data: Any, batch_size: int) -> Source:
    """Batches of items that are looked up by their number."""
    try:
        if len(data):
            data[0]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"The data must be {ACCEPTED}, got {type(data).__name__}, of which item 0 cannot be "
            f"read ({quoted(error)})."
        ) from error
    shapes: Any = getattr(data, "shapes", None)
    # a user's data set may call anything that
    fits = isinstance(shapes, list) and {type(shape) for shape in shapes} == {tuple}
    if fits and len(shapes) != len(data):
        raise ValueError(
            f"The data's `shapes` must have one for each of its {len(data)} items, got "
            f"{len(shapes)}."
        )
    load = partial(_load, data)
    return _by_number(len(data), batch_size, load, shapes if fits else None)


def _of_things(
    again: Callable[[], Iterable[Any]], items: Sequence[Any] | None, batch_size: int, run: Run
) -> Source:
    """Batches of what yields either batches or single examples; ``items`` if it is a sequence."""
    if not _is_single(next(iter(again()), None), run):
        there = isinstance(items, list | tuple)
        num_batches = len(items) if items is not None and there else None
        return Source(_all_of(again), num_batches=num_batches, in_memory=there)
    if items is not None:
        return _by_number(len(items), batch_size, lambda chosen: _load(items, chosen))
    grouped = _all_of(lambda: map(collated, batched(again(), batch_size)))
    return Source(grouped, batch_size=batch_size)


def _by_number(
    count: int,
    batch_size: int,
    load: Callable[[list[range | list[int]]], Iterable[Any]],
    shapes: list[tuple[int, ...]] | None = None,
    in_memory: bool = False,
) -> Source:
    """Batches of what can be loaded at any place; of one shape each, if items have several.

    The largest shape comes first: what does not fit into memory fails at once.
    """
    groups: list[range | list[int]] = [range(count)]
    if shapes is not None:
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for n, shape in enumerate(shapes):
            by_shape.setdefault(shape, []).append(n)
        groups = [by_shape[shape] for shape in sorted(by_shape, key=prod, reverse=True)]
    parts = [
        group[start : start + batch_size]
        for group in groups
        for start in range(0, len(group), batch_size)
    ]

    def start(wanted: Wanted) -> Iterator[Numbered]:
        numbers = [n for n in range(len(parts)) if wanted(n)]
        chosen = [parts[n] for n in numbers]
        for number, part, batch in zip(numbers, chosen, load(chosen), strict=True):
            x0, _ = split(batch)
            if isinstance(x0, Tensor) and len(x0) != len(part):
                raise ValueError(
                    f"{len(x0)} examples came where items {part[0]} to {part[-1]} of the data "
                    f"were asked for. Each of its {count} items must be one example."
                )
            yield number, part, batch

    return Source(start, count, len(parts), batch_size, in_memory)


def _load(data: Any, chosen: list[range | list[int]]) -> Iterator[Any]:
    """Items of a data set, in batches."""
    indices = [list(part) for part in chosen]
    return _iterated(DataLoader(data, batch_sampler=indices, collate_fn=collated))


def _all_of(batches: Callable[[], Iterable[Any]]) -> Callable[[Wanted], Iterator[Numbered]]:
    """Batches of what can only be iterated over."""

    def start(wanted: Wanted) -> Iterator[Numbered]:
        number = first = 0
        for number, batch in enumerate(batches(), start=1):  # noqa: B007  how many came
            indices = range(first, first + len(split(batch)[0]))
            yield number - 1, indices, batch if wanted(number - 1) else None
            first = indices.stop
        yield number, range(first, first), None

    return start


# ---------------------------------------------------------------------------------------------
# Loaders: which examples of a data set come, in which order, and how many
# ---------------------------------------------------------------------------------------------


def _iterated(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate without touching torch's random state, from which a new iterator draws a seed.

    Several iterations may go on at the same time.
    """
    if loader.persistent_workers:  # a single iterator, which a second iteration begins anew
        loader = copy(loader)
        vars(loader).update(persistent_workers=False, _iterator=None)
    state = torch.get_rng_state()
    iterator = iter(loader)
    torch.set_rng_state(state)
    kind = type(loader.dataset).__name__
    try:
        yield from iterator
    except (IndexError, KeyError) as error:
        last = str(error).strip().splitlines()[-1][:200]  # a worker's whole stack may come first
        raise ValueError(
            f"An item of the data ({kind}) cannot be read ({type(error).__name__}: {last}). Is "
            "its length the number of its items?"
        ) from error
    except RuntimeError as error:
        if "has been invalidated" not in str(error):
            raise
        raise ValueError(
            f"The data ({kind}) allows one iteration at a time, and several go on beside each "
            "other. Pass a Dataset, or an IterableDataset that starts anew in each iteration."
        ) from error


def _check_loader(loader: DataLoader[Any]) -> None:
    """Check that a loader yields all of its examples, in the same order each time."""
    batches: Any = loader.batch_sampler
    samplers = [loader.sampler, batches, getattr(batches, "sampler", None)]
    for sampler in samplers:
        if isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
            raise ValueError(
                f"The DataLoader's {type(sampler).__name__} chooses or shuffles examples anew each "
                "time. Every pass must see the same ones in the same order: pass shuffle=False, or "
                "a Subset of the data set, without this sampler."
            )
    streamed = isinstance(loader.dataset, IterableDataset)
    if not streamed and _known_size(loader) is None:
        order: Any = loader.sampler if batches is None else batches
        # a sampler may shuffle by a fixed seed (DistributedSampler, until set_epoch is called)
        if any(repr(a) != repr(b) for a, b in zip_longest(order, list(order))):
            raise ValueError(
                f"The DataLoader's {type(order).__name__} yields another order in each iteration. "
                "Every pass must see the same examples in the same order: fix its seed, or pass a "
                "Subset of the data set, without this sampler."
            )
    # the last of which accelerate's loaders have
    _check_whole(loader.dataset, *samplers, getattr(loader, "state", None))
    dropped = _dropped(loader, streamed)
    if dropped:
        raise ValueError(
            f"The DataLoader has drop_last=True and would leave out {dropped}. Pass "
            "drop_last=False."
        )


def _dropped(loader: DataLoader[Any], streamed: bool) -> str:
    """Say which examples a loader leaves out; empty for none."""
    batches: Any = loader.batch_sampler
    if streamed:
        return "the last examples of a stream" if loader.drop_last else ""
    if not getattr(batches, "drop_last", False):
        return ""
    try:
        size, batch = len(batches.sampler), int(batches.batch_size)
    except (TypeError, AttributeError):
        return f"examples of its {type(batches).__name__}"
    return f"{size % batch} of {size} examples" if size % batch else ""


def _check_whole(dataset: Any, *others: Any) -> None:
    """Check that a data set, and what chooses from it, give every process all examples.

    Of data sets only those of libraries are looked at: users' have attributes of any meaning.
    """
    own = (dataset, getattr(dataset, "_distributed", None))
    shards = [part for part in own if type(part).__module__.split(".")[0] in _SHARDING]
    for part in (*shards, *others):
        names = ("num_replicas", "num_processes", "world_size")
        counts = [getattr(part, name, 1) for name in names]
        if any(isinstance(count, int) and count > 1 for count in counts):
            raise ValueError(
                f"Each process gets a part of the examples (of {max(counts)}, by its "
                f"{type(part).__name__}). Pass the whole data to every process; "
                "PassOptions(distributed=True) divides the work."
            )


def _known_size(loader: DataLoader[Any]) -> int | None:
    """The number of examples that come; ``None`` where only a pass over them would tell.

    A sampler may leave out examples or repeat them. What puts items together may, too; that not
    as many come is then seen at the end of the first iteration.
    """
    batches: Any = loader.batch_sampler
    own = type(batches) is BatchSampler and batches.sampler is loader.sampler
    every = type(loader.sampler) is SequentialSampler and type(loader) is DataLoader
    return len(loader.sampler) if own and every else None  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------
# Batches and single examples
# ---------------------------------------------------------------------------------------------


def _is_single(thing: Any, run: Run) -> bool:
    """Tell a single example from a batch, where batches are expected."""
    x0, beside = thing, []
    if isinstance(thing, Mapping):
        x0, beside = thing.get("x0"), [value for key, value in thing.items() if key != "x0"]
    elif isinstance(thing, list | tuple) and len(thing) in (1, 2):
        x0, beside = thing[0], list(thing[1:])
    if not isinstance(x0, Tensor):
        return False
    of_one = [isinstance(z, str | int) or (isinstance(z, Tensor) and z.ndim == 0) for z in beside]
    if of_one and all(of_one) and any(isinstance(z, str) or _is_label(z) for z in beside):
        return True  # a label, a prompt or the like for it alone
    of_rows = (
        (_are_texts(z) and len(z) == len(x0))
        or (isinstance(z, Tensor) and z.shape == (len(x0),) and _is_label(z))
        for z in beside
    )
    if x0.ndim > 1 and any(of_rows):
        return False  # a label or a prompt for each
    return x0.ndim == 1 or (not _runs_on(thing, run) and _runs_on([thing], run, default_collate))


def _runs_on(thing: Any, run: Run, batch_of: Callable[[Any], Any] = lambda thing: thing) -> bool:
    """Tell whether the network takes some rows of a batch.

    Other numbers of them than there are, as convolutions take an example without an axis of them.
    """
    with suppress(Exception):  # whatever a network raises
        x0, condition = split(batch_of(thing))
        rows = [0, 0] if len(x0) == 1 else [0]
        run(x0[rows], rows_of(condition, rows))
        return True
    return False


def _is_label(value: Any) -> bool:
    """Tell whether a value may be a label."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() and value.dtype != torch.bool
    return isinstance(value, int) and not isinstance(value, bool)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def split(batch: Any) -> tuple[Any, dict[str, Any]]:
    """The clean examples and the condition of a batch, as plain tensors."""
    x0, condition = _entries(batch)
    condition = {key: plain(value, f"'{key}' of the data") for key, value in condition.items()}
    if "class_labels" in condition:
        condition["class_labels"] = plain_labels(condition["class_labels"])
    return plain(x0, "The data") if isinstance(x0, Tensor) else x0, condition


def _entries(batch: Any) -> tuple[Any, dict[str, Any]]:
    """The clean examples and the condition of a batch, as they are given."""
    if isinstance(batch, Mapping):
        if "x0" not in batch:
            raise ValueError(
                f"A batch must have the key 'x0', got keys {sorted(batch)}. {_ITEM_ACCEPTED}."
            )
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
        raise ValueError(
            f"A batch must be of a known form, got {type(batch).__name__}{size}. {_ITEM_ACCEPTED}."
        )
    return batch, {}


def collated(items: list[Any]) -> Any:
    """Items as a batch."""

    def shown(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"a tensor of shape {tuple(value.shape)}"
        inside = (
            f" of {type(value[0]).__name__}" if isinstance(value, list | tuple) and value else ""
        )
        return type(value).__name__ + inside

    try:
        return default_collate(items)
    except (TypeError, RuntimeError, KeyError) as error:
        first = items[0]
        entries = first.items() if isinstance(first, Mapping) else [("item", first)]
        held = ", ".join(f"'{key}' as {shown(value)}" for key, value in entries)
        raise ValueError(
            f"Items of the data cannot be put into a batch: they hold {held} ({quoted(error)}). "
            f"{_ITEM_ACCEPTED}."
        ) from error
