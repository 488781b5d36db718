"""Kronecker factors from gradients: Shampoo's."""

import pytest
import torch
from torch import nn

from curvlinops_diffusion import DiffusionEKFACLinearOperator, DiffusionKFACLinearOperator
from tests.cases import plain_regression, seeded
from tests.comparisons import assert_close
from tests.layers.test_kinds import problem
from tests.reference import (
    block_of,
    dense_block,
    dense_ggn,
    layer_ggn,
    params_of,
    type2_vectors,
)

PLAIN = {
    "tokens": ((5, 3), lambda: seeded(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), True),
    "convolution": (
        (1, 4, 4),
        lambda: seeded(
            nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 2, padding="same")
        ),
        False,
    ),
}


def reference(exact_OIOI):
    """Both factors, from the exact block."""
    B, A = (torch.einsum(sums, exact_OIOI) for sums in ("oipi->op", "oioj->ij"))
    return A / A.trace(), B


@pytest.mark.parametrize("name", PLAIN)
def test_against_the_exact_block(name):
    shape, make, separate = PLAIN[name]
    model = make()
    regression = plain_regression(model, shape, count=4)
    K = DiffusionKFACLinearOperator(
        regression,
        fisher_type="type-2",
        kfac_approx="shampoo",
        separate_weight_and_bias=separate,
    )
    seen = 0
    for placed in K.blocks:
        layer, part = placed.name.rsplit(".", 1)
        if part == "bias":
            continue
        module = model.get_submodule(layer)
        exact = layer_ggn(regression, module, type2_vectors, part)
        O = placed.block.output_factor.shape[0]
        I = len(exact) // O
        expected_A, expected_B = reference(exact.reshape(O, I, O, I))
        assert_close(placed.block.input_factor, expected_A, 1e-10)
        assert_close(placed.block.output_factor, expected_B, 1e-10)
        seen += 1
    assert seen == 2


KINDS = [
    "Conv2d: groups",
    "Conv3d",
    "ConvTranspose1d: stride",
    "ConvTranspose2d: a channel a group",
    "Embedding with padding",
    "Linear",
]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer(name):
    """Groups, transposed weights, embeddings: what holds in any arrangement of the entries."""
    model, regression = problem(name)
    names = [n for n, _ in model.named_parameters() if n.startswith("layer.")]
    full = dense_ggn(regression, params_of(model, names))

    def blocks(kind):
        K = kind(regression, names, fisher_type="type-2", kfac_approx="shampoo")
        return {p.name: p for p in K.blocks if not p.name.endswith("bias")}

    corrected = blocks(DiffusionEKFACLinearOperator)
    for key, placed in blocks(DiffusionKFACLinearOperator).items():
        exact = block_of(full, model, names, placed.params)
        assert_close(dense_block(placed, model).trace(), exact.trace(), 1e-9)
        assert_close(corrected[key].block.trace(), exact.trace(), 1e-9)


def test_their_output_factor_is_no_block_of_a_bias():
    regression = plain_regression(seeded(nn.Linear(3, 3)), (3,))
    with pytest.raises(
        ValueError, match="`exact_bias` must be True for `kfac_approx='shampoo'`, got False"
    ):
        DiffusionKFACLinearOperator(regression, kfac_approx="shampoo", exact_bias=False)
