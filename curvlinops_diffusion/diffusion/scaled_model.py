"""The network in the form that ``curvlinops`` wants: batches as mappings of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from curvlinops_diffusion.diffusion.batch import NoisedBatch, leaves, mapped, named
from curvlinops_diffusion.diffusion.data import CleanData
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.runtime.modes import twice_differentiable

# Under which the entries of a condition are named in a batch for ``curvlinops``
_CONDITION = "condition"


class ScaledModel(nn.Module):
    """The network for ``curvlinops``: a mapping in, ``√(w_t r D m) f`` of ``[B, D]`` out."""

    def __init__(self, objective: DenoisingObjective, data: CleanData):
        super().__init__()
        self.model = objective.model
        self._objective = objective
        self._data = data  # should a batch come before one was made here
        self._form: Any = None  # of the condition, with the class in place of each tensor

    def forward(self, X: Mapping[str, Tensor]) -> Tensor:
        """Predict, in a form that can be differentiated in forward mode and twice.

        Depends on the batch through tensors alone, so that a graph traced on one batch is right
        for another.
        """
        if self._form is None:
            self._form = _form_of(self._objective.encode(next(iter(self._data))).condition)
        condition = mapped(
            lambda name, e: X[f"{_CONDITION}/{name}"] if e is Tensor else e,
            named(self._form),
            self._form,
        )
        with twice_differentiable():
            prediction_BD = self._objective.predict_from(X["x_t"], X["timestep"], condition)
            return scaled(X, prediction_BD)

    def inputs(self, batch: NoisedBatch) -> dict[str, Tensor]:
        """A batch as :meth:`forward` takes it: tensors by name.

        Plain values of the condition (a flag, a number), which are the same for every batch, are
        remembered instead.
        """
        scale = (batch.weight_B * batch.target_BD.shape[1]).sqrt()
        if batch.mask_BD is not None:
            scale = scale.unsqueeze(1) * batch.mask_BD.sqrt()
        X = {"x_t": batch.x_t, "timestep": batch.timestep_B, "scale": scale}
        for name, value in leaves(batch.condition):
            if isinstance(value, Tensor):
                X[f"{_CONDITION}/{name}"] = value
            elif isinstance(value, list):
                raise ValueError(
                    f"Operators of curvlinops take tensors, got '{name}' of the condition as a "
                    f"list of {type(value[0]).__name__}. Embed it by "
                    "encode=LatentEncoder(embed=...) of the objective."
                )

        form = _form_of(batch.condition)
        if self._form not in (None, form):
            raise ValueError(
                "Operators of curvlinops take the same condition for every batch but for its "
                f"tensors, got {self._form} in one batch and {form} in another. Pass what changes "
                "as a tensor."
            )
        self._form = form
        return X


def _form_of(condition: Mapping[str, Any]) -> Any:
    return mapped(lambda entry: Tensor if isinstance(entry, Tensor) else entry, condition)


def scaled(X: Mapping[str, Tensor], z_BD: Tensor) -> Tensor:
    """Predictions or targets with the roots of the weights, of examples or of their entries."""
    return X["scale"].reshape(len(z_BD), -1) * z_BD
