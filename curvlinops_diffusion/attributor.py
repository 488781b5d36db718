"""The door: which training images made a diffusion model generate this?

Legend: Q queries, N training images.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, Self

from torch import distributed

from curvlinops_diffusion.attribution import Attribution
from curvlinops_diffusion.curvature.ekfac import DiffusionEKFACLinearOperator
from curvlinops_diffusion.curvature.kfac import DiffusionKFACLinearOperator
from curvlinops_diffusion.curvature.load import (
    check_same_objective,
    is_of_same_images,
    load_operator,
)
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.agreement import Agreement, plain_numbers
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.methods import Method, check_measurement, scores_of
from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
from curvlinops_diffusion.linalg.parameters import Parameters
from curvlinops_diffusion.page.gallery import Gallery, RegressionGallery
from curvlinops_diffusion.runtime.checks import check_option
from curvlinops_diffusion.runtime.passes import PassOptions, computed_once

OPERATORS = {"ekfac": DiffusionEKFACLinearOperator, "kfac": DiffusionKFACLinearOperator}


class Attributor:
    """Attribution of what a diffusion model generates to its training images.

    :meth:`fit` computes the curvature of the training loss, :meth:`score` the influence of every
    training image on every query. Below it stand the operators: :attr:`operator`,
    :attr:`regression`, :meth:`gradients`.

    On several processes (of ``torchrun``, in a process group that is initialised) the work is
    divided; each then has the whole result.

    Source: Mlodozeniec et al., 2025.

    Args:
        objective: The denoising objective that the network was trained with.
        data: The training images, in any form of :class:`~curvlinops_diffusion.NoisedRegression`.
        params: The parameters that curvature and gradients are of: ``None`` for all; or their
            names, or the parameters themselves.
        seed: Of the draws of timestep and noise; queries have the next one.
        batch_size: Images that the network sees at once; ``"auto"`` for as many as fit into half of
            the free memory.
        checkpoint: A folder in which long work writes down how far it has come, and from which it
            goes on when it is started again; ``None`` for none. Delete it when all is done.
        progressbar: Whether to show progress; ``None`` for at a terminal.
        recipe: How training differed from the plain loss: ``timesteps``, ``augment``,
            ``augmented_conditions``, ``noise_offset``, ``input_perturbation``, ``example_weights``
            and ``loss_mask`` of :class:`~curvlinops_diffusion.NoisedRegression`.

    Attributes:
        objective: The objective.
        regression: The training images as a (model, loss, data) triple, one draw of each.

    Raises:
        ValueError: If data or recipe are of no accepted kind.

    Examples:
        >>> attributor = Attributor(objective, images).fit(num_draws=2)
        >>> result = attributor.score(images[:2] / 2, num_draws=4, damping=1e-3)
        >>> result.scores.shape, len(result.top(3)[0])
        (torch.Size([2, 10]), 3)
    """

    def __init__(
        self,
        objective: DenoisingObjective,
        data: Any,
        params: Parameters = None,
        *,
        seed: int = 0,
        batch_size: int | str = 32,
        checkpoint: str | PathLike[str] | None = None,
        progressbar: bool | None = None,
        **recipe: Any,
    ):
        self.objective = objective
        self._params = params
        self._recipe = {"batch_size": batch_size, **recipe}
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._progressbar = sys.stderr.isatty() if progressbar is None else progressbar
        self._operator: BlockDiagonalLinearOperator | None = None
        self._open: Any = None  # opens queries as the training images were
        self._told: dict[str, Any] = {}
        self.regression = NoisedRegression(objective, data, 1, seed, **self._recipe)
        self._train: Gallery = (
            data if hasattr(data, "caption") else RegressionGallery(self.regression)
        )

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        images: Any,
        *,
        prompts: str | Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        params: Sequence[str] | None = None,
        resolution: int | None = None,
        weighting: Any = None,
        reduction: str = "mean",
        condition_dropout: float = 0.0,
        training_arguments: Mapping[str, Any] | None = None,
        latent_cache: str | PathLike[str] | None = None,
        autocast: Any = None,
        **options: Any,
    ) -> Attributor:
        """The attributor of a ``diffusers`` pipeline and the images that it was trained on.

        A pipeline with adapters loaded (``load_lora_weights``) is attributed by their parameters
        alone.

        Args:
            pipeline: The pipeline; or several checkpoints of one training, pipelines or functions
                that load them, whose scores are averaged
                (:class:`~curvlinops_diffusion.checkpoints.CheckpointAttributor`).
            images: The training images: a folder, paths, PIL images, a tensor ``[N, C, H, W]`` in
                [-1, 1], or a data set.
            prompts: A prompt for each image, or one for all that have none of their own.
            labels: A class for each image, in the order of ``images``.
            params: Names or patterns (``'*attn*'``) of the parameters to cover; ``None`` for those
                of adapters if there are any, else of a ControlNet, else all.
            resolution: The side that images are resized to (the shorter one, then cut to a square
                from the middle); ``None`` to take them as they are.
            weighting: The loss' weighting of noise levels, as that of
                :class:`~curvlinops_diffusion.DenoisingObjective`.
            reduction: ``'mean'`` or ``'sum'`` of squared errors over an image's entries.
            condition_dropout: The probability with which training dropped the prompt or label.
            training_arguments: What else training gave the network, as for
                :meth:`~curvlinops_diffusion.DenoisingObjective.from_pipeline`.
            latent_cache: A folder to keep latents and embeddings in, to compute them once.
            autocast: The precision of the network's passes, if it is lower.
            options: ``seed``, ``batch_size``, ``checkpoint``, ``progressbar`` and the recipe of
                :class:`Attributor`.

        Raises:
            ValueError: If the pipeline is of no known kind, or images, prompts and labels do not
                fit together or are not what it takes.
        """
        if isinstance(pipeline, list | tuple):
            from curvlinops_diffusion.checkpoints import CheckpointAttributor

            # of each the same: all other arguments
            told = {k: v for k, v in locals().items() if k in _OF_PIPELINE}
            return CheckpointAttributor(pipeline, images, **told, **options)
        try:
            from curvlinops_diffusion.loading.given import given_images
            from curvlinops_diffusion.loading.network import Network
        except ImportError as error:
            raise ValueError(
                f"Reading images needs {error.name}: pip install 'curvlinops-diffusion[cli]'."
            ) from error
        network = Network.of_pipeline(
            pipeline,
            params,
            weighting=weighting,
            reduction=reduction,
            condition_dropout=condition_dropout,
            training_arguments=training_arguments,
            latent_cache=latent_cache,
            autocast=autocast,
        )
        form, condition = network.form(resolution), network.condition
        train = given_images(images, form, condition, prompts=prompts, labels=labels)
        beside = list(condition.images) or None  # mirrored with the image
        found = cls(
            network.objective, train, network.params, augmented_conditions=beside, **options
        )

        def opened(queries: Any, **beside: Any) -> Any:
            if _is_same_folder(queries, images):
                raise ValueError(
                    f"'{queries}' holds the training images. Pass the images to explain; for the "
                    "influence of training images on themselves, self_influence_scores."
                )
            return given_images(queries, form, condition, train, **beside)

        found._open = opened
        found._told = {
            "form": {"channels": network.channels, "resolution": resolution},
            "condition": asdict(condition),
        }
        return found

    # -----------------------------------------------------------------------------------------

    @property
    def operator(self) -> BlockDiagonalLinearOperator:
        """The curvature, an operator of ``curvlinops`` on the parameters.

        Raises:
            ValueError: If it was neither fitted nor loaded.
        """
        if self._operator is None:
            raise ValueError("There is no curvature yet. Call fit() first, or Attributor.load.")
        return self._operator

    @operator.setter
    def operator(self, operator: BlockDiagonalLinearOperator) -> None:
        self._operator = operator

    def gradients(
        self, queries: Any = None, *, num_draws: int = 64, measurement: Any = "loss", **beside: Any
    ) -> ExampleGradientLinearOperator:
        """Gradients of the training images, or of queries, as an operator ``[N, P]``.

        Args:
            queries: The queries, as for :meth:`score`; ``None`` for the training images.
            num_draws: Draws of timestep and noise for each.
            measurement: What is measured.
            beside: ``prompts`` and ``labels`` of queries.
        """
        if queries is not None:
            return self._gradients_of(self._opened(queries, **beside), num_draws, measurement)
        regression = _drawn(self.regression, num_draws)
        return ExampleGradientLinearOperator(regression, self._covered, measurement=measurement)

    def _gradients_of(
        self, data: Any, num_draws: int, measurement: Any
    ) -> ExampleGradientLinearOperator:
        """Gradients of queries that are open."""
        own = {k: v for k, v in self._recipe.items() if k not in _OF_TRAINING}
        seed = self.regression.draws.seed + 1
        regression = _drawn(NoisedRegression(self.objective, data, 1, seed, **own), num_draws)
        return ExampleGradientLinearOperator(regression, self._covered, measurement=measurement)

    @property
    def _covered(self) -> Parameters:
        return self._params if self._operator is None else self._operator.param_names

    # -----------------------------------------------------------------------------------------

    def fit(self, curvature: str = "ekfac", *, num_draws: int = 8, **options: Any) -> Self:
        """Fit the curvature of the training loss to the training images.

        Args:
            curvature: ``'ekfac'`` or ``'kfac'``.
            num_draws: Draws of timestep and noise for each image.
            options: Of :class:`~curvlinops_diffusion.DiffusionKFACLinearOperator`.

        Returns:
            The attributor itself.

        Raises:
            ValueError: As :class:`~curvlinops_diffusion.DiffusionKFACLinearOperator`.
        """
        if curvature not in OPERATORS:
            raise ValueError(f"`curvature` must be one of {list(OPERATORS)}, got {curvature!r}.")
        passes = options.pop("passes", self._passes("fit"))
        regression = self.regression.with_draws(num_draws, antithetic=False)
        make = OPERATORS[curvature]
        self._operator = make(regression, self._params, passes=passes, **options)
        return self

    def save(self, path: str | PathLike[str]) -> None:
        """Save the curvature to a safetensors file, see :meth:`load`.

        Raises:
            ValueError: If there is none, or the file cannot be written.
        """
        self.operator.save(path)

    @classmethod
    def load(
        cls, path: str | PathLike[str], source: Any, images: Any, **options: Any
    ) -> Attributor:
        """The attributor with a saved curvature.

        Args:
            path: The file that :meth:`save` wrote.
            source: The pipeline, or the objective.
            images: The training images.
            options: Of :meth:`from_pipeline`, or of :class:`Attributor`.

        Raises:
            ValueError: If the file is of another network, other images, another objective or
                another version; the message says which.
        """
        if isinstance(source, list | tuple):
            from curvlinops_diffusion.checkpoints import CheckpointAttributor

            return CheckpointAttributor.load(path, source, images, **options)
        make = cls if isinstance(source, DenoisingObjective) else cls.from_pipeline
        return make(source, images, **options).with_saved(path)

    def with_saved(self, path: str | PathLike[str]) -> Self:
        """Take the curvature of a file that :meth:`save` wrote.

        Raises:
            ValueError: As :meth:`load`.
        """
        operator = load_operator(path, self.objective.model)
        advice = "Pass the pipeline that it was fitted with, and the same recipe of training."
        check_same_objective(path, operator.info, self.regression, advice)
        if not is_of_same_images(operator.info, self.regression):
            raise ValueError(
                f"'{path}' was fitted to other images than those given. Pass the same, or fit anew."
            )
        self._operator = operator
        return self

    def score(
        self,
        queries: Any,
        *,
        prompts: str | Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        method: str | Iterable[str] = "influence",
        measurement: str = "loss",
        damping: float = 1e-8,
        relative: bool = False,
        rtol: float | None = None,
        ridge: float = 5.0,
        num_draws: int = 64,
        query_draws: int | None = None,
        query_block: int = 64,
    ) -> Attribution:
        """Score every training image for every query.

        Draws of an even number come in antithetic pairs; of multiples of four, two halves tell how
        sure the scores are.

        Args:
            queries: The images to explain, in the same forms as the training images.
            prompts: Their prompts, one for each or one for all.
            labels: Their classes.
            method: ``'influence'`` or ``'regression'``, or several of them, from one pass over the
                training images.
            measurement: What is measured at the queries.
            damping: What is added to the curvature's eigenvalues before it is inverted.
            relative: Take the damping in units of each block's mean eigenvalue.
            rtol: Leave out eigenvalues of at most this part of the largest.
            ridge: That of ``'regression'``, in units of the kernel's mean diagonal entry.
            num_draws: Draws of timestep and noise for each training image.
            query_draws: Those for each query; ``None`` for as many.
            query_block: Queries whose gradients are held at once.

        Raises:
            ValueError: If there is no curvature, or the queries are not what the network takes.
        """
        operator = self.operator
        chosen = [method] if isinstance(method, str) else list(method)
        methods = [check_option("method", name, Method) for name in chosen]
        check_measurement(methods, measurement)
        asked_of = self._opened(queries, prompts=prompts, labels=labels)
        J_train = self.gradients(num_draws=num_draws)
        J_query = self._gradients_of(
            asked_of, num_draws if query_draws is None else query_draws, measurement
        )
        inversion: dict[str, Any] = {"damping": damping}
        inversion |= {"relative": True} if relative else {}
        inversion |= {} if rtol is None else {"rtol": rtol}
        passes, query = self._passes("score"), J_query.regression
        values_Q = computed_once(
            *("Values", query, lambda: {"values": J_query.values()}),
            *(passes, {"measurement": measurement}),
        )["values"]
        found = scores_of(
            methods,
            J_query,
            operator.inverse(**inversion),
            J_train,
            ridge=ridge,
            query_block=query_block,
            passes=passes,
        )
        halves = found[methods[0]][1]
        asked = {"measurement": measurement, **inversion}
        if methods[0] is Method.REGRESSION:
            asked |= {"method": methods[0].value, "ridge": ridge}
        shown: Gallery = asked_of if hasattr(asked_of, "caption") else RegressionGallery(query)
        header: dict[str, Any] = {
            "train": list(self._train.names),
            "queries": list(shown.names),
            "identity": {
                "train": J_train.regression.identity({}),
                "query": query.identity(asked),
                "operator": json.loads(json.dumps(operator.info)),
            },
            "values": plain_numbers(values_Q),
            "methods": [each.value for each in methods],
            **self._told,
        }
        if halves is not None:
            header |= Agreement.of_halves(halves.first, halves.second).as_header()
        return Attribution(
            {each.value: scores for each, (scores, _) in found.items()},
            {each.value: own for each, (_, own) in found.items()},
            header,
            self._train,
            shown,
        )

    # -----------------------------------------------------------------------------------------

    def _opened(
        self,
        queries: Any,
        prompts: str | Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
    ) -> Any:
        if self._open is not None:
            return self._open(queries, prompts=prompts, labels=labels)
        if prompts is not None or labels is not None:
            raise ValueError(
                "`prompts` and `labels` are for an attributor of a pipeline. Pass queries in the "
                "form of the training data, with their conditions."
            )
        return queries

    def _passes(self, what: str) -> PassOptions:
        return PassOptions(
            None if self._checkpoint is None else self._checkpoint / what,
            distributed=distributed.is_available() and distributed.is_initialized(),
            progressbar=self._progressbar,
        )


# what from_pipeline is told beside pipeline and images
_OF_PIPELINE = frozenset(Attributor.from_pipeline.__func__.__kwdefaults__)  # type: ignore[attr-defined]
# of a recipe's parts, those that are of the training images alone: a query is what it is
_OF_TRAINING = ("augment", "augmented_conditions", "example_weights")


def _drawn(regression: NoisedRegression, num_draws: int) -> NoisedRegression:
    """The problem with so many draws, in antithetic pairs where their number is even."""
    return regression.with_draws(num_draws, antithetic=num_draws % 2 == 0)


def _is_same_folder(one: Any, other: Any) -> bool:
    both = [Path(path) for path in (one, other) if isinstance(path, str | PathLike)]
    return len(both) == 2 and both[0].resolve() == both[1].resolve()
