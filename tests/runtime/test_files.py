"""Files hold what was written, or say that they do not."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from curvlinops_diffusion import (
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    GradientStore,
    PassOptions,
)
from curvlinops_diffusion.influence.compression import Compression
from curvlinops_diffusion.runtime.files import FileKind
from tests.cases import plain_regression, seeded


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.replace(b"12345", b"12344"),  # of the header
        lambda raw: raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:],  # of a number
        lambda raw: raw.replace(b'"F32"', b'"I32"'),  # of what the numbers are
    ],
)
def test_what_is_read_is_what_was_written(tmp_path, change):
    kind, path = FileKind("kind", "tests", "Write it again."), tmp_path / "file.safetensors"
    tensors = {"b": torch.ones(2), "a": torch.eye(3)[:, 1:], "none": torch.zeros(0, 2)}
    kind.write(path, tensors, {"number": 12345})
    header, found = kind.read(path)
    assert header == {"number": 12345}
    assert all(torch.equal(found[name], z) for name, z in tensors.items())
    raw = path.read_bytes()
    assert change(raw) != raw
    path.write_bytes(change(raw))
    with pytest.raises(ValueError, match="its numbers are not those that were written"):
        kind.read(path)


def test_another_version_is_refused(tmp_path):
    kind, path = FileKind("kind", "tests", "Write it again."), tmp_path / "file.safetensors"
    replace(kind, version=2).write(path, {"a": torch.ones(2)}, {})
    reads = [kind.read, kind.read_header, kind.names, lambda p: kind.read_rows(p, "a", slice(1))]
    for read in reads:
        with pytest.raises(ValueError, match=r"has the format version 2, and this .* reads 1\."):
            read(path)
    replace(kind, version=None).write(path, {"a": torch.ones(2)}, {})
    with pytest.raises(ValueError, match="has the format version None"):
        kind.read(path)
    assert replace(kind, version=None).read(path)[0] == {}


def test_a_full_disk_is_told_beforehand(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    kind, path = FileKind("kind", "tests", "Write it again."), tmp_path / "file.safetensors"
    kind.write(path, {"a": torch.ones(100)}, {})
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"numbers of 'file.safetensors' take 4e-06 GB, and 1e-06 GB are free"
    ):
        kind.write(path, {"a": torch.ones(1000)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    model = seeded(nn.Conv2d(2, 2, 3, padding=1))
    regression = plain_regression(model, (2, 4, 4))
    folder = tmp_path / "new" / "checkpoint"
    with pytest.raises(
        ValueError, match=r"Checkpoints of the factors take .* are free in '.*checkp"
    ):
        DiffusionKFACLinearOperator(regression, passes=PassOptions(folder))
    J, K = ExampleGradientLinearOperator(regression), DiffusionKFACLinearOperator(regression)
    assert 4 * 5 * J.shape[1] == 760
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=700))
    for precision in ("float32", "bfloat16"):
        compression = Compression(precision=precision)
        if precision == "bfloat16":  # half of it
            GradientStore.create(tmp_path / precision, J, K, 1e-3, compression)
            continue
        with pytest.raises(
            ValueError, match=r"The gradients of the other examples take 7.6e-07 GB"
        ):
            GradientStore.create(tmp_path / precision, J, K, 1e-3, compression)
