"""Stored training gradients: the scores they give, in every form; interrupted, damaged, foreign."""

import pytest
import torch
from torch import nn

from curvlinops_diffusion import (
    Compression,
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    GradientStore,
    KernelOptions,
    NoisedRegression,
    influence_scores,
    kernel_regression_scores,
    top_influences,
)
from curvlinops_diffusion.influence.store import GRADIENTS, Whitening
from tests.cases import images, plain_regression, seeded, tiny_unet, unet_regression
from tests.comparisons import assert_close

DAMPING = 1e-3
COUNT = 9


@pytest.fixture(scope="module")
def train():
    return unet_regression(tiny_unet(), count=COUNT)


@pytest.fixture(scope="module")
def J_train(train):
    return ExampleGradientLinearOperator(train)


@pytest.fixture(scope="module")
def J_query(train):
    data = {"x0": images(4), "class_labels": torch.arange(4) % 3}
    return ExampleGradientLinearOperator(NoisedRegression(train.objective, data, 2, seed=1))


@pytest.fixture(scope="module")
def EK(train):
    return DiffusionEKFACLinearOperator(train)


@pytest.fixture(scope="module")
def scores(J_query, EK, J_train):
    return influence_scores(J_query, EK.inverse(DAMPING), J_train)


@pytest.mark.parametrize("kind", [DiffusionKFACLinearOperator, DiffusionEKFACLinearOperator])
def test_whitened_inner_products(train, J_train, kind):
    curvature = kind(train, separate_weight_and_bias=False)
    rows = J_train.rows()
    z = Whitening(curvature, DAMPING)(rows)
    assert_close(z @ z.T, rows @ (curvature.inverse(DAMPING) @ rows.T), 1e-10)


# relative errors of scores that are allowed: rounding for the first two, else twice what is seen
FORMS = {
    "float32": (Compression("float32"), 1e-6),
    "bfloat16": (Compression("bfloat16"), 6e-3),
    "int8": (Compression("int8"), 2e-2),
    "nf4": (Compression("nf4"), 2e-1),
    "svd, all": (Compression("float32", "svd", COUNT), 1e-5),
    "random": (Compression("float32", "random", 4096, seed=1), 3e-1),
}


PADDED = -(-4925 // 64) * 64
BYTES = {
    "float32": 4 * 4925,
    "bfloat16": 2 * 4925,
    "int8": PADDED + PADDED / 16,
    "nf4": PADDED / 2 + PADDED / 16,
}


@pytest.mark.parametrize("form", FORMS)
def test_scores(tmp_path, J_train, J_query, EK, scores, form):
    compression, allowed = FORMS[form]
    store = GradientStore.create(tmp_path / "store", J_train, EK, DAMPING, compression)
    found = store.scores(J_query, EK)
    assert_close(found.double(), scores, allowed)
    if form in BYTES:  # beyond headers, as many as the bits say
        assert BYTES[form] <= store.bytes_per_example <= BYTES[form] + 300
    again = GradientStore.open(tmp_path / "store")
    assert torch.equal(again.scores(J_query, EK), found)
    top = again.top(J_query, EK, k=3)
    assert torch.equal(top.positive.indices, found.topk(3, 1).indices)
    if form == "float32":
        expected = top_influences(J_query, EK.inverse(DAMPING), J_train, k=3)
        assert torch.equal(top.negative.indices, expected.negative.indices)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_bytes": 5 * 4 * 4925}, {"largest_gram": COUNT - 1}],
)
def test_kernel_regression(tmp_path, J_train, J_query, EK, options):
    """As from gradients that are computed anew: whole, in parts, by iteration."""
    store = GradientStore.create(tmp_path / "s", J_train, EK, DAMPING, Compression("float32"))
    expected = kernel_regression_scores(J_query, EK.inverse(DAMPING), J_train, ridge=0.5)
    solved = KernelOptions(tolerance=1e-6, **options)
    assert_close(store.regression_scores(J_query, EK, 0.5, solved).double(), expected, 1e-4)
    with pytest.raises(ValueError, match=r"`ridge` must be .*got -1"):
        store.regression_scores(J_query, EK, -1)


