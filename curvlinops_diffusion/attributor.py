"""The door: which training images made a diffusion model generate this?

Legend: Q queries, N training images.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from torch import distributed

from curvlinops_diffusion.attribution import Attribution, needs_extra
from curvlinops_diffusion.curvature.kfac import (
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
)
from curvlinops_diffusion.curvature.load import (
    check_same_objective,
    is_of_same_images,
    load_operator,
)
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.regression import OF_TRAINING, NoisedRegression
from curvlinops_diffusion.diffusion.weightings import weighting_of
from curvlinops_diffusion.influence.agreement import MAX_DRAWS, Agreement, plain_numbers
from curvlinops_diffusion.influence.features import Embedding
from curvlinops_diffusion.influence.gap import GeneralisationGap, generalisation_gap
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.methods import Method, methods_named, scores_of
from curvlinops_diffusion.influence.more_draws import (
    Overwrite,
    check_same_run,
    is_same_run,
    score_until_told,
)
from curvlinops_diffusion.influence.regression import RIDGE
from curvlinops_diffusion.influence.scores import can_be_halved
from curvlinops_diffusion.influence.stored_scores import StoredScores
from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
from curvlinops_diffusion.linalg.operator_files import read_header
from curvlinops_diffusion.linalg.parameters import Parameters
from curvlinops_diffusion.loading.layout import Layout
from curvlinops_diffusion.loading.trainer_settings import by_data, by_hand, by_recipe
from curvlinops_diffusion.page.gallery import RegressionGallery
from curvlinops_diffusion.runtime.adapters import common_list
from curvlinops_diffusion.runtime.checkpoints import OtherCheckpointError
from curvlinops_diffusion.runtime.digests import name_of
from curvlinops_diffusion.runtime.files import check_file_name, check_space
from curvlinops_diffusion.runtime.passes import PassOptions, computed_once
from curvlinops_diffusion.runtime.processes import Processes

#: Draws of each image from which the generalisation gap is estimated.
GAP_DRAWS = 32
OPERATORS = {"ekfac": DiffusionEKFACLinearOperator, "kfac": DiffusionKFACLinearOperator}
T = TypeVar("T")
log = logging.getLogger(__name__)


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
        seed: The seed of the draws of timestep and noise; queries have the next one.
        batch_size: Images that the network sees at once; ``"auto"`` for as many as fit into half of
            the free memory.
        checkpoint: A folder in which long work writes down how far it has come, and from which it
            goes on when it is started again; ``None`` for none, or beside an ``output``. Delete it
            when all is done.
        progressbar: Whether to show progress; ``None`` for at a terminal.
        passes: Checkpoints, processes, memory and progress, in place of the two; with ``sharded``,
            each process keeps its share of the curvature and of the scores alone.
        recipe: How training differed from the plain loss: ``timesteps``, ``augment``,
            ``augmented_conditions``, ``random_crop``, ``shuffle_captions``, ``keep_tokens``,
            ``tag_dropout``, ``noise_offset``, ``input_perturbation``, ``example_weights`` and
            ``loss_mask`` of :class:`~curvlinops_diffusion.NoisedRegression`. Queries are shown as
            they are: unmirrored, cut from the middle, with their own captions.

    Attributes:
        objective: The objective.
        regression: The training images as a (model, loss, data) triple, one draw of each.
        images: The training images with names and captions.
        params: The parameters, as they were passed.
        passes: How long work is run.
        run: What decided the run, as plain values that files keep in their headers.
        settings: What was read of a trainer's recipe and of its list of the data, a line each.

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
        batch_size: int | Literal["auto"] = 32,
        checkpoint: str | PathLike[str] | None = None,
        progressbar: bool | None = None,
        passes: PassOptions | None = None,
        **recipe: Any,
    ):
        unknown = sorted(recipe.keys() - _RECIPE)
        if unknown:
            raise ValueError(
                f"`{unknown[0]}` is no option of an attributor; those of the recipe are "
                f"{', '.join(sorted(_RECIPE))}. Numbers of draws are options of fit() and score()."
            )
        self.objective = objective
        self.params = params
        self.run: dict[str, Any] = {}
        self.settings: list[str] = []
        self._recipe = {"batch_size": batch_size, **recipe}
        self.passes = passes or PassOptions(
            checkpoint,
            distributed=distributed.is_available() and distributed.is_initialized(),
            progressbar=sys.stderr.isatty() if progressbar is None else progressbar,
        )
        self._operator: BlockDiagonalLinearOperator | None = None
        self._open: Callable[..., Any] | None = None  # opens queries as the training images were
        self._forms: dict[str, Any] = {}  # how images were read, for headers of scores
        self._data = data
        self.regression = NoisedRegression(objective, data, 1, seed, **self._recipe)
        self.images = _gallery(data, self.regression)

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        images: Any,
        *,
        prompts: str | Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        caption_extension: str | None = None,
        caption_lines: Literal["first", "all"] = "first",
        caption_column: str | None = None,
        image_column: str | None = None,
        trigger_word: str | None = None,
        split: str | None = None,
        skip_unreadable: bool = False,
        params: Sequence[str] | None = None,
        resolution: int | None = None,
        buckets: bool | str | Sequence[tuple[int, int]] = False,
        bucket_step: int = 64,
        bucket_min: int = 256,
        bucket_max: int = 1024,
        bucket_no_upscale: bool = False,
        interpolation: Literal["bilinear", "bicubic", "lanczos"] | None = None,
        weighting: Any = None,
        reduction: Literal["mean", "sum"] = "mean",
        condition_dropout: float = 0.0,
        prior_loss_weight: float = 1.0,
        training_arguments: Mapping[str, Any] | None = None,
        latent_cache: str | PathLike[str] | None = None,
        autocast: Any = None,
        recipe: str | PathLike[str] | None = None,
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
                [-1, 1], or a data set. Folders may be as trainers lay them out: with
                metadata.jsonl, .csv or .parquet, captions in files beside the images, and kohya's
                ``30_shs dog``, whose repeats become ``example_weights`` and whose name is the
                prompt of images that have no caption. Or the ``dataset.toml`` of its scripts, which
                decides what of ``resolution``, ``buckets``, ``augment``, ``random_crop``,
                ``shuffle_captions``, ``tag_dropout`` and ``condition_dropout`` is not given.
            prompts: A prompt for each image; or one for all that have none of their own, queries
                included.
            labels: A class for each image, in the order of ``images``.
            caption_extension: How the names of captions beside images end; ``None`` for
                ``.caption`` or ``.txt``.
            caption_lines: What of a caption beside an image training took, ``'first'`` line or
                ``'all'`` (ai-toolkit).
            caption_column: The column of metadata or data sets that holds captions; ``None`` for
                ``text``. With ``file_name``, captions are the files' names (OneTrainer).
            image_column: The column that holds images, or names their files; ``None`` for
                ``image``, or the only one.
            trigger_word: The word in place of ``[trigger]`` in prompts, in front of those that do
                not have it (ai-toolkit); ``None`` for none.
            split: The part of a folder or a data set that was trained on; ``None`` for all there
                is.
            skip_unreadable: Leave out images that cannot be read, as training did; each is read
                once more to find them.
            params: Names or patterns (``'*attn*'``) of the parameters to cover; ``None`` for those
                of adapters if there are any, else of a ControlNet, else all.
            resolution: The pixels that the shorter side of images is resized to, before a square is
                cut from the middle; with ``buckets=True`` the side of the square whose area these
                have; ``None`` for images of the network's size.
            buckets: The aspect buckets that images are resized and cropped to: ``True`` for those
                of kohya's scripts, ``'square'`` for the one that they have without; heights and
                widths, ``[(672, 1568), …]`` or ``'672,1568;…'``, as ``--aspect_ratio_buckets`` of
                ``diffusers``' scripts, ``'auto'`` for their ``--use_aspect_ratio_buckets``;
                ``'onetrainer'`` or ``'ai-toolkit'`` for theirs. Batches are of one bucket each.
            bucket_step: What the sides of these, and of kohya's, are multiples of.
            bucket_min: The shortest side that kohya's have.
            bucket_max: The longest side that they have.
            bucket_no_upscale: Whether images smaller than their bucket get one of their own.
            interpolation: How images are resized; ``None`` for bilinear, or with ``buckets=True``
                what kohya's scripts do (means of areas, and Lanczos where images grow). Some of
                ``diffusers``' scripts have ``--image_interpolation_mode``, by default lanczos.
            weighting: The loss' weighting of noise levels, as that of
                :class:`~curvlinops_diffusion.DenoisingObjective`; ``None`` for all alike.
            reduction: ``'mean'`` or ``'sum'`` of squared errors over an image's entries.
            condition_dropout: The probability with which training dropped the prompt or label.
            prior_loss_weight: The weight of the loss of regularisation images, which a
                ``dataset.toml`` lists as ``is_reg``.
            training_arguments: What else training gave the network, by the names in ``diffusers``'
                training scripts, see
                :meth:`~curvlinops_diffusion.DenoisingObjective.from_pipeline`; ``None`` for what
                these scripts have.
            latent_cache: A folder to keep latents and embeddings in, to compute them once.
            autocast: The precision of the network's passes, if it is lower.
            recipe: The adapter's file or folder, or the config of its trainer (kohya's scripts,
                ``diffusers``', OneTrainer, ai-toolkit, SimpleTuner), of which the options are read
                that are not given by hand, each with a line in :attr:`settings`; ``None`` or
                ``'none'`` to read none.
            options: ``seed``, ``batch_size``, ``checkpoint``, ``progressbar`` and the recipe of
                :class:`Attributor`.

        Raises:
            ValueError: If the pipeline is of no known kind, or images, prompts and labels do not
                fit together or are not what it takes; if the recipe is damaged, of another kind of
                pipeline, or changes the objective in a way that no option expresses.
        """
        told = {k: v for k, v in locals().items() if k in _OF_PIPELINE}
        told, lines = _read(images, pipeline, told | options)
        if isinstance(pipeline, list | tuple):
            from curvlinops_diffusion.checkpoints import CheckpointAttributor

            found: Attributor = CheckpointAttributor(pipeline, images, **told)
        else:
            if not hasattr(pipeline, "objective"):  # else a Network, with what the others say
                of_objective = {k: told[k] for k in _OF_OBJECTIVE}
                with needs_extra("Reading images"):
                    from curvlinops_diffusion.loading.network import Network
                pipeline = Network.of_pipeline(pipeline, **of_objective)
            beside = {k: v for k, v in told.items() if k not in (*_OF_OBJECTIVE, "recipe")}
            found = cls.of_network(pipeline, images, **beside)
        found.settings = lines + found.settings
        return found

    @classmethod
    def of_network(
        cls,
        network: Any,
        images: Any,
        *,
        prompts: str | Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        prior_loss_weight: float = 1.0,
        **options: Any,
    ) -> Self:
        """The attributor of a network that is loaded, and of what it covers.

        Args:
            network: A ``Network``, which knows the form of images that it takes.
            images: As for :meth:`from_pipeline`, and so are the others.
            prompts: Likewise.
            labels: Likewise.
            prior_loss_weight: Likewise.
            options: Likewise, with how the images lie on disk (``caption_extension``, say) and are
                resized (``resolution``).

        Raises:
            ValueError: As :meth:`from_pipeline`.
        """
        with needs_extra("Reading images"):
            from curvlinops_diffusion.loading.images import open_images
        layout = Layout.taken_from(options)
        if isinstance(prompts, str):  # for queries as well
            network, prompts = network.with_prompt(prompts), None
        sizing = {name: options.pop(name) for name in _SIZING if name in options}
        form, condition = network.form(**{"resolution": None, **sizing}), network.condition
        train = open_images(images, form, condition, prompts=prompts, labels=labels, layout=layout)
        if options.get("random_crop") and form.resolution is None and not form.buckets:
            raise ValueError(
                "`random_crop` must come with a `resolution` or `buckets`, got neither: whole "
                "images have no other parts. Pass those of training."
            )
        weights = train.weights(prior_loss_weight)
        if weights is not None:
            options = {"example_weights": weights, **options}
        if train.keep_tokens is not None and not options.get("keep_tokens"):
            options["keep_tokens"] = train.keep_tokens
        beside = list(condition.images) or None  # mirrored with the image
        found = cls(
            network.objective, train, network.params, augmented_conditions=beside, **options
        )

        def opened(queries: Any, what: str, **beside: Any) -> Any:
            paths = [p for p in (queries, images) if isinstance(p, str | PathLike)]
            if len(paths) == 2 and Path(paths[0]).resolve() == Path(paths[1]).resolve():
                advice = (
                    "images like them that training has not seen"
                    if what == "held_out"
                    else "the images to explain; for the influence of training images on "
                    "themselves, self_influence_scores"
                )
                raise ValueError(f"`{what}` '{queries}' holds the training images. Pass {advice}.")
            return open_images(queries, form, condition, train, layout=layout, **beside)

        found._open = opened
        found._forms = {
            "form": form.told,
            "condition": asdict(condition),
            "layout": asdict(layout),
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
            return self._gradients_of(self.opened(queries, **beside), num_draws, measurement)
        regression = _drawn(self.regression, num_draws)
        return ExampleGradientLinearOperator(regression, self._covered, measurement=measurement)

    def _gradients_of(
        self, data: Any, num_draws: int, measurement: Any
    ) -> ExampleGradientLinearOperator:
        """Gradients of queries that are open."""
        own = {k: v for k, v in self._recipe.items() if k not in OF_TRAINING}
        seed = self.regression.draws.seed + 1
        regression = _drawn(NoisedRegression(self.objective, data, 1, seed, **own), num_draws)
        return ExampleGradientLinearOperator(regression, self._covered, measurement=measurement)

    def methods(
        self,
        method: str | Iterable[str] | None,
        measurement: str,
        num_draws: int | Literal["auto"],
        held_out: Any = None,
        embedding: Any = None,
    ) -> list[Method]:
        """The methods by which :meth:`score` would score, checked before anything is computed.

        Args:
            method: As for :meth:`score`, and so are the others.
            measurement: Likewise.
            num_draws: Likewise.
            held_out: Likewise.
            embedding: Likewise.

        Raises:
            ValueError: If there is no such method, or it is not for what is measured or drawn, or
                held-out images or an embedding are not its arguments.
        """
        some = self.regression.draws.rounded_up(2)
        found = methods_named(method, measurement, num_draws, self.gradients(num_draws=some))
        if held_out is not None and Method.REGRESSION not in found:
            raise ValueError(
                "`held_out` gives the scores of 'regression' their unit, got `method` "
                f"{', '.join(each.value for each in found)}. Add 'regression', or leave it out."
            )
        if (embedding is None) == (Method.EMBEDDING in found):
            raise ValueError(
                "`method` 'embedding' and `embedding`, a function or a folder, are given together, "
                f"got `method` {', '.join(each.value for each in found)} "
                f"{'without' if embedding is None else 'with'} an embedding."
            )
        return found

    @property
    def _covered(self) -> Parameters:
        return self.params if self._operator is None else self._operator.param_names

    # -----------------------------------------------------------------------------------------

    def fit(
        self,
        curvature: Literal["ekfac", "kfac"] = "ekfac",
        *,
        num_draws: int = 8,
        output: str | PathLike[str] | None = None,
        overwrite: bool = False,
        **options: Any,
    ) -> Self:
        """Fit the curvature of the training loss to the training images.

        Args:
            curvature: The approximation, ``'ekfac'`` or ``'kfac'``.
            num_draws: Draws of timestep and noise for each image.
            output: A file for the curvature, see :meth:`save`; if it holds this fit already it is
                read. A checkpoint stands beside it until it is written.
            overwrite: Replace an output, and a checkpoint, of other weights, data, draws or
                options.
            options: Of :class:`~curvlinops_diffusion.DiffusionKFACLinearOperator`.

        Returns:
            The attributor itself.

        Raises:
            ValueError: If the output is of another fit, or as
                :class:`~curvlinops_diffusion.DiffusionKFACLinearOperator`.
        """
        if curvature not in OPERATORS:
            raise ValueError(f"`curvature` must be one of {list(OPERATORS)}, got {curvature!r}.")
        settings = KFACOptions(**options).as_dict()
        regression = self.regression.with_draws(num_draws, antithetic=False)
        path = None if output is None else Path(output)
        identity: dict[str, Any] = {}
        if path is not None:
            check_file_name(path)
            if self.params is not None:
                names = {id(p): name for name, p in self.objective.model.named_parameters()}
                own = [p if isinstance(p, str) else names.get(id(p), "") for p in self.params]
                settings |= {"params": common_list(own)}
            identity = regression.identity({"curvature": curvature, **settings})
            if path.exists() and not overwrite:
                check_same_run(path, read_header(path)["info"], identity)
                self._operator = load_operator(path, self.objective.model, passes=self.passes)
                self._forget(path)
                return self
        make = OPERATORS[curvature]
        fitted = partial(make, regression, self.params, **options)
        self._operator = self._going_on("fit", path, overwrite, lambda own: fitted(passes=own))
        if path is not None:
            self._operator.info |= {"identity": identity}
            if hasattr(self.images, "summary"):
                self._operator.info |= {"images": self.images.summary()}
            if self._operator.processes.count > 1 or Processes.of_all().rank == 0:
                self.save(path)
            self._forget(path)
        return self

    def save(self, path: str | PathLike[str]) -> None:
        """Save the curvature to a safetensors file, see :meth:`load`.

        Raises:
            ValueError: If there is none, or the file cannot be written.
        """
        self.operator.info |= {"run": self.run} if self.run else {}
        self.operator.save(path)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        source: Any,
        images: Any,
        *,
        other_data: bool = False,
        **options: Any,
    ) -> Attributor:
        """The attributor with a saved curvature.

        Args:
            path: The file that :meth:`save` wrote; of several checkpoints, the folder.
            source: The pipeline, or several checkpoints; or the objective.
            images: The training images.
            other_data: Accept a curvature that was fitted to other images.
            options: Of :meth:`from_pipeline`, or of :class:`Attributor`.

        Raises:
            ValueError: If the file is of another network, other images, another objective or
                another version; the message says which.
        """
        if isinstance(source, DenoisingObjective):
            found: Attributor = cls(source, images, **options)
        else:
            found = cls.from_pipeline(source, images, **options)
        return found.with_saved(path, other_data=other_data)

    def with_saved(self, path: str | PathLike[str], *, other_data: bool = False) -> Self:
        """Take the curvature of a file that :meth:`save` wrote.

        Args:
            path: The file.
            other_data: Whether it may have been fitted to other images.

        Raises:
            ValueError: As :meth:`load`.
        """
        operator = load_operator(path, self.objective.model, passes=self.passes)
        advice = "Pass the network that it was fitted with, and the same recipe of training."
        check_same_objective(path, operator.info, self.regression, advice)
        if not other_data and not is_of_same_images(operator.info, self.regression):
            raise ValueError(
                f"'{path}' was fitted to other images than those given. Pass the same, fit anew, "
                "or pass `other_data=True` if that is meant."
            )
        self._operator = operator
        return self

    def score(
        self,
        queries: Any,
        *,
        prompts: str | Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        method: str | Iterable[str] | None = None,
        measurement: str = "loss",
        damping: float = 1e-8,
        relative: bool = False,
        rtol: float | None = None,
        ridge: float = RIDGE,
        held_out: Any = None,
        embedding: Embedding | str | PathLike[str] | None = None,
        num_draws: int | Literal["auto"] = 64,
        max_draws: int = MAX_DRAWS,
        query_draws: int | None = None,
        query_block: int = 64,
        output: str | PathLike[str] | None = None,
        overwrite: Overwrite = False,
    ) -> Attribution:
        """Score every training image for every query.

        Draws of an even number come in antithetic pairs; of multiples of four, two halves tell how
        sure the scores are.

        Args:
            queries: The images to explain, in the same forms as the training images.
            prompts: Their prompts, one for each, or one for all that have none of their own.
            labels: Their classes.
            method: ``'regression'``, changes of what is measured as training anew shows them, or
                ``'influence'``, those that the curvature predicts; to compare with, ``'pixels'``,
                ``'latents'`` or ``'embedding'``, which look at the images alone. Of several, out of
                one pass over the training images, the first orders and all are shown. ``None`` for
                the regression, which compares all training images' gradients, where these take
                4 GiB at most, of 20,000 images at most, and lower values of what is measured are
                better; else for influence.
            measurement: What is measured at the queries.
            damping: What is added to the curvature's eigenvalues before it is inverted.
            relative: Take the damping in units of each block's mean eigenvalue.
            rtol: Leave out eigenvalues of at most this part of the largest.
            ridge: That of ``'regression'``, in units of the kernel's mean diagonal entry.
            held_out: Images like the training images that training has not seen, a hundred say, in
                the same forms: scores of ``'regression'`` then are changes of the loss. Without,
                only their order means something.
            embedding: What ``'embedding'`` compares images by: the folder of an image model of
                ``transformers`` (DINO, CLIP), or a function of images ``[B, C, H, W]`` in [-1, 1]
                whose rows are their features.
            num_draws: Draws of timestep and noise for each training image; multiples of 4 tell how
                sure the scores are. ``"auto"`` for 16 and then twice as many, again and again,
                until the halves share eight of ten of the most helpful images of half of the
                queries, or ``max_draws`` are spent. Each time all is computed anew, as stratified
                draws depend on how many there are: less than twice the work of the last in all.
            max_draws: Draws at most, for ``"auto"``.
            query_draws: Those for each query; ``None`` for as many.
            query_block: Queries whose gradients are held at once.
            output: A file for the scores, see :meth:`Attribution.save`; if it holds these scores
                already they are read. A checkpoint stands beside it until it is written.
            overwrite: Replace an output, and a checkpoint, of other scores; ``"fewer draws"`` of
                those alone that differ by fewer draws.

        Raises:
            ValueError: If there is no curvature, the queries are not what the network takes, or the
                output is of other scores.
        """
        if isinstance(num_draws, str):
            if num_draws != "auto":
                raise ValueError(f"`num_draws` must be a number or 'auto', got {num_draws!r}.")
            told = {k: v for k, v in locals().items() if k not in ("self", "num_draws")}
            return score_until_told(self, **told)
        path = None if output is None else Path(output)
        if path is not None:
            check_file_name(path, ".safetensors")
        methods = self.methods(method, measurement, num_draws, held_out, embedding)
        if isinstance(embedding, str | PathLike):
            with needs_extra("Reading images"):
                from curvlinops_diffusion.loading.image_models import ImageModel
            embedding = ImageModel(Path(embedding))
        # images alone need no curvature; one that is there belongs to the run all the same
        takes_draws = any(each.takes_draws for each in methods)
        operator = self.operator if takes_draws else self._operator
        asked_of = self.opened(queries, prompts=prompts, labels=labels)
        draws = num_draws if query_draws is None else query_draws
        J_train = self.gradients(num_draws=num_draws)
        J_query = self._gradients_of(asked_of, draws, measurement)
        train, query, unseen = J_train.regression, J_query.regression, None
        asked: dict[str, Any] = {"damping": damping}
        asked |= {"relative": True} if relative else {}
        asked |= {} if rtol is None else {"rtol": rtol}
        inverse: Any = None if operator is None else operator.inverse(**asked)
        asked = {"measurement": measurement, **asked}
        if methods != [Method.INFLUENCE]:
            asked |= {"method": " ".join(each.value for each in methods), "ridge": ridge}
        if held_out is not None:
            own = self.opened(held_out, what="held_out")
            unseen = self._gradients_of(own, self.regression.draws.rounded_up(GAP_DRAWS), "loss")
            asked |= {"held_out": unseen.regression.data_identity()}
        if embedding is not None:
            asked |= {"embedding": name_of(embedding)}
        made = {}
        if operator is not None:  # where files lay decides nothing
            made = {key: value for key, value in operator.info.items() if key != "run"}
            inverse.info.pop("run", None)
        identity = {
            "train": train.identity({}),
            "query": query.identity(asked),
            "operator": json.loads(json.dumps(made)),
        }
        shown = _gallery(asked_of, query)
        if path is not None and is_same_run(path, identity, overwrite):
            self._forget(path)
            loaded = Attribution.load(path, self.images, shown)
            _warn_if_untold(GeneralisationGap.of_header(loaded.header))
            return loaded
        if path is not None:
            size = query.num_data * train.num_data * self.objective.working_dtype.itemsize
            check_space(path.parent, 3 * size, "The scores, and those of halves,")
        # a kernel regression solves a system of all training images
        shards = path if self.passes.sharded and methods == [Method.INFLUENCE] else None

        header: dict[str, Any] = {
            "train": list(self.images.names),
            "queries": list(shown.names),
            "identity": identity,
            "methods": [each.value for each in methods],
            **self._forms,
            **({"prompt": prompts} if isinstance(prompts, str) else {}),
            **({"run": self.run} if self.run else {}),
        }
        first_process = Processes.of_all().rank == 0
        galleries = {"train": self.images, "queries": shown}
        if all(hasattr(images, "source_digests") for images in galleries.values()):
            header["digests"] = {key: images.digests for key, images in galleries.items()}
            if path is not None and first_process:
                header["sources"] = self.images.source_digests()

        def run(passes: PassOptions) -> Any:
            passes = replace(passes, sharded=False, max_memory=None)
            measured = {"measurement": measurement}
            values_Q = computed_once(
                "Values",
                query,
                lambda: {"values": J_query.values()},
                passes,
                measured,
                query.num_samples,
            )["values"]
            header["values"] = plain_numbers(values_Q)
            scale = 1.0
            if unseen is not None:  # seen are shown as queries are
                seen = self._gradients_of(self._data, unseen.regression.num_draws, "loss")
                gap = generalisation_gap(seen, unseen, passes)
                _warn_if_untold(gap)
                header["gap"] = asdict(gap)
                scale = gap.value if gap.is_told else 1.0
            operators = (J_query, inverse, J_train)
            blocks: dict[str, Any] = {"query_block": query_block, "passes": passes}
            if shards is None:
                blocks |= {"ridge": ridge, "gap": scale, "embedding": embedding}
                return scores_of(methods, *operators, **blocks)
            halved = can_be_halved(train) and can_be_halved(query)
            return StoredScores.create(shards, *operators, halves=halved, header=header, **blocks)

        found = self._going_on("score", path, overwrite, run)
        if shards is not None:
            result = Attribution.load(shards, self.images, shown)
        else:
            halves = {each.value: own for each, (_, own) in found.items()}
            first = halves[methods[0].value]
            if first is not None:
                header |= Agreement.of_halves(first.first, first.second).as_header()
            by_method = {each.value: scores for each, (scores, _) in found.items()}
            result = Attribution(by_method, halves, header, self.images, shown)
        if path is not None:
            if shards is None:
                Processes.of_all().all_or_none(lambda: result.save(path) if first_process else None)
            self._forget(path)
        return result

    # -----------------------------------------------------------------------------------------

    def opened(
        self,
        queries: Any,
        *,
        prompts: str | Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        what: str = "queries",
    ) -> Any:
        """Open images and check them, before anything is computed; :meth:`score` takes them.

        Args:
            queries: As for :meth:`score`, and so are the others.
            prompts: Likewise.
            labels: Likewise.
            what: Which of its arguments they are, ``"queries"`` or ``"held_out"``.

        Raises:
            ValueError: If they are not what the network takes, or are the training images.
        """
        if self._open is not None:
            if hasattr(queries, "source_digests"):  # they are open
                return queries
            found = self._open(queries, prompts=prompts, labels=labels, what=what)
            if what == "held_out":
                known, own = set(self.images.source_digests()), found.source_digests()
                if seen := [n for n, z in zip(found.names, own, strict=True) if z in known]:
                    raise ValueError(
                        f"`held_out` must be images that training has not seen, got {len(seen)} "
                        f"that are training images, '{seen[0]}' first. Leave them out."
                    )
            return found
        if prompts is not None or labels is not None:
            raise ValueError(
                "`prompts` and `labels` are for an attributor of a pipeline. Pass queries in the "
                "form of the training data, with their conditions."
            )
        return queries

    def _going_on(
        self, what: str, output: Path | None, overwrite: Overwrite, run: Callable[[PassOptions], T]
    ) -> T:
        """Run what goes on from a checkpoint; to overwrite, one of something else is replaced."""
        folder = None if output is None else output.with_name(f"{output.name}.checkpoint")
        if self.passes.checkpoint is not None:
            folder = Path(self.passes.checkpoint) / what
        passes, processes = replace(self.passes, checkpoint=folder), Processes.of_all()
        try:
            return run(passes)
        except OtherCheckpointError:
            if folder is None or not overwrite:
                raise
        processes.barrier()  # all have refused it: none reads it any more
        if processes.rank == 0:
            shutil.rmtree(folder)
        processes.barrier()  # none begins before it is gone
        return run(passes)

    def _forget(self, output: Path) -> None:
        """Delete the checkpoint beside an output, which is written."""
        if self.passes.checkpoint is None and Processes.of_all().rank == 0:
            shutil.rmtree(output.with_name(f"{output.name}.checkpoint"), ignore_errors=True)


