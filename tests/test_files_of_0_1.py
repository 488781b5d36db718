"""Files that version 0.1 wrote (commit 1a1e5f1) open and hold the same numbers."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    GradientStore,
    LatentEncoder,
    MinSNRWeighting,
    NoisedRegression,
    PassOptions,
    influence_scores,
    load_operator,
)
from curvlinops_diffusion.influence.read_scores import read_scores
from tests.cases import TimeBlind, noise_levels
from tests.comparisons import assert_close

FILES = Path(__file__).parent / "files_of_0_1"
EXPECTED = load_file(FILES / "expected.safetensors")
TOLERANCE = 1e-5  # the files are in float32
# samples in the trial of a network, of four examples at two levels: a batch twice, each sample
# alone, the gradients of autograd and of hooks (of two examples), and the layers' calls
TRIAL = 2 * 8 + 8 + 2 * 4 + 2 * 4


@pytest.fixture(scope="module")
def model():
    model = TimeBlind(
        nn.Conv2d(2, 2, 3, padding=1),
        nn.Tanh(),
        nn.GroupNorm(1, 2),
        nn.Conv2d(2, 2, 2, padding=1),
        nn.Conv2d(2, 2, 2),
    )
    model.load_state_dict(load_file(FILES / "model.safetensors"))
    return model


@pytest.fixture(scope="module")
def train(model):
    return NoisedRegression(
        DenoisingObjective(model, noise_levels()), EXPECTED["train"], 2, batch_size=3
    )


@pytest.fixture(scope="module")
def query(model):
    objective = DenoisingObjective(model, noise_levels())
    return NoisedRegression(objective, EXPECTED["queries"], 2, seed=1, batch_size=2)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "inverse"])
def test_operators(model, name):
    operator = load_operator(FILES / f"{name}.safetensors", model)
    assert_close(operator @ EXPECTED["vector"], EXPECTED[name], TOLERANCE)


def test_operators_made_anew(train):
    vector = EXPECTED["vector"]
    K = DiffusionKFACLinearOperator(train, separate_weight_and_bias=False)
    assert_close(K @ vector, EXPECTED["kfac"], TOLERANCE)
    assert_close(DiffusionEKFACLinearOperator(train) @ vector, EXPECTED["ekfac"], TOLERANCE)


def test_checkpoints(train, tmp_path, monkeypatch):
    """A pass that 0.1 finished is not run again."""
    shutil.copytree(FILES / "checkpoints", tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(DenoisingObjective, "predict", None)
    with pytest.raises(TypeError, match="not callable"):
        DiffusionKFACLinearOperator(train, separate_weight_and_bias=False)
    monkeypatch.undo()
    calls = []
    predict = DenoisingObjective.predict

    def counted(self, batch, *args, **kwargs):
        calls.append(len(batch.x_t))
        return predict(self, batch, *args, **kwargs)

    monkeypatch.setattr(DenoisingObjective, "predict", counted)
    passes = PassOptions(tmp_path)
    K = DiffusionKFACLinearOperator(train, separate_weight_and_bias=False, passes=passes)
    assert sum(calls) == TRIAL
    assert_close(K @ EXPECTED["vector"], EXPECTED["kfac"], TOLERANCE)


def test_interrupted_passes(model, tmp_path):
    """What 0.1 began goes on: here in the last batch of EK-FAC's second pass."""
    for name in ("kronecker_factors", "eigenbases", "eigenvalues"):
        shutil.copy(FILES / "interrupted" / f"{name}.0.safetensors", tmp_path)
    train = NoisedRegression(
        DenoisingObjective(model, noise_levels(), MinSNRWeighting(2.0)),
        EXPECTED["train"],
        2,
        batch_size=1,
    )
    shown = []
    hook = model.register_forward_hook(lambda module, args, output: shown.append(len(output)))
    EK = DiffusionEKFACLinearOperator(train, passes=PassOptions(tmp_path))
    hook.remove()
    assert sum(shown) == TRIAL + 2, "two draws of one example"
    expected = load_file(FILES / "interrupted" / "expected.safetensors")
    assert_close(EK @ EXPECTED["vector"], expected["ekfac"], TOLERANCE)


def test_stores(model, train, query):
    EK = load_operator(FILES / "ekfac.safetensors", model)
    store = GradientStore.open(FILES / "store")
    J_query = ExampleGradientLinearOperator(query, EK.param_names)
    assert_close(store.scores(J_query, EK), EXPECTED["stored"], TOLERANCE)
    J_train = ExampleGradientLinearOperator(train, EK.param_names)
    scores = influence_scores(J_query, EK.inverse(1e-3), J_train)
    assert_close(scores, EXPECTED["scores"], TOLERANCE)


def test_latents(tmp_path):
    """Embeddings that 0.1 cached do not say what embedded them, and are computed anew."""
    shutil.copytree(FILES / "latents", tmp_path, dirs_exist_ok=True)
    before = set(tmp_path.iterdir())
    encode = LatentEncoder(embed=lambda x0, condition: {"embeds": x0 + 1}, cache=tmp_path)
    for _ in range(2):
        encoded = encode(EXPECTED["queries"], {"prompt": ["a", "b"]})
        assert_close(encoded.condition["embeds"], EXPECTED["queries"] + 1, 0.0)
    assert len(set(tmp_path.iterdir()) - before) == 1


def test_scores():
    scores_QN, header = read_scores(FILES / "scores.safetensors")
    assert scores_QN.shape == (2, 3)
    assert torch.isfinite(scores_QN).all()
    assert header["train"] == ["0.png", "1.png", "2.png"]
    assert header["queries"] == ["0.png", "1.png"]
