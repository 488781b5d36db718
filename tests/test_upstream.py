"""The interface of the installed ``curvlinops``; ``make test-upstream`` installs its next one."""

import curvlinops
import pytest
from torch import nn

from benchmarks.upstream import (
    params_are_named,
    takes,
    their_parameters,
    upstream_operator,
    upstream_passes,
    upstream_trace,
)
from curvlinops_diffusion import DiffusionKFACLinearOperator
from tests.cases import plain_regression, seeded
from tests.comparisons import assert_close
from tests.reference import dense_ggn, params_of, to_dense


def network():
    return seeded(nn.Conv2d(1, 2, 2, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 2))


@pytest.fixture
def regression():
    return plain_regression(network(), (1, 4, 4), count=5, num_draws=2, batch_size=2)


def test_the_installed_interface_is_recognised(regression):
    assert params_are_named() != hasattr(curvlinops, "KFACInverseLinearOperator")
    theirs = upstream_operator("GGNLinearOperator", regression)
    truth = dense_ggn(regression, params_of(regression.objective.model))
    assert_close(to_dense(theirs), truth, 1e-12)


@pytest.mark.skipif(
    not takes(curvlinops.KFACLinearOperator.__init__, "backend"),
    reason="the installed curvlinops traces no graphs; make test-upstream runs its main branch",
)
@pytest.mark.parametrize("batch_size", [2, 5])
def test_kfac_from_a_traced_graph(batch_size):
    """Several batches of one size share a graph, which must not hold the first one's draws."""
    regression = plain_regression(network(), (1, 4, 4), count=5, num_draws=2, batch_size=batch_size)
    options = {"fisher_type": "type-2", "check_deterministic": False}
    ours = DiffusionKFACLinearOperator(regression, fisher_type="type-2", exact_bias=False)
    for backend in ("hooks", "make_fx"):
        theirs = upstream_operator("KFACLinearOperator", regression, backend=backend, **options)
        assert_close(ours.trace(), upstream_trace(theirs), 1e-12)
        assert_close(to_dense(ours), to_dense(theirs), 1e-10)


def test_their_passes_run(regression):
    """What ``benchmarks/factor_pass.py`` times."""
    assert their_parameters(regression) == [
        name for name, _ in regression.objective.model.named_parameters()
    ]
    passes = upstream_passes(regression)
    assert len(passes) == 2
    for run in passes.values():
        run()
