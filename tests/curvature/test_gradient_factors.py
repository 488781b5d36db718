"""Kronecker factors from gradients: Shampoo's, and the nearest Kronecker product."""

import pytest
import torch
from torch import nn

from curvlinops_diffusion import DiffusionEKFACLinearOperator, DiffusionKFACLinearOperator
from tests.cases import plain_regression, seeded
from tests.comparisons import assert_close, relative_error
from tests.layers.test_kinds import CASES
from tests.reference import (
    block_of,
    dense_block,
    dense_ggn,
    kronecker_factors,
    layer_ggn,
    params_of,
    type2_vectors,
)

PLAIN = {
    "linear": ((3,), lambda: seeded(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))),
    "tokens": ((5, 3), lambda: seeded(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))),
    "convolution": (
        (1, 4, 4),
        lambda: seeded(
            nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 2, padding="same")
        ),
    ),
}


def references(exact_OIOI, A):
    """Both pairs of factors, from the exact block and K-FAC's ``A``."""

    def outputs(A):
        return torch.einsum("oipj,ij->op", exact_OIOI, A)

    def inputs(B):
        return torch.einsum("oipj,op->ij", exact_OIOI, B)

    O, I = exact_OIOI.shape[:2]
    B_shampoo, A_shampoo = outputs(torch.eye(I).double()), inputs(torch.eye(O).double())
    B = outputs(A) / A.square().sum()
    A = inputs(B) / B.square().sum()
    B = outputs(A) / A.square().sum()
    return {"shampoo": (A_shampoo / A_shampoo.trace(), B_shampoo), "rank-one": (A, B)}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("approx", ["shampoo", "rank-one"])
@pytest.mark.parametrize("separate", [True, False])
def test_against_the_exact_block(name, approx, separate):
    shape, make = PLAIN[name]
    model = make()
    regression = plain_regression(model, shape, count=4)
    K = DiffusionKFACLinearOperator(
        regression,
        fisher_type="type-2",
        kfac_approx=approx,
        separate_weight_and_bias=separate,
    )
    seen = 0
    for placed in K.blocks:
        layer, part = placed.name.rsplit(".", 1)
        if part == "bias":
            continue
        module = model.get_submodule(layer)
        exact = layer_ggn(regression, module, type2_vectors, part)
        A, _ = kronecker_factors(
            regression, module, type2_vectors, "expand", with_bias=part == "joint"
        )
        I = len(A)
        expected_A, expected_B = references(exact.reshape(-1, I, len(exact) // I, I), A)[approx]
        assert_close(placed.block.input_factor, expected_A, 1e-10)
        assert_close(placed.block.output_factor, expected_B, 1e-10)
        seen += 1
    assert seen == 2


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer(name):
    """Groups, transposed weights, embeddings: what holds in any arrangement of the entries."""
    make, shape = CASES[name]
    model = make()
    regression = plain_regression(model, shape, count=3)
    names = [n for n, _ in model.named_parameters() if n.startswith("layer.")]
    full = dense_ggn(regression, params_of(model, names))

    def blocks(approx, cls=DiffusionKFACLinearOperator):
        K = cls(regression, names, fisher_type="type-2", kfac_approx=approx)
        return {p.name: p for p in K.blocks if not p.name.endswith("bias")}

    expand, shampoo, nearest = (blocks(a) for a in ("expand", "shampoo", "rank-one"))
    corrected = blocks("rank-one", DiffusionEKFACLinearOperator)
    for key, placed in nearest.items():
        exact = block_of(full, model, names, placed.params)
        first, D, S = (dense_block(b[key], model) for b in (expand, nearest, shampoo))
        # least squares in the last factor: the residual is orthogonal to the fit
        assert_close((exact * D).sum(), D.square().sum(), 1e-9)
        assert relative_error(D, exact) <= relative_error(first, exact) + 1e-9
        assert_close(S.trace(), exact.trace(), 1e-9)
        assert_close(corrected[key].block.trace(), exact.trace(), 1e-9)


def test_nearly_the_nearest():
    """Three steps of the power method are within a tenth of a percent of the SVD's error."""
    shape, make = PLAIN["convolution"]
    model = make()
    regression = plain_regression(model, shape, count=4)
    K = DiffusionKFACLinearOperator(regression, fisher_type="type-2", kfac_approx="rank-one")
    block = next(p.block for p in K.blocks if p.name == "layers.0.weight")
    exact = layer_ggn(regression, model.get_submodule("layers.0"), type2_vectors, "weight")
    O, I = block.shape
    rearranged = exact.reshape(O, I, O, I).permute(0, 2, 1, 3).reshape(O * O, I * I)
    best = torch.linalg.svdvals(rearranged)[1:].norm() / exact.norm()
    error = relative_error(torch.kron(block.output_factor, block.input_factor), exact)
    assert best <= error < 1.001 * best


def test_forward_only_is_refused():
    model = PLAIN["linear"][1]()
    with pytest.raises(ValueError, match="'shampoo' arrived with fisher_type='forward-only'"):
        DiffusionKFACLinearOperator(
            plain_regression(model, (3,)), fisher_type="forward-only", kfac_approx="shampoo"
        )


@pytest.mark.parametrize("approx", ["shampoo", "rank-one"])
def test_their_output_factor_is_no_block_of_a_bias(approx):
    regression = plain_regression(seeded(nn.Linear(3, 3)), (3,))
    with pytest.raises(ValueError, match="exact_bias=False arrived with kfac_approx"):
        DiffusionKFACLinearOperator(regression, kfac_approx=approx, exact_bias=False)
