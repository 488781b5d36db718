"""Attention that can be differentiated in forward mode and twice."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Run ``scaled_dot_product_attention`` in its plain (math) form within the context.

    The fused forms have no forward-mode derivative ("Trying to use forward AD with
    _scaled_dot_product_flash_attention_for_cpu that does not support it") and no second one.
    The setting found is restored on leaving, also after an exception.
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield
