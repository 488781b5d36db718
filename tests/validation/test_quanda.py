"""quanda's metrics on our scores, end to end; by `make test-quanda`, which installs it."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch.utils.data import TensorDataset

from tests.cases import images, tiny_unet

pytest.importorskip("quanda")

from quanda.metrics.downstream_eval import ClassDetectionMetric, MislabelingDetectionMetric
from quanda.metrics.heuristics import ModelRandomizationMetric

from curvlinops_diffusion.validation.quanda import AttributionExplainer

COUNT = 8
GIVEN = {
    "scheduler": DDPMScheduler(num_train_timesteps=100),
    "conditional": True,
    "fit": {"num_draws": 2},
    "score": {"num_draws": 4, "damping": 1e-3},
}


@pytest.fixture(scope="module")
def explainer():
    unet = tiny_unet(torch.float32)
    data = TensorDataset(images(COUNT, dtype=torch.float32), torch.arange(COUNT) % 2)
    return AttributionExplainer(unet, data, **GIVEN)


def test_class_detection(explainer):
    """The share of the first that have the query's class."""
    x0, labels = explainer.train_dataset.dataset.tensors
    scores = explainer.explain(x0[:3] / 2, labels[:3])
    direct = explainer.attributor.score(
        {"x0": x0[:3] / 2, "class_labels": labels[:3]}, **GIVEN["score"]
    )
    assert torch.equal(scores, direct.scores)
    metric = ClassDetectionMetric(explainer.model, explainer.train_dataset, s=2)
    metric.update(scores, labels[:3])
    expected = (labels[scores.topk(2).indices] == labels[:3, None]).float().mean()
    assert metric.compute()["score"] == pytest.approx(float(expected))


def test_mislabelling(explainer):
    """By the influence of each image on itself."""
    metric = MislabelingDetectionMetric(
        explainer.model,
        explainer.train_dataset,
        mislabeling_indices=[1],
        precomputed_self_influence=explainer.self_influence(batch_size=COUNT),
    )
    found = metric.compute()
    place = explainer.self_influence().argsort(descending=True).tolist().index(1)
    assert found["success_arr"].sum() == 1
    assert found["score"] > 0
    assert bool(found["success_arr"][place])


def test_randomised_weights(explainer, tmp_path):
    """An explainer of another network, which quanda makes."""
    torch.save(explainer.model.state_dict(), tmp_path / "weights.pth")
    metric = ModelRandomizationMetric(
        explainer.model,
        "unet",
        str(tmp_path),
        explainer.train_dataset.dataset,
        checkpoints=[str(tmp_path / "weights.pth")],
        explainer_cls=AttributionExplainer,
        expl_kwargs=GIVEN,
    )
    x0, labels = explainer.train_dataset.dataset.tensors
    metric.update(explainer.explain(x0[:3], labels[:3]), x0[:3], labels[:3])
    assert -1 <= metric.compute()["score"] < 0.9
