"""The one place that touches names of ``curvlinops`` outside its public interface.

``curvlinops``' next major version rearranges its insides; moving to it must cost this file.
"""

from curvlinops._torch_base import PyTorchLinearOperator

__all__ = ["PyTorchLinearOperator"]
