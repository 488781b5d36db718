"""A bar that counts draws."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def draws_bar(total: int, description: str, shown: bool) -> Any:
    """A progress bar over draws, as a context manager.

    Args:
        total: The number of draws.
        description: What is done with them.
        shown: Whether to show it; it counts all the same.
    """
    return tqdm(total=total, desc=description, unit="draws", disable=not shown)
