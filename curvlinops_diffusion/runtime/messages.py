"""Messages of other libraries, quoted within ours."""

from __future__ import annotations

import re

_LIMIT = 400
# C++ stacks, which torch appends to its messages
_STACK = re.compile(r"^(?:frame #|Exception raised from )")


def quoted(error: BaseException) -> str:
    """Quote an error of another library in one line.

    The first line alone often ends at a colon, and what names the cause stands in the next ones
    or in the last: lines are joined, and of a long message the beginning and the end are kept.

    Args:
        error: The error.

    Returns:
        The message without line breaks, stacks of C++ and repeated lines, at most 400 characters;
        with the kind of error where the message alone says little (``KeyError: 'conv_in'``) and
        the error that it was raised from.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    lines = [line for line in lines if line and not _STACK.match(line)]
    text = " ".join(dict.fromkeys(lines))
    if not text or isinstance(error, LookupError):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    if error.__cause__ is not None and str(error.__cause__) not in text:
        text = f"{text.rstrip('.')} ({quoted(error.__cause__)})"
    if len(text) > _LIMIT:
        head, tail = text[: _LIMIT * 2 // 3], text[-(_LIMIT // 3 - 3) :]
        text = f"{head.rpartition(' ')[0] or head} … {tail.partition(' ')[2] or tail}"
    return text
