"""The layers of a model, by what is known of their types."""

from curvlinops_diffusion.layers.coverage import LAYER_KINDS, Coverage, cover, covered_parameters
from curvlinops_diffusion.layers.kind import ExactKind, LayerKind, SharingKind
from curvlinops_diffusion.layers.layer import Layer, Part

__all__ = [
    "LAYER_KINDS",
    "Coverage",
    "ExactKind",
    "Layer",
    "LayerKind",
    "Part",
    "SharingKind",
    "cover",
    "covered_parameters",
]
