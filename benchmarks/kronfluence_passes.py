"""The passes of ``kronfluence`` (Grosse et al., 2023) on a problem of ours, if installed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from curvlinops_diffusion import NoisedRegression
from curvlinops_diffusion.diffusion.batch import NoisedBatch


class _Batches(Dataset):
    """The regression's draws, one by one."""

    def __init__(self, regression: NoisedRegression):
        self._items = [
            (x_t, t, y, w, {key: value[b].cpu() for key, value in batch.condition.items()})
            for batch in regression.batches()
            for b, (x_t, t, y, w) in enumerate(zip(*_on_host(batch), strict=True))
        ]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self._items[index]


def _on_host(batch: NoisedBatch) -> list[Tensor]:
    """The tensors of a batch, on the host, as its loaders want them."""
    return [z.cpu() for z in (batch.x_t, batch.timestep_B, batch.target_BD, batch.weight_B)]


def kronfluence_passes(
    regression: NoisedRegression, batch_size: int
) -> dict[str, Callable[[], object]]:
    """Its covariance and eigenvalue passes, by their public interface.

    Both read and write files, as they always do; so small ones that it does not matter. Under
    autocast with its own settings for that, which keep the eigenvalues alone in float32.

    Raises:
        ImportError: If ``kronfluence`` is not installed.
    """
    from kronfluence.arguments import FactorArguments
    from kronfluence.utils.common.factor_arguments import smart_low_precision_factor_arguments

    analyzer = _analyzer(regression)
    data = _Batches(regression)
    common = {"per_device_batch_size": batch_size, "overwrite_output_dir": True}
    autocast = regression.objective.autocast
    arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=False)
    if autocast is not None:
        arguments = smart_low_precision_factor_arguments("ekfac", autocast)

    def covariances() -> None:
        analyzer.fit_covariance_matrices("factors", data, factor_args=arguments, **common)

    def eigenvalues() -> None:
        analyzer.fit_lambda_matrices("factors", data, factor_args=arguments, **common)

    covariances()
    analyzer.perform_eigendecomposition("factors", factor_args=arguments)
    return {"kronfluence covariances": covariances, "kronfluence eigenvalues": eigenvalues}


def kronfluence_scores(
    train: NoisedRegression, query: NoisedRegression, batch_size: int
) -> Callable[[], object]:
    """Its pairwise scores with the identity for curvature: gradients and products alone.

    Raises:
        ImportError: If ``kronfluence`` is not installed.
    """
    from kronfluence.arguments import FactorArguments

    analyzer = _analyzer(train)
    train_data, query_data = _Batches(train), _Batches(query.with_draws(1))
    analyzer.fit_all_factors(
        "factors", train_data, factor_args=FactorArguments(strategy="identity")
    )

    def scores() -> None:
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query_data,
            train_data,
            per_device_query_batch_size=len(query_data),
            per_device_train_batch_size=batch_size,
            overwrite_output_dir=True,
        )

    return scores


def _analyzer(regression: NoisedRegression) -> Any:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.task import Task

    class Denoising(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x_t, t, y, w, condition = batch
            prediction = model(x_t, t, **condition).sample.flatten(1)
            if sample:  # the model's own distribution, whose Fisher is the GGN
                y = prediction.detach() + torch.randn_like(prediction) / (2 * w).sqrt()[:, None]
            return (w[:, None] * (prediction - y).square()).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    # it wraps the model's layers for good
    model = prepare_model(deepcopy(regression.objective.model), Denoising())
    return Analyzer(
        "benchmark",
        model,
        Denoising(),
        cpu=regression.objective.device.type == "cpu",
        disable_tqdm=True,
        log_level=40,
        output_dir=tempfile.mkdtemp(prefix="kronfluence-"),
    )
