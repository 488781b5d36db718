"""Passes that form the gradients of single examples, layer by layer, and reduce them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from curvlinops_diffusion.curvature.loss_vectors import CheckedLossVectors
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.curvature.shared_batches import SharedBatches
from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.data import CleanBatch
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers import ExactKind, Layer
from curvlinops_diffusion.layers.observable import ObservedRetrial
from curvlinops_diffusion.layers.observation import Observer, WholeLayers, WithinEach, observed
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions, run_pass
from curvlinops_diffusion.runtime.precision import matmuls_in_tf32
from curvlinops_diffusion.runtime.sums import Sums

#: Called with a layer, the batch's examples, and the layer's inputs and gradients, call by call.
Consume = Callable[[Layer, Sequence[int], list[Tensor], list[Tensor]], None]


@dataclass(frozen=True)
class GradientPass:
    """Runs every draw and loss vector, and hands on what the layers of Kronecker form saw.

    Attributes:
        regression: Objective, data and draws.
        plan: The blocks.
        passes: Checkpoints, processes and progress.
    """

    regression: NoisedRegression
    plan: BlockPlan
    passes: PassOptions = PLAIN

    def run(self, name: str, consume: Consume, sums: Sums) -> None:
        """Run over the data.

        Args:
            name: What is computed, for messages and checkpoints.
            consume: Reduces what a layer saw.
            sums: What it adds to.
        """
        objective, plan = self.regression.objective, self.plan
        indices: Sequence[int] = ()

        class Indexed(WholeLayers):
            def start(self, batch: NoisedBatch) -> None:
                nonlocal indices
                indices = batch.indices

        def on_layer(layer: Layer, xs: list[Tensor], gs: list[Tensor]) -> None:
            if layer.name in plan.by_layer:
                consume(layer, indices, xs, gs)

        layers = plan.beside or plan.layers
        retried = ObservedRetrial(self.regression, layers)
        vectors = CheckedLossVectors(self.regression, plan.options)
        observer: Observer = Indexed(on_layer, objective.working_dtype)
        if plan.options.rounds_products(self.regression.device):
            observer = WithinEach(observer, matmuls_in_tf32)
        # of exact blocks no gradients of single examples are wanted
        factored = {layer.name for layer in layers if not isinstance(layer.kind, ExactKind)}
        holders = None if plan.holders is None else plan.holders.restricted(factored)
        shared = SharedBatches(self.regression, holders, observer)
        with observed(objective, layers, shared) as network:

            def step(clean: CleanBatch) -> None:
                for batch in shared.noised_batches(clean):
                    network.run(batch, vectors)
                vectors.settle()
                retried(clean)

            run_pass(
                *(name, self.regression, sums, step, self.passes, plan.settings),
                together=shared.processes,
                on_batch=shared.tell,
            )
