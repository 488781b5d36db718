"""What a GPU would be told and asked in a pass, counted here: launches, and waits for an answer."""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from curvlinops_diffusion import DiffusionEKFACLinearOperator, DiffusionKFACLinearOperator
from curvlinops_diffusion.layers import patch_moments
from curvlinops_diffusion.runtime.flags import DeviceFlag
from tests.cases import unet_regression

VIEWS = {
    *("view", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select"),
    *("alias", "detach", "as_strided", "_unsafe_view", "unfold", "split", "unbind"),
}
WAITS = {"_local_scalar_dense", "bincount", "nonzero", "equal", "is_nonzero", "masked_select"}


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.launches = 0
        self.waits = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.launches += name not in VIEWS
        self.waits[name] += name in WAITS
        return func(*args, **(kwargs or {}))


def a_batch_more(make, count=4):
    """What a second batch of four examples adds, as many as the network is tried out on."""
    found = []
    for examples in (count, 2 * count):
        with Counted() as counted:
            make(examples)
        found.append(counted)
    few, many = found
    return many.launches - few.launches, many.waits - few.waits


def problem(examples):
    return unet_regression(count=examples, num_draws=1, batch_size=4)


def factors(examples):
    DiffusionKFACLinearOperator(problem(examples))


def training(examples):
    regression = problem(examples)
    objective = regression.objective
    for batch in regression.batches():
        loss = batch.loss(objective.predict(batch)).sum()
        torch.autograd.grad(loss, list(objective.model.parameters()), allow_unused=True)


def test_launches_of_a_batch(monkeypatch):
    """Fewer than three times a training pass'; 3.2 times before sums were added to in place."""
    trained, _ = a_batch_more(training)
    for on_gpu in (False, True):
        monkeypatch.setattr(patch_moments, "on_tensor_cores", lambda x, on_gpu=on_gpu: on_gpu)
        fitted, waits = a_batch_more(factors)
        print(on_gpu, trained, fitted, waits)
        assert fitted < 3 * trained
        # whether the data is finite, on the host; and whether the prediction is
        assert waits == {"_local_scalar_dense": 2}


@pytest.mark.parametrize("kind", [DiffusionKFACLinearOperator, DiffusionEKFACLinearOperator])
def test_predictions_are_looked_at_later(kind, monkeypatch):
    """When the next draw's has been told, and at the end of a batch."""
    events = []
    read = DeviceFlag.__bool__
    monkeypatch.setattr(DeviceFlag, "__bool__", lambda self: events.append("read") or read(self))
    regression = unet_regression(count=2, num_draws=3)
    hook = lambda *args: events.append("run")  # noqa: E731
    regression.objective.model.register_forward_pre_hook(hook)
    kind(regression, ["conv_out.weight"])
    a_pass = ["run", "run", "read", "run", "read", "read"]
    assert events.count("read") == (3 if kind is DiffusionKFACLinearOperator else 6)
    assert events[-6:] == a_pass
