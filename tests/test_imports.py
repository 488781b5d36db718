"""Everything that the project needs imports together: one resolver run chose it."""

import importlib

import pytest
import torch

import curvlinops_diffusion


@pytest.mark.parametrize(
    "name",
    [
        "torch",
        "torchvision",
        "diffusers",
        "curvlinops",
        "backpack",
        "safetensors",
        "sklearn",
        "matplotlib",
    ],
)
def test_imports(name):
    importlib.import_module(name)


def test_torchvision_matches_torch():
    """A mismatched build fails with "operator torchvision::nms does not exist"."""
    from diffusers import UNet2DModel  # noqa: F401
    from torchvision.ops import nms

    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    assert nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0]


def test_public_names_exist():
    for name in curvlinops_diffusion.__all__:
        assert getattr(curvlinops_diffusion, name).__doc__
