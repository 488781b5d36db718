"""Values under several networks: on the same draws, and the first network as it was."""

import pytest
import torch

from curvlinops_diffusion import DenoisingObjective, ExampleGradientLinearOperator, NoisedRegression
from curvlinops_diffusion.measurements import SimplifiedELBO
from curvlinops_diffusion.validation import values_of_networks
from tests.cases import images, tiny_unet, unet_regression


@pytest.mark.parametrize("measurement", ["loss", SimplifiedELBO()])
def test_values(measurement):
    first, second = tiny_unet(), tiny_unet()
    for p in second.parameters():
        p.data *= 1.1
    regression = unet_regression(first, count=3)

    def of(model):
        objective = DenoisingObjective(model, regression.objective.process)
        data = {"x0": images(3), "class_labels": torch.arange(3) % 3}
        return NoisedRegression(objective, data, 4, seed=7)

    before = {name: value.clone() for name, value in first.state_dict().items()}
    found = values_of_networks(
        of(first), (n for n in (second, first.state_dict(), second)), measurement=measurement
    )
    for row, model in zip(found, (second, first, second), strict=True):
        J = ExampleGradientLinearOperator(of(model), measurement=measurement)
        torch.testing.assert_close(row, J.values(), rtol=1e-12, atol=0)
    assert not torch.allclose(found[0], found[1], rtol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())


def test_errors():
    query = unet_regression(tiny_unet(), count=2)
    with pytest.raises(ValueError, match="No networks arrived"):
        values_of_networks(query, [])
    state = query.objective.model.state_dict()
    name, value = state.popitem()
    with pytest.raises(ValueError, match=rf"whose weights are others: {name} differ"):
        values_of_networks(query, [state])
    with pytest.raises(ValueError, match="are others"):
        values_of_networks(query, [{**state, name: value[..., :0]}])