def test_svd_is_the_best_approximation():
    rows = torch.randn(8, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    compression = Compression("float32", "svd", 3)
    projected = compression.project(rows, compression.fit(rows))
    U, S, _ = torch.linalg.svd(rows)
    assert_close(projected @ projected.T, (U[:, :3] * S[:3] ** 2) @ U[:, :3].T, 1e-10)


def test_interrupted_and_continued(tmp_path, J_train, J_query, EK):
    whole = GradientStore.create(tmp_path / "whole", J_train, EK, DAMPING).scores(J_query, EK)
    folder = tmp_path / "store"
    store = GradientStore.create(folder, J_train, EK, DAMPING)
    for path in sorted(folder.glob("rows.*"))[1:3]:
        path.unlink()
    with pytest.raises(ValueError, match=r"holds 5 of 9 training examples. Call .*create again"):
        store.scores(J_query, EK)
    calls = []
    hook = J_train.regression.objective.model.register_forward_hook(lambda *a: calls.append(1))
    store = GradientStore.create(folder, J_train, EK, DAMPING)
    hook.remove()
    assert torch.equal(store.scores(J_query, EK), whole)
    assert len(calls) == 4  # two batches, two rounds each: the check was passed before


def test_something_else_is_refused(tmp_path, train, J_train, J_query, EK):
    folder = tmp_path / "store"
    store = GradientStore.create(folder, J_train, EK, DAMPING)
    with pytest.raises(ValueError, match=r"gradients of something else: damping \(0.001 there"):
        GradientStore.create(folder, J_train, EK, 1e-5)
    with pytest.raises(ValueError, match=r"compression.precision \(bfloat16 there, int8 here\)"):
        GradientStore.create(folder, J_train, EK, DAMPING, Compression("int8"))
    other = DiffusionEKFACLinearOperator(train, mc_samples=2)
    with pytest.raises(ValueError, match=r"another curvature: curvature.options.mc_samples \(1"):
        store.scores(J_query, other)
    path = next(iter(sorted(folder.glob("rows.*"))))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"not a whole safetensors file.*create again"):
        store.scores(J_query, EK)
    with pytest.raises(ValueError, match=r"There is no file .*GradientStore.create again"):
        GradientStore.open(tmp_path)


@pytest.mark.parametrize("form", ["int8", "nf4", "svd"])
def test_what_was_cut_is_refused(tmp_path, J_train, J_query, EK, form):
    """Scales, of which what unquantises them would read beyond their end; coordinates."""
    compression = Compression("float32", "svd", 3) if form == "svd" else Compression(form)
    GradientStore.create(tmp_path, J_train, EK, DAMPING, compression)
    path = tmp_path / ("store.safetensors" if form == "svd" else "rows.0000000.safetensors")
    header, tensors = GRADIENTS.read(path)
    if form == "svd":
        basis, message = tensors["basis"], "is damaged"
        changes = [{"basis": basis[:-1]}, {"basis": basis[:, :2]}, {}]
    else:
        scales, codes = {"scales": tensors["scales"][:1, :1]}, {"codes": tensors["codes"][:, :-1]}
        changes, message = [tensors | scales, tensors | codes], "codes and scales do not fit"
    for change in changes:
        GRADIENTS.write(path, change, header)
        with pytest.raises(ValueError, match=message):
            GradientStore.open(tmp_path).scores(J_query, EK)


def test_bad_options():
    for options, message in (
        ({"precision": "int2"}, "`precision` must be one of 'float32'"),
        ({"projection": "dense"}, "`projection` must be one of"),
        ({"projection": "svd"}, "`size` must be a whole number of at least 1, got None"),
        ({"size": 4}, "`size` needs a projection, got 4 without"),
    ):
        with pytest.raises(ValueError, match=message):
            Compression(**options)
    rows = torch.randn(4, 10)
    with pytest.raises(ValueError, match="`size` must be at most 4 for a 'svd' projection from 4"):
        Compression(projection="svd", size=5).fit(rows)


def test_linear_layers_alone(tmp_path):
    """No class labels, no attention; another order of blocks and parameters."""
    regression = plain_regression(seeded(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (3,))
    names = ["layers.2.bias", "layers.0.weight", "layers.2.weight"]
    K = DiffusionKFACLinearOperator(regression, names)
    J = ExampleGradientLinearOperator(regression, names)
    store = GradientStore.create(tmp_path / "s", J, K, DAMPING, Compression("float32"))
    expected = influence_scores(J, K.inverse(DAMPING), J)
    assert_close(store.scores(J, K).double(), expected, 1e-6)


def test_stores_of_inverses_and_of_other_parameters_are_refused(tmp_path):
    twins = seeded(nn.Linear(3, 3), nn.Linear(3, 3))
    regression = plain_regression(twins, (3,))
    names = ["layers.0.weight", "layers.1.weight"]
    EK = DiffusionEKFACLinearOperator(regression, names)
    J = ExampleGradientLinearOperator(regression, names)
    reversed_J = ExampleGradientLinearOperator(regression, names[::-1])
    with pytest.raises(ValueError, match=r"J_train has 'layers.1.weight', the curvature has 'lay"):
        GradientStore.create(tmp_path / "a", reversed_J, EK, 1e-2)
    for power in (EK.inverse(1e-2), EK.power(0.5)):
        with pytest.raises(
            ValueError, match=r"must be K-FAC or EK-FAC itself, .* got its power (-1|0.5)"
        ):
            GradientStore.create(tmp_path / "b", J, power, 1e-2)
    assert list(tmp_path.iterdir()) == []
    store = GradientStore.create(tmp_path / "c", J, EK, 1e-2)
    with pytest.raises(ValueError, match=r"holds gradients for another curvature"):
        store.scores(reversed_J, EK)
