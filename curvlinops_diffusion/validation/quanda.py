"""Attribution as an explainer of quanda, whose metrics then judge it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from quanda.explainers import Explainer
from torch import Tensor, nn

from curvlinops_diffusion.attributor import Attributor
from curvlinops_diffusion.diffusion.objective import DenoisingObjective


class AttributionExplainer(Explainer):
    """Influence on a denoiser's loss as an explainer of ``quanda``.

    For its metrics that look at scores and labels alone: class detection, mislabelling, mixed
    data sets, randomisation of weights, the cardinality of the first images. Those that ask the
    model for logits (a shortcut's, retraining's, whatever filters by prediction) have nothing to
    ask here: a denoiser predicts no class.

    Source: Bareeva et al., 2024 (quanda).

    Args:
        model: The denoiser.
        train_dataset: Pairs of an image ``[C, H, W]`` in [-1, 1] and its label.
        scheduler: Its scheduler.
        task: As in quanda.
        checkpoints: For quanda, which loads the last itself where a metric needs it.
        checkpoints_load_func: Likewise.
        conditional: Whether the network is given the labels, as ``class_labels``.
        fit: Options of :meth:`~curvlinops_diffusion.Attributor.fit`.
        score: Options of :meth:`~curvlinops_diffusion.Attributor.score`.
        options: Options of :class:`~curvlinops_diffusion.Attributor`.

    Attributes:
        attributor: What is asked.
    """

    accepted_tasks = ["image_classification"]  # noqa: RUF012

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        scheduler: Any,
        *,
        task: str = "image_classification",
        checkpoints: Any = None,
        checkpoints_load_func: Any = None,
        conditional: bool = False,
        fit: Mapping[str, Any] | None = None,
        score: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(model, train_dataset, task, checkpoints, checkpoints_load_func)
        images, labels = zip(
            *(self.train_dataset[n] for n in range(len(train_dataset))), strict=True
        )
        self._conditional, self._score = conditional, dict(score or {})
        data = self._given(torch.stack(images), torch.stack(labels))
        objective = DenoisingObjective(model.eval(), scheduler)
        self.attributor = Attributor(objective, data, **options).fit(**(fit or {}))

    def explain(self, test_data: Tensor, targets: Sequence[int] | Tensor) -> Tensor:
        """Score every training image for each query, ``[Q, N]``."""
        queries = self._given(test_data, torch.as_tensor(targets))
        return self.attributor.score(queries, **self._score).scores

    def _given(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"x0": images} | ({"class_labels": labels.long()} if self._conditional else {})
