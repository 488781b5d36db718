"""Results that are made by a thread: while the ones before are used, or beside other work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

import torch

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


class Foreseen(Generic[Argument, Result]):
    """A pure function, the result of the argument that is likely to be next being made ahead.

    Args:
        function: The function.
    """

    def __init__(self, function: Callable[[Argument], Result]):
        self._function = function
        self._expected: tuple[Argument, Callable[[], Result]] | None = None

    def __reduce__(self) -> Any:
        """Copies begin anew."""
        return Foreseen, (self._function,)

    def __call__(self, argument: Argument) -> Result:
        """Its result."""
        expected, self._expected = self._expected, None
        if expected is not None and expected[0] == argument:
            return expected[1]()
        return self._function(argument)

    def expect(self, argument: Argument) -> None:
        """Begin with an argument."""
        self._expected = argument, _started(partial(self._function, argument), "foreseen")


def beside(function: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """Start a function in a thread of its own, with a queue of its own on a GPU.

    Args:
        function: Changes nothing, and reads what was told to the device before.
        device: The device that it reads from.

    Returns:
        Waits for its result.
    """
    if device.type != "cuda":
        run = function
    else:
        queue = torch.cuda.Stream(device)
        queue.wait_stream(torch.cuda.current_stream(device))

        def run() -> Result:
            with torch.cuda.stream(queue):
                return function()

    return _started(run, "beside")


def _started(function: Callable[[], Result], name: str) -> Callable[[], Result]:
    """Start a thread that ends with its function."""
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return future.result