# the keyword arguments of from_pipeline, which checkpoints have in common
_OF_PIPELINE: Mapping[str, Any] = Attributor.from_pipeline.__func__.__kwdefaults__  # type: ignore[attr-defined]
# those of them that decide the network and its objective, not the images
_OF_OBJECTIVE = {"params", *signature(DenoisingObjective.from_pipeline).parameters}
_OF_OBJECTIVE &= _OF_PIPELINE.keys()
# those of them that say how images are resized and cropped
_SIZING = ("resolution", "interpolation", *(k for k in _OF_PIPELINE if k.startswith("bucket")))
_RECIPE = signature(NoisedRegression).parameters.keys() - {"objective", "data", "num_draws", "seed"}
_RECIPE -= {"batch_size", "antithetic", "draws"}


def _read(images: Any, pipeline: Any, told: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Arguments of :meth:`Attributor.from_pipeline` with those that files decide; what is said."""
    found, said = by_data(images, by_hand(told, _OF_PIPELINE), {*_OF_PIPELINE, *_RECIPE})
    lines = [*(f"`{name}={value!r}`, by '{images}'" for name, value in found.items()), *said]
    told, recipe = {**told, **found}, told["recipe"]
    if recipe not in (None, "none"):
        if hasattr(pipeline, "objective"):
            raise ValueError(
                f"`recipe` is of a pipeline, got {recipe!r} for a Network, whose loss is decided. "
                "Pass the pipeline, or leave it out."
            )
        if not isinstance(pipeline, list | tuple):  # else it is read at each
            found, said = _as_trained(Path(recipe), pipeline, told, images)
            told, lines = {**told, **found, "recipe": None}, lines + said
    for line in lines:
        log.info(line)
    return told, lines


def _as_trained(
    recipe: Path, pipeline: Any, told: Mapping[str, Any], images: Any
) -> tuple[dict[str, Any], list[str]]:
    """Read a trainer's settings as arguments of :meth:`Attributor.from_pipeline`."""
    with needs_extra("Reading images"):
        from curvlinops_diffusion.loading.network import base_of
    given = by_hand(told, _OF_PIPELINE)
    given |= {"prompt": given["prompts"]} if "prompts" in given else {}
    # of objects, tensors say, their kind is compared and shown
    values = str | float | int | list | tuple | Mapping
    given = {k: v if isinstance(v, values) else type(v).__name__ for k, v in given.items()}
    known = {*_OF_PIPELINE, *_RECIPE, "snr_gamma", "prompt"}
    found, lines = by_recipe(recipe, base_of(pipeline), given, known, images)
    if "weighting" in found:
        found["weighting"] = weighting_of(found["weighting"], found.pop("snr_gamma", 5.0))
    return found | ({"prompts": found.pop("prompt")} if "prompt" in found else {}), lines


def _gallery(data: Any, regression: NoisedRegression) -> Any:
    return data if hasattr(data, "caption") else RegressionGallery(regression)


def _drawn(regression: NoisedRegression, num_draws: int) -> NoisedRegression:
    """The problem with so many draws, in antithetic pairs where their number is even."""
    return regression.with_draws(num_draws, antithetic=num_draws % 2 == 0)


def _warn_if_untold(gap: GeneralisationGap | None) -> None:
    if gap is not None and not gap.is_told:
        warnings.warn(
            f"The held-out images' loss exceeds that of the training images by {gap}: not told "
            "from zero. Scores of 'regression' stay without a unit. Pass more images that training "
            "has not seen.",
            stacklevel=3,
        )
