"""Passes that form the gradients of single examples, layer by layer, and reduce them at once.

Legend: N batch, g an optional axis of groups, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops_diffusion.curvature.loss_vectors import (
    check_batch_prediction,
    numbered_loss_vectors,
)
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.diffusion.data import CleanBatch
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers import Coverage, Layer, Part
from curvlinops_diffusion.layers.hooks import CallRecorder, frozen, in_precision, tapped
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions, run_pass
from curvlinops_diffusion.runtime.sums import Sums

#: Called with a layer, the batch's examples, and the layer's inputs and gradients, call by call.
Consume = Callable[[Layer, Sequence[int], list[Tensor], list[Tensor]], None]


@dataclass(frozen=True)
class GradientPass:
    """Runs every draw and loss vector, and hands on what the layers of Kronecker form saw.

    Attributes:
        regression: Objective, data and draws.
        coverage: The layers.
        options: The loss vectors.
        passes: Checkpoints, processes and progress.
    """

    regression: NoisedRegression
    coverage: Coverage
    options: KFACOptions
    passes: PassOptions = PLAIN

    def parts(self, layer: Layer) -> tuple[Part, ...]:
        """The blocks of Kronecker form of a layer."""
        return layer.parts(self.options.separate_weight_and_bias, self.options.exact_bias)

    def run(self, name: str, consume: Consume, sums: Sums) -> None:
        """Run over the data.

        Args:
            name: What is computed, for messages and checkpoints.
            consume: Reduces what a layer saw.
            sums: What it adds to.
        """
        objective, dtype = self.regression.objective, self.regression.objective.working_dtype
        layers = [layer for layer in self.coverage.layers if self.parts(layer)]
        indices: Sequence[int] = ()

        def on_layer(layer: Layer, xs: list[Tensor], gs: list[Tensor]) -> None:
            consume(layer, indices, in_precision(xs, dtype), in_precision(gs, dtype))

        recorder = CallRecorder(on_layer)

        def step(clean: CleanBatch) -> None:
            nonlocal indices
            for batch in self.regression.noised_batches(clean):
                indices = batch.indices
                recorder.start_forward(len(indices))
                prediction_BD = objective.predict(batch)
                check_batch_prediction(self.regression, batch, prediction_BD)
                for v_BD, more in numbered_loss_vectors(
                    self.regression, batch, prediction_BD, self.options
                ):
                    recorder.backward(prediction_BD, v_BD, retain_graph=more)

        settings = {"options": self.options.as_dict(), "params": list(self.coverage.params)}
        with tapped(layers, recorder.tap), frozen(objective.model), torch.enable_grad():
            run_pass(name, self.regression, sums, step, self.passes, settings)
