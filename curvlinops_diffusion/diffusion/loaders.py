"""``DataLoader``: which examples of its data set come, in which order, and how many."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from itertools import zip_longest
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

# libraries whose data sets may hold one process' part
_SHARDING = ("accelerate", "datasets", "transformers")


def iterated(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate without touching torch's random state, from which a new iterator draws a seed.

    Raises:
        ValueError: If the data set has no item of a number that the loader asks for, or allows
            one iteration at a time.
    """
    state = torch.get_rng_state()
    iterator = iter(_reentrant(loader))
    torch.set_rng_state(state)
    try:
        yield from iterator
    except (IndexError, KeyError) as error:
        raise ValueError(
            f"An item of the data ({type(loader.dataset).__name__}) cannot be read "
            f"({type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}). Is its "
            "length the number of its items?"
        ) from error
    except RuntimeError as error:
        if "has been invalidated" not in str(error):
            raise
        raise ValueError(
            f"The data ({type(loader.dataset).__name__}) allows one iteration at a time, and "
            "several go on beside each other. Pass a Dataset, or an IterableDataset that starts "
            "anew in each iteration."
        ) from error


def _reentrant(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader, of which several iterations may go on at the same time.

    One with persistent workers has a single iterator, which a second iteration begins anew.
    """
    if not loader.persistent_workers:
        return loader
    other = copy(loader)
    vars(other).update(persistent_workers=False, _iterator=None)
    return other


def check_loader(loader: DataLoader[Any]) -> None:
    """Check that a loader yields all of its examples, in the same order each time.

    Raises:
        ValueError: If it shuffles, leaves out a last batch, or yields one process' part.
    """
    batches = loader.batch_sampler
    samplers = [loader.sampler, batches, getattr(batches, "sampler", None)]
    for sampler in samplers:
        _check_drawn(sampler)
    _check_order(loader)
    # the last of which accelerate's loaders have
    check_whole(loader.dataset, *samplers, getattr(loader, "state", None))
    _check_last_batch(loader)


def check_whole(dataset: Any, *others: Any) -> None:
    """Check that a data set, and what chooses of it, give every process all examples.

    Of data sets only those of libraries are looked at: users' have attributes of any meaning.

    Raises:
        ValueError: If one gives each a part.
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


def _check_drawn(sampler: Any) -> None:
    if type(sampler) is RandomSampler:
        raise ValueError(
            "The DataLoader shuffles. Every pass must see the same examples in the same order: "
            "pass shuffle=False."
        )
    if isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        raise ValueError(
            f"The DataLoader's {type(sampler).__name__} chooses or shuffles examples anew each "
            "time. Every pass must see the same ones in the same order: pass a Subset of the data "
            "set, without this sampler."
        )


def _check_order(loader: DataLoader[Any]) -> None:
    """Compare the numbers of the examples in two iterations, without reading any of them.

    A sampler may shuffle by a fixed seed (``DistributedSampler``, until ``set_epoch`` is called).
    """
    if isinstance(loader.dataset, IterableDataset) or known_batches(loader) is not None:
        return
    order: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if any(repr(a) != repr(b) for a, b in zip_longest(order, list(order))):
        raise ValueError(
            f"The DataLoader's {type(order).__name__} yields another order in each iteration. "
            "Every pass must see the same examples in the same order: fix its seed, or pass a "
            "Subset of the data set, without this sampler."
        )


def _check_last_batch(loader: DataLoader[Any]) -> None:
    batches: Any = loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset):
        if loader.drop_last:
            raise ValueError(
                "The DataLoader has drop_last=True and would leave out the last examples of a "
                "stream. Pass drop_last=False."
            )
        return
    if not getattr(batches, "drop_last", False):
        return
    try:
        size, batch = len(batches.sampler), int(batches.batch_size)
    except (TypeError, AttributeError):
        raise ValueError(
            f"The DataLoader's {type(batches).__name__} has drop_last=True and may leave out "
            "examples. Pass drop_last=False."
        ) from None
    if size % batch:
        raise ValueError(
            f"The DataLoader has drop_last=True and would leave out {size % batch} of {size} "
            "examples. Pass drop_last=False."
        )


def known_size(loader: DataLoader[Any]) -> int | None:
    """The number of examples that come; ``None`` where only a pass over them would tell.

    A sampler may leave out examples or repeat them. What puts items together may, too; that not
    as many come is then seen at the end of the first iteration.
    """
    return None if known_batches(loader) is None else len(loader.sampler)  # type: ignore[arg-type]


def known_batches(loader: DataLoader[Any]) -> int | None:
    """The number of batches that come; ``None`` likewise."""
    batches: Any = loader.batch_sampler
    own = type(batches) is BatchSampler and batches.sampler is loader.sampler
    every = type(loader.sampler) is SequentialSampler
    return len(loader) if own and every and type(loader) is DataLoader else None
