"""An index of stored gradients: exact where it compares with all, and of its own store alone."""

import sys

import pytest
import torch

from curvlinops_diffusion import (
    Compression,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    GradientStore,
    NearestGradients,
    NoisedRegression,
)
from tests.cases import images, tiny_unet, unet_regression
from tests.comparisons import assert_close

N = 40


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    train = unet_regression(tiny_unet(), count=N)
    K = DiffusionKFACLinearOperator(train)
    data = {"x0": images(4), "class_labels": torch.arange(4) % 3}
    J_query = ExampleGradientLinearOperator(NoisedRegression(train.objective, data, 2, seed=1))
    folder = tmp_path_factory.mktemp("nearest") / "store"
    J_train = ExampleGradientLinearOperator(train)
    compression = Compression("float32", "random", 512)
    store = GradientStore.create(folder, J_train, K, 1e-3, compression)
    return store, J_query, K, J_train


def test_all_compared(problem, tmp_path):
    store, J_query, K, _ = problem
    NearestGradients.build(store, tmp_path / "i.safetensors")
    index = NearestGradients.open(store, tmp_path / "i.safetensors")
    found, scores = index.search(J_query, K, k=5), store.scores(J_query, K)
    top = scores.topk(5)
    assert torch.equal(found.indices, top.indices)
    assert_close(found.scores, top.values, 1e-5)
    assert index.search(J_query, K, k=99).indices.shape == (4, N)


def test_clusters(problem, tmp_path):
    """All of them are as good as none; one is looked through faster, and finds less."""
    store, J_query, K, _ = problem
    index = NearestGradients.build(store, tmp_path / "i.safetensors", "IVF8,Flat")
    top = store.scores(J_query, K).topk(5).indices
    assert torch.equal(index.search(J_query, K, k=5, probes=8).indices, top)
    few = index.search(J_query, K, k=N, probes=1)
    assert (few.indices < 0).any()
    assert (few.scores[few.indices < 0] == -torch.inf).all()


def test_errors(problem, tmp_path):
    store, J_query, K, J_train = problem
    path = tmp_path / "i.safetensors"
    index = NearestGradients.build(store, path)
    with pytest.raises(ValueError, match="factory='Something' makes no index"):
        NearestGradients.build(store, tmp_path / "x.safetensors", "Something")
    other = GradientStore.create(tmp_path / "other", J_train, K, 1e-2, Compression("float32"))
    with pytest.raises(ValueError, match="is an index of another store"):
        NearestGradients.open(other, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"NearestGradients.build"):
        NearestGradients.open(store, path)
    with pytest.raises(ValueError, match="for another curvature"):
        index.search(J_query, DiffusionKFACLinearOperator(J_train.regression, mc_samples=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "faiss", None)
        with pytest.raises(
            ValueError, match=r"needs faiss: pip install 'curvlinops-diffusion\[index\]'"
        ):
            NearestGradients.build(store, path)
