"""Comparisons that say how far apart two results are."""

from torch import Tensor


def relative_error(result: Tensor, truth: Tensor) -> float:
    """``‖result − truth‖ / ‖truth‖``."""
    assert result.shape == truth.shape, f"shapes {result.shape} and {truth.shape}"
    difference = (result.double() - truth.double()).norm()
    scale = truth.double().norm()
    return float(difference / scale) if scale > 0 else float(difference)


def assert_close(result: Tensor, truth: Tensor, rtol: float) -> None:
    """Assert a relative error in the Frobenius norm."""
    error = relative_error(result, truth)
    assert error <= rtol, f"relative error {error:.3g} exceeds {rtol:g}"
