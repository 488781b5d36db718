"""Results that are made by a thread while the ones before are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def one_ahead(
    function: Callable[[Argument], Result], arguments: Iterable[Argument]
) -> Iterator[Result]:
    """Yield a function's results in order, the next one being made while one is used.

    Args:
        function: Is called in a thread of its own; what it does in NumPy does not hold Python up.
        arguments: Its arguments.
    """
    waiting: Future[Result] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="one-ahead") as pool:
        for argument in arguments:
            made = pool.submit(function, argument)
            if waiting is not None:
                yield waiting.result()
            waiting = made
        if waiting is not None:
            yield waiting.result()
