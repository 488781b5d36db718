"""Passes over the data that run every draw forward, and pull loss vectors back through the network.

Legend: B batch, D entries of a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor
from torch import distributed as dist

from curvlinops_diffusion.curvature.options import FisherType, KFACOptions
from curvlinops_diffusion.curvature.plan import BlockPlan, Holders
from curvlinops_diffusion.diffusion.batch import CleanBatch, NoisedBatch
from curvlinops_diffusion.diffusion.checks import check_prediction
from curvlinops_diffusion.diffusion.draws import Draws
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers import ExactKind, Layer
from curvlinops_diffusion.layers.observation import Observer, Observers, WholeLayers, observed
from curvlinops_diffusion.layers.probe import Retrial
from curvlinops_diffusion.runtime.devices import DeviceFlag, to_like
from curvlinops_diffusion.runtime.division import in_equal_parts
from curvlinops_diffusion.runtime.passes import PassOptions, run_pass
from curvlinops_diffusion.runtime.precision import matmuls_in_tf32
from curvlinops_diffusion.runtime.processes import ALONE, lost_processes_named
from curvlinops_diffusion.runtime.sums import Running, Sums

#: Called with a layer, its inputs and gradients, call by call, and the number of examples.
Consume = Callable[[Layer, list[Tensor], list[Tensor], int], None]


def loss_vectors(
    batch: NoisedBatch, prediction_BD: Tensor, draws: Draws, options: KFACOptions
) -> Iterator[Tensor]:
    """Yield loss vectors ``v``, ``[B, D]``, with ``E[Σ v vᵀ]`` the curvature of each loss.

    For the GGN of the model that is ``2 w_t r I``; for the GGN of the loss the outer product of
    the loss' gradient in the prediction.
    """
    prediction_BD = prediction_BD.detach()
    match options.fisher_type:
        case FisherType.MC:
            for k in range(options.mc_samples):
                probe_BD = draws.probe(
                    batch.indices, batch.common_draw, k, prediction_BD.shape[1], options.probe_type
                )
                probe_BD = to_like(probe_BD, prediction_BD)
                yield batch.loss_hessian_root(probe_BD) / sqrt(options.mc_samples)
        case FisherType.TYPE2:
            for d in range(prediction_BD.shape[1]):
                unit_BD = torch.zeros_like(prediction_BD)
                unit_BD[:, d] = 1
                yield batch.loss_hessian_root(unit_BD)
        case FisherType.EMPIRICAL:
            yield batch.loss_gradient(prediction_BD)


class CheckedLossVectors:
    """Loss vectors of a batch that is run forward and backward, whose predictions are finite.

    Whether a batch's predictions are is looked at when the next batch comes, or by :meth:`settle`,
    so that a GPU need not be waited for in between. Until then sums may hold what is not finite.
    """

    def __init__(self, regression: NoisedRegression, options: KFACOptions):
        self._regression = regression
        self._options = options
        self._open: tuple[NoisedBatch, Tensor, DeviceFlag] | None = None

    def __call__(self, batch: NoisedBatch, prediction_BD: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """Yield the loss vectors of a batch, each with whether more will follow."""
        self.settle()
        # a fraction of the price of looking at every entry
        finite = DeviceFlag(prediction_BD.sum().isfinite())
        self._open = batch, prediction_BD, finite
        exact = self._options.fisher_type is FisherType.TYPE2
        total = prediction_BD.shape[1] if exact else self._options.mc_samples
        found = loss_vectors(batch, prediction_BD, self._regression.draws, self._options)
        for number, v_BD in enumerate(found, start=1):
            yield v_BD, number < total

    def settle(self) -> None:
        """Look at the latest batch.

        Raises:
            ValueError: If a prediction is not finite, naming its example and level.
        """
        latest, self._open = self._open, None
        if latest is not None and not latest[2]:
            batch, prediction_BD, _ = latest
            names = map(self._regression.name_of, batch.indices)
            check_prediction(prediction_BD, names, batch.level_B)


class SharedBatches(Observer):
    """Hands what layers see to the processes that have their blocks.

    Each process runs the network on its examples of a batch, and the inner observer sees what the
    layers that this process holds see of all examples. Without holders it sees what is seen here.
    """

    def __init__(self, regression: NoisedRegression, holders: Holders | None, inner: Observer):
        self._regression = regression
        self._holders = holders
        self._inner = self._shown = inner
        self.processes = ALONE if holders is None else holders.processes
        self._whole: Sequence[int] = ()
        self._own = self._rest = 0  # examples of this process, and those that all have
        self._latest: tuple[Tensor, int, Tensor | None] | None = None

    def begin(self, new: bool) -> None:
        """Begin a batch that is new for this process, or that it has seen before."""
        self._shown = self._inner if new else Observer()

    def noised_batches(self, clean: CleanBatch) -> Iterator[NoisedBatch]:
        """Yield every draw of the examples that this process runs the network on."""
        if self._holders is not None:
            own, rest = in_equal_parts(list(range(len(clean.indices))), self.processes)
            self._whole, self._own, self._rest = clean.indices, len(own), len(rest)
            # what is left all run, so that all run the network equally often
            clean = clean.select([*own, *rest])
        yield from self._regression.noised_batches(clean)

    def start(self, batch: NoisedBatch) -> None:
        """A batch begins; its examples are those of all processes."""
        self._shown.start(batch if self._holders is None else replace(batch, indices=self._whole))

    def input(self, layer: Layer, x: Tensor) -> None:
        """Hand on the input of a layer."""
        seen = self._gathered(layer, x)
        if seen is not None:
            self._shown.input(layer, seen)

    def predicted(self, batch: NoisedBatch, prediction_BD: Tensor) -> None:
        """The forward pass is over."""
        self._latest = None  # or the last input would stay alive
        self._shown.predicted(batch, prediction_BD)

    def gradient(self, layer: Layer, call: int, g: Tensor, calls: int) -> None:
        """Hand on the gradient in the output of a layer."""
        seen = self._gathered(layer, g)
        if seen is not None:
            self._shown.gradient(layer, call, seen, calls)

    def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
        """A backward pass is over."""
        self._latest = None
        self._shown.pulled_back(batch, v_BD)

    def finish(self) -> None:
        """The batch is over."""
        self._latest = None
        self._shown.finish()

    def _gathered(self, layer: Layer, z: Tensor) -> Tensor | None:
        """Gather all examples' inputs or gradients on the process that holds the layer."""
        if self._holders is None:
            return z
        holder = self._holders.of_layer.get(layer.name)
        if holder is None:
            return None
        # layers that share an input share what is computed from it
        if self._latest is None or self._latest[0] is not z or self._latest[1] != holder:
            here = self.processes.rank == holder
            # an example may have several entries in a row
            rows = self._own * (len(z) // (self._own + self._rest))
            own, rest = z[:rows].contiguous(), z[rows:]
            whole = rest if here else None
            if rows > 0:
                parts = [torch.empty_like(own) for _ in range(here * self.processes.count)]
                with lost_processes_named():
                    dist.gather(own, parts or None, dst=holder)
                whole = torch.cat([*parts, rest]) if here else None
            self._latest = (z, holder, whole)
        return self._latest[2]


def run_observed(
    name: str,
    regression: NoisedRegression,
    plan: BlockPlan,
    passes: PassOptions,
    layers: Sequence[Layer],
    observer: Observer,
    running: Running,
) -> None:
    """Run every draw and loss vector, and show an observer what layers see.

    It sees all examples of a batch, whichever process runs the network on them, and adds to what is
    ``running``.

    Raises:
        ValueError: If a prediction is not finite, a checkpoint is of something else, or the network
            is found not to be what was tried out.
    """
    options = plan.options
    if options.rounds_products(regression.device):
        observer = Observers([observer], matmuls_in_tf32)
    shared = SharedBatches(regression, plan.holders, observer)
    vectors, retried = CheckedLossVectors(regression, options), Retrial(regression, layers)
    with observed(regression.objective, layers, shared) as network:

        def step(clean: CleanBatch) -> None:
            for batch in shared.noised_batches(clean):
                network.run(batch, vectors)
            vectors.settle()
            retried(clean)

        run_pass(
            name,
            regression,
            running,
            step,
            passes,
            plan.settings,
            together=shared.processes,
            on_batch=shared.begin,
        )


class _Reduced(WholeLayers):
    """Hands layers of Kronecker form on; a class made in a pass would be a cycle that holds it."""

    def __init__(self, plan: BlockPlan, consume: Consume, dtype: torch.dtype):
        super().__init__(dtype)
        self._plan = plan
        self._reduce = consume

    def whole(self, layer: Layer, xs: list[Tensor], gs: list[Tensor], N: int) -> None:
        """Reduce what a layer saw."""
        if layer.name in self._plan.by_layer:
            self._reduce(layer, xs, gs, N)


def run_on_gradients(
    name: str,
    regression: NoisedRegression,
    plan: BlockPlan,
    passes: PassOptions,
    consume: Consume,
    sums: Sums,
) -> None:
    """Run every draw and loss vector, and reduce what the layers of Kronecker form saw to sums."""
    layers = plan.beside or [own[0].layer for own in plan.by_layer.values()]
    if plan.holders is not None:
        # of exact blocks no gradients of single examples are wanted
        factored = {layer.name for layer in layers if not isinstance(layer.kind, ExactKind)}
        of_layer = {k: r for k, r in plan.holders.of_layer.items() if k in factored}
        plan = replace(plan, holders=replace(plan.holders, of_layer=of_layer))
    observer = _Reduced(plan, consume, regression.objective.working_dtype)
    run_observed(name, regression, plan, passes, layers, observer, sums)
