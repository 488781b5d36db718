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


def check_loader(loader: DataLoader[Any]) -> None:
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
    if not streamed and known_size(loader) is None:
        order: Any = loader.sampler if batches is None else batches
        # a sampler may shuffle by a fixed seed (DistributedSampler, until set_epoch is called)
        if any(repr(a) != repr(b) for a, b in zip_longest(order, list(order))):
            raise ValueError(
                f"The DataLoader's {type(order).__name__} yields another order in each iteration. "
                "Every pass must see the same examples in the same order: fix its seed, or pass a "
                "Subset of the data set, without this sampler."
            )
    # the last of which accelerate's loaders have
    check_whole(loader.dataset, *samplers, getattr(loader, "state", None))
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


def check_whole(dataset: Any, *others: Any) -> None:
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


def known_size(loader: DataLoader[Any]) -> int | None:
    """The number of examples that come; ``None`` where only a pass over them would tell.

    A sampler may leave out examples or repeat them. What puts items together may, too; that not
    as many come is then seen at the end of the first iteration.
    """
    batches: Any = loader.batch_sampler
    own = type(batches) is BatchSampler and batches.sampler is loader.sampler
    every = type(loader.sampler) is SequentialSampler and type(loader) is DataLoader
    return len(loader.sampler) if own and every else None  # type: ignore[arg-type]
