"""Settings of every test process."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)  # tests run in several processes

#: What is computed on a device is tested on each that this machine has.
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="session", params=DEVICES)
def device(request):
    """A device, at PyTorch's defaults."""
    return torch.device(request.param)
