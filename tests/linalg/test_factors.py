"""Factors that are decomposed together have the decompositions that each has by itself."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from curvlinops_diffusion import DiffusionEKFACLinearOperator
from curvlinops_diffusion.linalg import factors
from curvlinops_diffusion.linalg.factors import (
    alike,
    eigendecomposition,
    eigendecompositions,
)
from tests.cases import tiny_unet, unet_regression


def semidefinite(count, size, rank):
    root = torch.randn(count, size, rank, generator=torch.Generator().manual_seed(0))
    return list(root.double() @ root.double().mT)


@pytest.mark.parametrize("settle_null", [False, True])
@pytest.mark.parametrize("rank", [3, 8])
def test_together_or_apart(rank, settle_null):
    matrices = {f"{n}": M for n, M in enumerate(semidefinite(4, 8, rank))}
    for one, M in zip(eigendecompositions(matrices, settle_null), matrices.values(), strict=True):
        alone = eigendecomposition(M, "it", settle_null)
        torch.testing.assert_close(one.values, alone.values)
        assert torch.equal(one.is_null(), alone.is_null())
        rebuilt = (one.vectors * one.values) @ one.vectors.mT
        torch.testing.assert_close(rebuilt, M)
        # let go of by itself
        assert one.vectors.untyped_storage().nbytes() == one.vectors.nbytes


def test_what_is_not_finite_is_named():
    matrices = dict(zip("abc", semidefinite(3, 4, 4), strict=True))
    matrices["b"][0, 0] = torch.inf
    with pytest.raises(ValueError, match="b has 1 entries"):
        eigendecompositions(matrices)


def test_which_are_decomposed_together(monkeypatch):
    monkeypatch.setattr(factors, "_SMALL", 4)
    shapes = {
        **{f"small {n}": torch.Size([4, 4]) for n in range(3)},
        **{f"smaller {n}": torch.Size([2, 2]) for n in range(2)},
        **{f"large {n}": torch.Size([5, 5]) for n in range(2)},
        "diagonal": torch.Size([4]),
        "of groups": torch.Size([2, 4, 4]),
    }
    assert list(alike(shapes)) == [
        *(["large 0"], ["large 1"], ["diagonal"], ["of groups"]),
        *(["small 0", "small 1"], ["small 2"], ["smaller 0", "smaller 1"]),
    ]


def test_adapters_need_few_decompositions(monkeypatch):
    """As many of the small factors as take the largest's memory in one; the same curvature."""
    unet = tiny_unet()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]), unet)
    names = [name for name, _ in unet.named_parameters() if "lora_" in name]
    regression = unet_regression(unet.double().eval(), count=3, num_draws=2)
    shapes = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda M: shapes.append(M.shape[-2:]) or eigh(M))
    together = DiffusionEKFACLinearOperator(regression, names)
    assert set(shapes) == {(2, 2), (4, 4)}
    assert shapes.count((2, 2)) * 4 == shapes.count((4, 4))
    monkeypatch.setattr(factors, "_SMALL", 0)
    shapes.clear()
    apart = DiffusionEKFACLinearOperator(regression, names)
    assert len(shapes) == 2 * len(names)
    v = torch.randn(together.shape[1], generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(together @ v, apart @ v)
