"""The one place that touches names of ``curvlinops`` outside its public interface.

``curvlinops``' next major version rearranges its insides; moving to it must cost this file.
"""

import warnings

with warnings.catch_warnings():
    # a library of curvlinops' scripts functions when it is imported
    warnings.simplefilter("ignore", FutureWarning)
    from curvlinops._torch_base import PyTorchLinearOperator


__all__ = ["PyTorchLinearOperator"]
