"""``NoisedRegression``: objective + data + draws, as the (model, loss, data) of any operator."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.batch import CleanBatch, NoisedBatch
from curvlinops_diffusion.diffusion.batch_sizes import MEASURED, largest_batch_size
from curvlinops_diffusion.diffusion.checks import (
    check_deterministic_mode,
    check_modes,
    check_surroundings,
    warn_of_range,
)
from curvlinops_diffusion.diffusion.data import CleanData
from curvlinops_diffusion.diffusion.data_forms import Wanted, batched
from curvlinops_diffusion.diffusion.draws import Draws, make_draws
from curvlinops_diffusion.diffusion.first_call import run_once
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.recipe import Recipe
from curvlinops_diffusion.diffusion.scaled_model import ScaledModel, scaled
from curvlinops_diffusion.diffusion.versions import Augmentations, Captions, SeenByDraws
from curvlinops_diffusion.runtime.devices import to_like
from curvlinops_diffusion.runtime.digests import digest_of, fingerprint
from curvlinops_diffusion.runtime.passes import DrawsBar
from curvlinops_diffusion.runtime.sharded_networks import is_sharded

#: The options that are of training images alone: a query is what it is, with its own caption.
OF_TRAINING = {
    *("augment", "augmented_conditions", "example_weights"),
    *("random_crop", "shuffle_captions", "keep_tokens", "tag_dropout"),
}


def check_regression(value: Any) -> None:
    """Check what an operator is made of."""
    if not isinstance(value, NoisedRegression):
        raise ValueError(
            "An operator must be made of a NoisedRegression(DenoisingObjective(model, scheduler), "
            f"data), got {type(value).__name__}."
        )
    check_surroundings(value.device)
    check_modes()


class NoisedRegression:
    r"""A diffusion objective on data, as a regression problem with fixed draws.

    Every example is drawn ``R`` times, ``(t, eps)`` being a pure function of ``(seed, n, r)``. The
    problem is::

        L(θ) = 1/N Σ_n 1/R Σ_r w_t r_D ‖f_θ(x_t, t, c) − y_t‖²

    (with a factor for each example, if ``example_weights`` are given, and of each entry, if there
    is a ``loss_mask``). Iterating yields ``(X, y)`` with ``√(w_t r_D D)`` folded into both sides,
    so that with :attr:`model_func` and :attr:`loss_func` (the mean squared error) *any*
    ``curvlinops`` operator works on it::

        curvlinops.GGNLinearOperator(
            regression.model_func, regression.loss_func, params, regression,
            batch_size_fn=regression.batch_size_fn,
        )

    Args:
        objective: The denoising objective.
        data: Clean examples: a tensor ``[N, ...]``; a ``Dataset``; a ``DataLoader`` or a list of
            batches (or of single examples, if the network takes them as no batches). If it has an
            attribute ``names``, messages name examples by it; if a ``Dataset`` has ``shapes``, a
            list with a tuple for each item, batches are of one shape each (aspect buckets), and
            results in the order of the items. Items and batches are tensors, pairs
            of these and integer labels or prompts (``'class_labels'``, ``'prompt'``), or dicts with
            key ``'x0'`` whose other entries are passed to the model as keyword arguments
            (``class_labels``, ``encoder_hidden_states``, nested ``added_cond_kwargs``, …); a dict
            of whole tensors is accepted too. It may live on another device than the model.
        num_draws: The number ``R`` of draws for each example. Default: 8, or the length of a list
            of timesteps.
        seed: Seed of the draws.
        timesteps: ``'stratified'`` (over draws and examples), ``'uniform'``, ``'logit-normal'``,
            ``'all'`` (every level once), a list of levels (``0 .. T-1`` in order of rising
            noise), or a scheme such as
            :class:`~curvlinops_diffusion.timesteps.LogitNormalTimesteps`. Of names, with numbers:
            ``'logit-normal:MEAN:STD'``, and of levels from one to before another
            ``'stratified:LOW:END'``.
        batch_size: Examples that the network sees at once, where the data is not in batches.
            ``"auto"`` for the most, a power of two up to 1,024, whose forward and backward pass
            takes half of the memory that is free now (:attr:`batch_size` says how many; where a
            checkpoint is to be continued, pass that). In a process group all processes must ask.
        augment: ``'flip'`` if training saw images or their mirror images at random: each draw
            chooses. Or a list of functions of clean examples ``[B, ...]`` to choose from. The
            loss' mask is transformed likewise.
        augmented_conditions: Names of entries of the condition that are transformed with the
            examples (a control image, say; with a slash between names of nested entries). Needed
            where examples are augmented and an entry looks like an image; ``[]`` for none.
        random_crop: Whether training cut images out at random places: each draw has one of its own,
            for images of files that are resized. Images are read and encoded for each draw then.
        shuffle_captions: Whether training put the tags of captions, which commas separate, into
            random order: each draw has one of its own, and texts are embedded for each draw.
        keep_tokens: Tags at the beginning of captions that are neither moved nor left out; or for
            each example a number, a pair for beginning and end, or ``None`` for the whole caption.
        tag_dropout: The probability with which training left out each other tag.
        antithetic: Whether draws come in pairs that differ in the sign of the noise alone
            (Hammersley & Morton, 1956). Averages stay unbiased. Those of a trained network's
            gradients vary less, as these are nearly linear in the noise where they are largest,
            at little noise; those of curvature vary more, as it is nearly even in the noise.
        draws: The draws themselves, in place of what they are made of above.
        noise_offset: The strength ``s`` of training's offset noise: ``eps + s o`` in place of
            ``eps``, with ``o ~ N(0, 1)`` one number for each channel of a draw: for each entry of
            the first axis of an example, or of its latents before they are packed into tokens.
        input_perturbation: The strength ``γ`` of training's input perturbation: the input is noised
            with ``eps + γ eps'``, and the target is that of ``eps`` (Ning et al., 2023,
            Algorithm 1).
        example_weights: A factor ``≥ 0`` of each example's loss, ``[N]`` (prior preservation, say).
        loss_mask: The name of the data's entry with a factor ``m ≥ 0`` of each pixel's squared
            error, ``[B, H, W]`` or ``[B, C or 1, H, W]`` (masked training); averaged over the
            pixels of a latent where there is an autoencoder. ``r`` stays ``1/D`` of all entries.

    Attributes:
        objective: The denoising objective.
        draws: The draws.
        recipe: Offset noise, perturbed inputs, weights of examples.
        model_func: Maps ``X`` to the scaled prediction, shape ``[B, D]``. Runs attention and some
            other functions in plain forms, which forward-mode and second derivatives need.
        loss_func: The mean squared error.

    Raises:
        ValueError: If the data is empty or malformed, changes between iterations, or an argument
            is of no accepted kind.

    Examples:
        >>> regression = NoisedRegression(objective, images, num_draws=4, timesteps="uniform")
        >>> regression.num_data, regression.num_draws, regression.num_samples
        (10, 4, 40)
        >>> X, y = next(iter(regression))  # for any operator of curvlinops
        >>> regression.model_func(X).shape == y.shape
        True
    """

    def __init__(
        self,
        objective: DenoisingObjective,
        data: Any,
        num_draws: int | None = None,
        seed: int = 0,
        *,
        timesteps: Any = "stratified",
        batch_size: int | Literal["auto"] = 64,
        augment: Any = None,
        augmented_conditions: Sequence[str] | None = None,
        random_crop: bool = False,
        shuffle_captions: bool = False,
        keep_tokens: int | Sequence[Any] = 0,
        tag_dropout: float = 0.0,
        antithetic: bool = False,
        draws: Draws | None = None,
        noise_offset: float = 0.0,
        input_perturbation: float = 0.0,
        example_weights: Any = None,
        loss_mask: str | None = None,
    ):
        if not isinstance(objective, DenoisingObjective):
            raise ValueError(
                f"`objective` must be a DenoisingObjective, got {type(objective).__name__}."
            )
        check_modes()
        self.objective = objective
        T = objective.process.num_levels
        made = make_draws(timesteps, num_draws, seed, T, antithetic) if draws is None else draws
        self.draws = made

        def clean_data(size: int) -> CleanData:
            return CleanData(data, size, loss_mask, partial(run_once, objective))

        self._data = clean_data(MEASURED[0] if batch_size == "auto" else batch_size)
        self._augmentations = Augmentations.of(augment, augmented_conditions)
        self._captions = Captions.of(
            shuffle_captions, keep_tokens, tag_dropout, self._data.num_examples
        )
        if random_crop and not hasattr(data, "cropped"):
            raise ValueError(
                "`random_crop` needs images that each draw cuts another part out of, got "
                f"{type(data).__name__}. Pass a folder, paths or PIL images to "
                "Attributor.from_pipeline, or a Dataset with a method cropped(n, place, mirrored)."
            )
        self._cropped = data if random_crop else None
        self.recipe = Recipe.of(
            noise_offset, input_perturbation, example_weights, loss_mask, self._data.num_examples
        )
        # what probes of the network found, by what it depends on; shared with copies of other draws
        self.findings: dict[tuple[Hashable, ...], Any] = {}
        names = getattr(data, "names", None)  # a tensor's are those of its axes
        self._names: list[str] | None = names if isinstance(names, list) else None
        if batch_size == "auto":
            self._data = clean_data(self._largest_batch_size())
        self._data_identity = self._data.identity
        self.model_func = ScaledModel(objective, self._data)
        self.loss_func = nn.MSELoss()

    def _largest_batch_size(self) -> int:
        if self._data.batch_size is None:
            raise ValueError(
                "`batch_size` must be left out for data that comes in batches, got 'auto'. Pass "
                "the examples (a tensor, a dict of tensors or a Dataset), or batches of the size "
                "that you want."
            )
        clean = next(self.clean_batches())

        def batch_of(count: int) -> NoisedBatch:
            positions = [n % len(clean.indices) for n in range(count)]
            return next(self.noised_batches(clean.select(positions)))

        return largest_batch_size(self.objective, batch_of)

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return self.objective.device

    @property
    def encodes(self) -> bool:
        """True if something is between the data and the network."""
        return self.objective.encodes

    @property
    def num_data(self) -> int:
        """The number ``N`` of examples."""
        return self._data.num_examples

    @property
    def batch_size(self) -> int | None:
        """Samples that the network sees at once; ``None`` where the data comes in batches."""
        return self._data.batch_size

    @property
    def in_step(self) -> bool:
        """True if all processes must run the network equally often, as each holds a part of it."""
        return is_sharded(self.objective.model)

    @property
    def num_batches(self) -> int | None:
        """The number of batches of examples; ``None`` if only a pass over them would tell."""
        return self._data.num_batches

    @property
    def num_draws(self) -> int:
        """The number ``R`` of draws for each example."""
        return self.draws.num_draws

    @property
    def num_samples(self) -> int:
        """The number ``N R`` of terms in the loss; averages divide by it."""
        return self.num_data * self.num_draws

    @property
    def names(self) -> list[str]:
        """The examples' names; their numbers where the data has none."""
        return [f"{n}" for n in range(self.num_data)] if self._names is None else self._names

    def name_of(self, n: int) -> str:
        """Name example ``n`` in messages: by its number, and its name if it has one."""
        return f"{n}" if self._names is None else f"{n} ('{self._names[n]}')"

    def with_draws(self, num_draws: int, *, antithetic: bool | None = None) -> NoisedRegression:
        """This problem with another number of draws for each example, perhaps in pairs."""
        pairs = self.draws.antithetic if antithetic is None else antithetic
        if (num_draws, pairs) == (self.num_draws, self.draws.antithetic):
            return self
        return self._redrawn(num_draws, self.draws.seed, pairs)

    def with_seed(self, seed: int) -> NoisedRegression:
        """This problem with other draws, as many for each example."""
        return self._redrawn(self.num_draws, seed, self.draws.antithetic)

    def single_draws(self, least: int) -> list[NoisedRegression]:
        """Problems with one draw of each example, or of each listed timestep, by itself.

        Args:
            least: The number of draws of all examples that they have together, at least.
        """
        own = replace(self.draws, antithetic=False, part=(0, 1))
        one = own.rounded_up(1)
        count = -(-least // (one * self.num_data))
        whole = replace(own, num_draws=count * one)
        return [self._with(whole.divided(number, count)) for number in range(count)]

    def divided(self, number: int, count: int) -> NoisedRegression:
        """This problem with one of ``count`` parts of the draws of each example."""
        return self._with(self.draws.divided(number, count))

    @property
    def undivided(self) -> NoisedRegression:
        """This problem with all draws of which its own are a part."""
        return self._with(self.draws.whole)

    def _redrawn(self, num_draws: int, seed: int, antithetic: bool) -> NoisedRegression:
        own = self.draws
        made = make_draws(own.timesteps, num_draws, seed, own.num_levels, antithetic)
        return self._with(replace(made, part=own.part))

    def _with(self, draws: Draws) -> NoisedRegression:
        other = copy(self)
        other.draws = draws
        return other

    def fingerprint(self) -> dict[str, str]:
        """Digests of the network's structure and weights."""
        return fingerprint(self.objective.model)

    def identity(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Weights, data, draws and settings: what files of another result differ in."""
        own = {
            "model": self.fingerprint(),
            "data": self.data_identity(),
            "regression": self.description,
            **settings,
        }
        plain: dict[str, Any] = json.loads(json.dumps(own))  # as it comes back from a file
        return plain

    def data_identity(self) -> dict[str, Any]:
        """A digest of the examples with their conditions, and the batches that they come in.

        From the first iteration over all of the data, or one of its own if there was none.
        """
        if not self._data_identity:
            for _ in self._data.numbered(identify=True):
                pass
        identity = dict(self._data_identity)
        if self._cropped is not None:  # what lies outside of the middle is seen as well
            sources: list[str] = getattr(self._cropped, "source_digests", list)()
            identity["digest"] = digest_of(identity["digest"], *sources)
        return identity

    @property
    def description(self) -> dict[str, Any]:
        """Describe what determines the draws and the loss, for the header of a saved operator."""
        return {
            "num_data": self.num_data,
            "num_draws": self.num_draws,
            "seed": self.draws.seed,
            "timesteps": repr(self.draws.timesteps),
            "antithetic": self.draws.antithetic,
            "num_levels": self.draws.num_levels,
            **({} if self.draws.part == (0, 1) else {"part": list(self.draws.part)}),
            **self._augmentations.description,
            **({} if self._captions is None else self._captions.description),
            **({} if self._cropped is None else {"random_crop": True}),
            **self.recipe.description,
            **self.objective.description,
        }

    def clean_batches(self) -> Iterator[CleanBatch]:
        """Yield the clean examples in batches."""
        for _, clean in self.numbered_batches():
            yield clean

    def numbered_batches(
        self, wanted: Wanted = lambda number: True
    ) -> Iterator[tuple[int, CleanBatch]]:
        """Yield the wanted batches with their numbers; others are not loaded, where possible."""
        check_deterministic_mode(self.objective.model)
        check_surroundings(self.objective.device)
        yield from self._data.numbered(wanted)

    def noised_batches(self, clean: CleanBatch) -> Iterator[NoisedBatch]:
        """Yield every draw of a batch of clean examples."""
        indices, draws = clean.indices, self.draws
        if self.objective.takes_images and ("range",) not in self.findings:
            self.findings["range",] = None
            warn_of_range(clean.x0)
        cut = None if self._cropped is None else self._cut
        seen = SeenByDraws(self.objective, draws, clean, self._augmentations, self._captions, cut)
        first, _ = seen(0)
        dropout = self.objective.condition_dropout
        packing = self.objective.packing(clean) if self.recipe.noise_offset > 0 else None
        shape, of_latents = first.mean.shape[1:], first.std is not None

        made = self.recipe.noises(draws, indices, shape, of_latents, packing, self.device)
        for r, (eps, input_eps, latent) in enumerate(made):
            encoded, mask = seen(r)
            x0, condition = encoded.mean, encoded.condition
            if encoded.std is not None:
                assert latent is not None
                x0 = x0 + encoded.std * to_like(latent, x0)
            if dropout > 0:
                dropped_B = draws.dropped(indices, r, dropout)
                condition = self.objective.drop_condition(condition, dropped_B)
            level_B = draws.levels(indices, r)
            batch = self.objective.noise(x0, condition, level_B, eps, indices, r, input_eps, mask)
            yield replace(batch, weight_B=self.recipe.weighted(batch.weight_B, indices))
            DrawsBar.draw_done(len(indices))

    def _cut(
        self,
        indices: Sequence[int],
        places: Sequence[tuple[float, float]],
        mirrored: Sequence[bool],
    ) -> CleanBatch:
        """Examples cut out at other places."""
        assert self._cropped is not None
        asked = zip(indices, places, mirrored, strict=True)
        return self._data.of_items([self._cropped.cropped(*each) for each in asked], indices)

    def grouped_batches(
        self, clean: CleanBatch, examples: int, draws: int
    ) -> Iterator[tuple[range, NoisedBatch]]:
        """Yield every draw of a batch, several draws of an example in a row.

        At most so many examples and draws of each at once, after the examples' positions within the
        batch; see :meth:`~curvlinops_diffusion.NoisedBatch.interleaved`.
        """
        for some in batched(self.noised_batches(clean), draws):
            for start in range(0, len(clean.indices), examples):
                positions = range(start, min(start + examples, len(clean.indices)))
                yield positions, NoisedBatch.interleaved([b.select(positions) for b in some])

    def batches(self) -> Iterator[NoisedBatch]:
        """Yield every draw of every example; the draws of a batch follow each other."""
        for clean in self.clean_batches():
            yield from self.noised_batches(clean)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield ``(X, y)`` for ``curvlinops``: mappings of tensors, and scaled targets ``[B, D]``.

        ``X`` has ``x_t``, ``timestep``, ``scale``, and each entry of the condition under
        ``condition/`` and its name, with a slash between the names of nested entries.

        Raises:
            ValueError: If an entry of the condition changes from batch to batch and is no tensor:
                ``curvlinops`` compares batches by their tensors, and a traced network would take
                anything else for a constant.
        """
        for batch in self.batches():
            X = self.model_func.inputs(batch)
            yield X, scaled(X, batch.target_BD)

    @staticmethod
    def batch_size_fn(X: MutableMapping[str, Any]) -> int:
        """The number of (example, draw) pairs in a batch ``X``."""
        return len(X["x_t"])
