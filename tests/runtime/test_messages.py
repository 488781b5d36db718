"""Quotes of other libraries' errors: one line, with what names the cause."""

import pytest

from curvlinops_diffusion.runtime.checks import quoted


def raised_from(cause, text):
    try:
        raise ValueError(text) from cause
    except ValueError as error:
        return error


SIZES = [f"size mismatch for layer{n}.weight: copying a param with shape [2]" for n in range(32)]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("The following keys are left:\n\n a.diff,\tb.diff"), None),
        (KeyError("conv_in"), "KeyError: 'conv_in'"),
        (RuntimeError(), "RuntimeError"),
        (RuntimeError("\n\n"), "RuntimeError"),
        (RuntimeError("same\nsame\nother"), "same other"),
        (RuntimeError("no\nException raised from x at y.cpp:1\nframe #0: f\nframe #1: g"), "no"),
        (raised_from(OSError("file not covered"), "No weights."), "No weights (file not covered)"),
        (raised_from(OSError("No"), "No weights."), "No weights."),
    ],
)
def test_quotes(error, expected):
    text = quoted(error)
    assert text == (expected or "The following keys are left: a.diff, b.diff")


def test_long_messages_keep_both_ends():
    text = quoted(RuntimeError("Errors in loading:\n" + "\n".join([*SIZES, "the cause is y.z"])))
    assert text.startswith("Errors in loading: size mismatch for layer0.weight: copying")
    assert text.endswith("the cause is y.z")
    assert " … " in text
    assert len(text) <= 400
    assert len(quoted(RuntimeError("x" * 10_000))) <= 400
