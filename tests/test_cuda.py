"""On an accelerator, with the data on the CPU: the same results. Skipped where there is none."""

import pytest
import torch

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    PassOptions,
    influence_scores,
    load_operator,
)
from curvlinops_diffusion.runtime.digests import fingerprint
from tests.cases import tiny_unet, unet_regression
from tests.comparisons import assert_close
from tests.reference import to_dense

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*in no supported layer"),
]


@pytest.fixture(scope="module")
def regressions():
    return [unet_regression(tiny_unet().to(device)) for device in ("cpu", "cuda")]


@pytest.mark.parametrize("kind", [DiffusionKFACLinearOperator, DiffusionEKFACLinearOperator])
def test_factors_inverses_and_scores(regressions, kind, tmp_path):
    results = []
    for regression in regressions:
        operator = kind(regression)
        v = torch.linspace(-1, 1, operator.shape[0], dtype=torch.float64).to(operator.device)
        J = ExampleGradientLinearOperator(regression, operator.param_names)
        inverse = operator.inverse(1e-3)
        operator.save(tmp_path / "file")
        loaded = load_operator(tmp_path / "file", regression.objective.model)
        assert loaded.device.type == operator.device.type == regression.objective.device.type
        products = operator @ v, inverse @ v, loaded @ v, influence_scores(J, inverse, J)
        results.append([p.cpu() for p in products])
    for on_cpu, on_cuda in zip(*results, strict=True):
        assert_close(on_cuda, on_cpu, 1e-8)


def test_exact_products(regressions):
    results = []
    for regression in regressions:
        G = DiffusionGGNLinearOperator(regression)
        V = torch.linspace(-1, 1, 2 * G.shape[0], dtype=torch.float64).reshape(-1, 2).to(G.device)
        J = ExampleGradientLinearOperator(regression)
        w = torch.ones(J.shape[0], dtype=torch.float64, device=J.device)
        results.append([p.cpu() for p in (G @ V, J @ V, J.adjoint() @ w, J.rows(), J.values())])
    for on_cpu, on_cuda in zip(*results, strict=True):
        assert_close(on_cuda, on_cpu, 1e-8)


def test_the_largest_batch_fits():
    """Tried out by the allocator's own count; so does a fit with it."""
    objective = unet_regression(tiny_unet(num_class_embeds=None).float().to("cuda")).objective
    auto = NoisedRegression(objective, torch.randn(2048, 1, 8, 8), 1, batch_size="auto")
    assert 64 <= auto.batch_size <= 1024
    K = DiffusionKFACLinearOperator(auto)
    assert (K @ torch.ones(K.shape[1], device="cuda")).isfinite().all()


def test_digests(regressions):
    """The same as on the CPU, and others after a change."""
    on_cpu, on_cuda = (fingerprint(r.objective.model) for r in regressions)
    assert on_cpu == on_cuda
    network = tiny_unet().to("cuda")
    before = fingerprint(network)
    network.conv_in.weight.data[0, 0, 0, 0] += 1
    assert fingerprint(network) != before


def test_autocast():
    on_cuda = unet_regression(
        tiny_unet(torch.float32).cuda(),
        dtype=torch.float32,
        objective={"autocast": torch.bfloat16},
    )
    exact = unet_regression(tiny_unet(torch.float32), dtype=torch.float32)
    names = ["conv_in.weight", "conv_out.weight"]
    low, high = (DiffusionKFACLinearOperator(r, names) for r in (on_cuda, exact))
    assert_close(to_dense(low).cpu(), to_dense(high), 0.05)


def test_blocks_that_wait_on_the_host(regressions, tmp_path):
    """Beyond the memory they are fitted in groups, and multiplied from the host."""
    regression = regressions[1]
    EK = DiffusionEKFACLinearOperator(regression)
    waiting = DiffusionEKFACLinearOperator(regression, passes=PassOptions(max_memory=250_000))
    assert {placed.device.type for placed in waiting.blocks} == {"cpu"}
    v = torch.linspace(-1, 1, EK.shape[0], dtype=torch.float64).cuda()
    for found, expected in (
        (waiting @ v, EK @ v),
        (waiting.inverse(1e-3) @ v, EK.inverse(1e-3) @ v),
        (waiting.inverse(rtol=1e-3) @ v, EK.inverse(rtol=1e-3) @ v),
        (waiting.eigenvalues(), EK.eigenvalues()),
        (waiting.trace(), EK.trace()),
        (waiting.frobenius_norm(), EK.frobenius_norm()),
    ):
        assert found.device == expected.device
        assert_close(found, expected, 1e-10)
    waiting.save(tmp_path / "file")
    loaded = load_operator(
        tmp_path / "file", regression.objective.model, passes=PassOptions(max_memory=1)
    )
    assert_close(loaded.inverse(1e-3) @ v, EK.inverse(1e-3) @ v, 1e-10)
