"""Both interfaces of ``curvlinops``: the installed one, and stand-ins of the other's."""

from collections.abc import Callable, Iterable, MutableMapping
from types import SimpleNamespace
from typing import Any

import curvlinops
import pytest
import torch
from torch import Tensor, nn

from benchmarks.upstream import (
    params_are_named,
    takes,
    their_parameters,
    upstream_inverse,
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


# ---------------------------------------------------------------------------------------------
# Stand-ins, which remember how they were called
# ---------------------------------------------------------------------------------------------


class Operator:
    def __init__(self, model_func, *arguments, **options):
        *self.losses, self.params, self.data = arguments
        self.model_func, self.options = model_func, options


class NamedOperator(Operator):
    def __init__(
        self,
        model_func: nn.Module,
        loss_func: nn.MSELoss,
        params: dict[str, Tensor],
        data: Iterable[tuple[Tensor | MutableMapping, Tensor]],
        batch_size_fn: Callable[[MutableMapping | Tensor], int] | None = None,
        **options: Any,
    ):
        super().__init__(
            model_func, loss_func, params, data, batch_size_fn=batch_size_fn, **options
        )

    def inverse(self, damping: float = 0.0, use_exact_damping: bool = False):
        return "inverse", damping, use_exact_damping

    def trace(self):
        return torch.tensor(2.0)


class ListedOperator(Operator):
    def __init__(
        self, model_func, loss_func, params: list[Tensor], data, batch_size_fn=None, **options
    ):
        super().__init__(
            model_func, loss_func, params, data, batch_size_fn=batch_size_fn, **options
        )

    trace = torch.tensor(3.0)


class NamedEKFAC(NamedOperator):
    def inverse(self, damping: float = 0.0):
        return "inverse", damping


NEXT = SimpleNamespace(
    GGNLinearOperator=NamedOperator,
    KFACLinearOperator=NamedOperator,
    EKFACLinearOperator=NamedEKFAC,
)
RELEASED = SimpleNamespace(
    GGNLinearOperator=ListedOperator,
    FisherMCLinearOperator=ListedOperator,
    KFACLinearOperator=ListedOperator,
    KFACInverseLinearOperator=lambda K, **options: ("inverse of", K, options),
)


def test_parameters(regression):
    own = dict(regression.objective.model.named_parameters())
    names = ["layers.2.weight", "layers.0.bias"]
    named = upstream_operator("KFACLinearOperator", regression, names, library=NEXT, seed=3)
    assert list(named.params) == [f"model.{name}" for name in names]
    # what the dict names are parameters of the module that is passed with it
    model = dict(regression.model_func.named_parameters())
    assert all(named.params[name] is model[name] for name in named.params)
    assert named.options == {"batch_size_fn": regression.batch_size_fn, "seed": 3}
    listed = upstream_operator("KFACLinearOperator", regression, names, library=RELEASED)
    assert [id(p) for p in listed.params] == [id(own[name]) for name in names]
    assert len(upstream_operator("GGNLinearOperator", regression, library=NEXT).params) == len(own)


def test_monte_carlo_fisher(regression):
    new = upstream_operator("FisherMCLinearOperator", regression, library=NEXT, mc_samples=2)
    assert type(new) is NamedOperator
    assert new.options["mc_samples"] == 2
    one = upstream_operator("FisherMCLinearOperator", regression, library=NEXT)
    assert one.options["mc_samples"] == 1  # the GGN's own default is the exact one
    old = upstream_operator("FisherMCLinearOperator", regression, library=RELEASED, mc_samples=2)
    assert type(old) is ListedOperator


def test_inverses_and_traces(regression):
    K = upstream_operator("KFACLinearOperator", regression, library=NEXT)
    options = {"damping": 0.1, "use_exact_damping": True}
    assert upstream_inverse(K, library=NEXT, **options) == ("inverse", 0.1, True)
    EK = upstream_operator("EKFACLinearOperator", regression, library=NEXT)
    assert upstream_inverse(EK, library=NEXT, **options) == ("inverse", 0.1)
    old = upstream_operator("KFACLinearOperator", regression, library=RELEASED)
    assert upstream_inverse(old, library=RELEASED, **options) == ("inverse of", old, options)
    assert upstream_trace(K) == 2
    assert upstream_trace(old) == 3


# ---------------------------------------------------------------------------------------------
# The installed library
# ---------------------------------------------------------------------------------------------


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
