"""What is sent to a device is not waited for: seen on one of shapes alone."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvlinops_diffusion import DenoisingObjective, NoisedRegression
from curvlinops_diffusion.curvature.loss_vectors import loss_vectors
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.runtime.devices import to_device
from tests.cases import images, seeded


class Copies(TorchDispatchMode):
    """Whether copies from the host to the device are waited for, one by one."""

    def __init__(self):
        super().__init__()
        self.waited_for = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        copies = func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu"
        if copies and str(kwargs.get("device")) == "meta":
            self.waited_for.append(not kwargs.get("non_blocking", False))
        return func(*args, **kwargs)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_batches(dropout):
    """Nor what is pulled back; and what all draws share is sent once."""
    text = {"text": torch.zeros(2)} if dropout else None
    x0 = images(4, dtype=torch.float32)
    data = {"x0": x0, "text": torch.ones(4, 2), "mask": torch.ones_like(x0)}
    options = {"input_perturbation": 0.1, "example_weights": torch.ones(4), "loss_mask": "mask"}
    options |= {"augment": "flip", "batch_size": 4}
    counts = []
    for num_draws in (1, 2, 3):
        network = seeded(nn.Conv2d(3, 3, 1), dtype=torch.float32)
        objective = DenoisingObjective(
            network, DDPMScheduler(), condition_dropout=dropout, null_condition=text
        )
        regression = NoisedRegression(objective, data, num_draws, **options)
        (clean,) = regression.clean_batches()
        network.to("meta")
        with Copies() as copies:
            for batch in regression.noised_batches(clean):
                prediction_BD = torch.empty_like(batch.target_BD)
                list(loss_vectors(batch, prediction_BD, regression.draws, KFACOptions()))
        assert not any(copies.waited_for)
        counts.append(len(copies.waited_for))
    assert counts[0] > 8
    shared = 2 * 3  # two versions of image, text and mask
    assert counts[2] - counts[1] == counts[1] - counts[0] == counts[0] - shared


def test_nothing_is_waited_for_on_the_way_to_a_device_alone():
    """What comes from one would be read before it is there."""
    asked = []

    class Seen:
        def to(self, device, dtype, non_blocking):
            asked.append(non_blocking)

    for device in ("cpu", "meta"):
        to_device(Seen(), torch.device(device))
    assert asked == [False, True]


def test_memory_that_a_gpu_reads(monkeypatch):
    """On the host, for a GPU; what is there already, or stays here, is as it is."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda z: pinned.append(z) or z.clone())
    z = torch.ones(2)
    assert pinned(z, torch.device("cpu")) is z
    assert pinned(z.to("meta"), torch.device("cuda")).is_meta
    assert not pinned
    pinned(z, torch.device("cuda"))
    assert len(pinned) == 1
