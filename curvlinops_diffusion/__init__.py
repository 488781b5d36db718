"""Curvature of diffusion models as linear operators, and the influence scores that follow.

A plugin to ``curvlinops``, after Mlodozeniec et al., *Influence Functions for Scalable Data
Attribution in Diffusion Models*, ICLR 2025 (arXiv:2410.13850).

A name is imported when it is first asked for, so that the program starts without PyTorch.
"""

import lazy_loader

# the names stand in __init__.pyi
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
