"""What the program reads off a trained network: how it takes images."""

import pytest

from curvlinops_diffusion.cli.images.labels import Condition
from curvlinops_diffusion.cli.images.preprocessing import Form
from curvlinops_diffusion.cli.network import load_network
from curvlinops_diffusion.cli.options import FitOptions
from tests.diffusion import test_pipelines as pipelines


@pytest.mark.parametrize(
    ("make", "size", "multiple", "condition"),
    [
        (pipelines.ddpm, (8, 8), 2, Condition()),
        (pipelines.ldm, None, 4, Condition()),
        (pipelines.dit, (8, 8), 4, Condition("class_labels", 4)),
    ],
)
def test_what_networks_take(tmp_path, make, size, multiple, condition):
    """Grey images become three channels; sizes that would not fit are known beforehand."""
    make(tmp_path).save_pretrained(tmp_path / "p")
    network = load_network(FitOptions(pipeline=tmp_path / "p", data=tmp_path, output=tmp_path))
    assert network.form(None) == Form(3, size, None, multiple)
    assert network.condition == condition
