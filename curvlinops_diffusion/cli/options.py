"""The options of each command; every field is a flag, and a key of a YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS, Better, options_text

_COUNTS = (
    *("resolution", "batch_size", "num_draws", "query_draws", "query_block"),
    *("mc_samples", "max_positions", "top", "num_parts", "bootstrap"),
)
_POSITIVE = ("ridge", "max_memory")
_NOT_NEGATIVE = (
    *("damping", "rtol", "checkpoint_every", "timeout"),
    *("snr_gamma", "condition_dropout", "noise_offset", "input_perturbation"),
)


class Checked:
    """Options whose numbers are checked."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: If one is out of its range.
        """
        for name in _COUNTS:
            value = getattr(self, name, None)
            if value not in (None, "auto") and value < 1:
                raise ValueError(f"{flag(name)} is {value}. Pass a whole number of at least 1.")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name, None)
            if value is not None and not (isfinite(value) and value >= 0):
                raise ValueError(f"{flag(name)} is {value}. Pass a finite number of at least 0.")
        for name in _POSITIVE:
            value = getattr(self, name, None)
            if value is not None and not (isfinite(value) and value > 0):
                raise ValueError(f"{flag(name)} is {value}. Pass a finite number above 0.")


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def is_list(type_: Any) -> bool:
    """Whether a field's type takes several values."""
    return bool(type_ == list[str] | None)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Checked):
    """Options of the trained network.

    Attributes:
        pipeline: The folder of a diffusers pipeline, as save_pretrained writes it.
        variant: The kind of weights files to load where there are several, for instance fp16.
        model: The folder of a diffusers model, in place of a pipeline; needs --scheduler.
        scheduler: The folder of the model's scheduler.
        lora: Adapters that the network was fine-tuned by: a .safetensors file of save_lora_weights
            or of kohya's scripts, or a folder of PEFT's; several as name=path. Curvature and
            gradients are then of their parameters alone.
        device: The device to compute on: cpu, cuda, cuda:1; cuda by default, if there is one.
        dtype: The precision that the network is loaded in.
        autocast: The precision of the network's passes, if it is lower.
        latent_cache: A folder to keep latents and embeddings in, so that they are computed once.
        shard_network: Each process of torchrun keeps a part of the network's parameters only, for
            networks that no device holds; each module's are gathered when it runs.
    """

    pipeline: Path | None = None
    variant: str | None = None
    model: Path | None = None
    scheduler: Path | None = None
    lora: list[str] | None = None
    device: str | None = None
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    autocast: Literal["bfloat16", "float16"] | None = None
    latent_cache: Path | None = None
    shard_network: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Checked):
    """Options of its training, the same for fit and score.

    Attributes:
        weighting: How training weighted noise levels; all alike by default. The scripts of Stable
            Diffusion 3 do it as preconditioned.
        snr_gamma: The cap of --weighting min-snr.
        reduction: Whether training averaged or summed squared errors over the entries of an image.
        timesteps: How training drew timesteps.
        condition_dropout: The probability with which training dropped the prompt or label.
        noise_offset: The strength of training's offset noise.
        input_perturbation: The strength of training's input perturbation.
        training_arguments: What else training gave the network, as name=value by the names in
            diffusers' training scripts: max_sequence_length=77 guidance_scale=3.5. By default what
            these scripts have, which is printed.
    """

    weighting: Literal["min-snr", "cosmap", "inverse-variance", "preconditioned"] | None = None
    snr_gamma: float = 5.0
    reduction: Literal["mean", "sum"] = "mean"
    timesteps: Literal["stratified", "uniform", "logit-normal"] = "stratified"
    condition_dropout: float = 0.0
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    training_arguments: list[str] | None = None

    def objective_options(self) -> dict[str, Any]:
        """Arguments of ``DenoisingObjective``."""
        from curvlinops_diffusion.diffusion import weightings  # needs PyTorch, --help does not

        made = {
            "min-snr": lambda: weightings.MinSNRWeighting(self.snr_gamma),
            "cosmap": weightings.CosmapWeighting,
            "inverse-variance": weightings.InverseVarianceWeighting,
            "preconditioned": weightings.PreconditionedWeighting,
        }
        weighting = None if self.weighting is None else made[self.weighting]()
        return {"weighting": weighting, "reduction": self.reduction}

    def regression_options(self) -> dict[str, Any]:
        """Arguments of ``NoisedRegression``."""
        names = ("timesteps", "noise_offset", "input_perturbation")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Checked):
    """Options of the images.

    Attributes:
        resolution: Resize the shorter side of images to this size, and cut a square from the
            middle. Without it, images must have the network's size.
        prompt: The prompt of all images that have none of their own, queries included.
        caption_extension: How the names of captions beside images end. Without it, .caption or
            .txt.
    """

    resolution: int | None = None
    prompt: str | None = None
    caption_extension: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunOptions(Checked):
    """Options of the run.

    Attributes:
        batch_size: The number of images that the network sees at once; auto for as many as fit
            into half of the free memory.
        checkpoint_every: Seconds between two checkpoints.
        timeout: Seconds that a process of torchrun waits for the others.
        overwrite: Replace an output file, and a checkpoint, that was made with other weights, data,
            draws or options.
        dry_run: Print what the command will cost in samples, memory, disk and time, and stop.
        log: A file to which a line of JSON is appended for each event.
        quiet: Show no progress.
        debug: Show the traceback of an error.
    """

    batch_size: int | Literal["auto"] = 32
    checkpoint_every: float = 300.0
    timeout: float = 1800.0
    overwrite: bool = False
    dry_run: bool = False
    log: Path | None = None
    quiet: bool = False
    debug: bool = False


@dataclass(frozen=True, kw_only=True)
class FitOptions(ModelOptions, TrainingOptions, ImageOptions, RunOptions):
    """Fit K-FAC or EK-FAC to training images.

    Attributes:
        data: Training images: a folder (subfolders are classes; metadata.jsonl may give text or
            label), a data set of the library datasets saved to disk, or an .npz file.
        output: The operator's file to write, .safetensors.
        params: The parameters to cover, by names or by patterns such as '*attn*'. By default all,
            with --lora those of the adapters, or those of a ControlNet.
        curvature: The approximation of the curvature.
        num_draws: The number of draws of timestep and noise for each image.
        seed: The seed of the draws.
        augment: The augmentation that training used; drawn anew for each draw.
        fisher_type: Whose curvature: the model's (mc by random loss vectors, type-2 exactly), or
            that of the loss (empirical).
        mc_samples: The number of random loss vectors for each draw.
        kfac_approx: How Kronecker factors are found: expand and reduce from inputs and outputs,
            shampoo from gradients.
        max_positions: The number of pixels or tokens of an image and draw that a layer's factors
            are computed from, at most; a random sample where there are more. By default all.
        matmul_precision: On a GPU, whether products that factors are made of are rounded to TF32
            (high, the default there) or not (highest).
        sharded: Each process of torchrun keeps the blocks of some layers only, and writes a file of
            its own.
        max_memory: Gigabytes that factors may take beside the network and a training pass; where
            they are more, layers are fitted in groups, each by passes of its own over all images.
    """

    data: Path
    output: Path
    params: list[str] | None = None
    curvature: Literal["ekfac", "kfac"] = "ekfac"
    num_draws: int = 8
    seed: int = 0
    augment: Literal["flip"] | None = None
    fisher_type: Literal["mc", "type-2", "empirical"] = "mc"
    mc_samples: int = 1
    kfac_approx: Literal["expand", "reduce", "shampoo"] = "expand"
    max_positions: int | None = None
    matmul_precision: Literal["highest", "high"] | None = None
    sharded: bool = False
    max_memory: float | None = None

    def kfac_options(self) -> dict[str, Any]:
        """Select the options that K-FAC and EK-FAC take, by their names there."""
        names = ("fisher_type", "mc_samples", "kfac_approx", "max_positions", "matmul_precision")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(ModelOptions, TrainingOptions, ImageOptions, RunOptions):
    """Score every training image for every query.

    Attributes:
        operator: The file that fit wrote.
        data: The training images, the same as for fit.
        queries: The images to explain, in the same forms, or one image file.
        output: The scores' file to write: .safetensors, or .npy with an index of names beside it.
        method: What scores are: influence (predicted changes of what is measured), or regression
            (kernel regressions of it and of the prediction, squared, which predict the order that
            retraining shows better; they have no unit).
        ridge: The ridge of --method regression, in units of the kernel's mean diagonal entry.
        damping: What is added to the curvature's eigenvalues before it is inverted.
        relative: Take the damping in units of each block's mean eigenvalue, as kronfluence does.
        rtol: Leave out eigenvalues of at most this part of the largest (a truncated
            pseudo-inverse).
        measurement: What is measured at the queries, a name of the registry of measurements.
        num_draws: The number of draws for each training image. An even number is drawn in
            antithetic pairs; of a multiple of four, two halves tell how sure the scores are.
        query_draws: The number of draws for each query, likewise.
        seed: The seed of the training images' draws; the queries have the next one.
        augment: The augmentation that training used; drawn anew for each draw.
        query_block: The number of queries whose gradients are held at once.
        other_data: Accept an operator that was fitted to other images.
        sharded: Each process of torchrun reads some of the operator's blocks only, and writes the
            influence scores of the training images that it has seen.
        max_memory: Gigabytes that the operator may take; a larger one is multiplied from the host's
            memory.
    """

    operator: Path
    data: Path
    queries: Path
    output: Path
    method: Literal["influence", "regression"] = "influence"
    ridge: float = 5.0
    damping: float = 1e-8
    relative: bool = False
    rtol: float | None = None
    measurement: str = field(
        default="loss", metadata={"choices": MEASUREMENTS, "help": options_text}
    )
    num_draws: int = 64
    query_draws: int = 64
    seed: int = 0
    augment: Literal["flip"] | None = None
    query_block: int = 64
    other_data: bool = False
    sharded: bool = False
    max_memory: float | None = None

    def __post_init__(self) -> None:
        """Check that the method is for what is measured, and for how its scores are written.

        Raises:
            ValueError: If it is not.
        """
        super().__post_init__()
        if self.sharded and self.method == "influence" and self.output.suffix == ".npy":
            raise ValueError(
                f"--output {self.output} does not go with --sharded, by which each process writes "
                "a file of its own. Pass a name that ends in .safetensors."
            )
        if self.method != "regression":
            return
        if MEASUREMENTS[self.measurement].better is not Better.LOWER:
            good = [name for name, entry in MEASUREMENTS.items() if entry.better is Better.LOWER]
            raise ValueError(
                f"--method regression does not go with --measurement {self.measurement}. It adds "
                "the square of how the prediction would change, which no loss gains by: pass one "
                f"of {', '.join(good)}, of which lower is better, or --method influence."
            )


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Checked):
    """Write a page with the training images that helped and hindered each query most.

    Attributes:
        scores: The file that score wrote.
        data: The training images.
        queries: The queries.
        output: The page to write, .html.
        operator: The operator's file, to show its spectrum and blocks.
        top: The number of training images in each row of a query.
        resolution: The same as for score; needed only for files of older versions.
        overwrite: Replace an existing page.
        log: A file to append a line of JSON to for each event.
        debug: Show the traceback of an error.
    """

    scores: Path
    data: Path
    queries: Path
    output: Path
    operator: Path | None = None
    top: int = 8
    resolution: int | None = None
    overwrite: bool = False
    log: Path | None = None
    debug: bool = False


@dataclass(frozen=True, kw_only=True)
class AttributeOptions(ModelOptions, TrainingOptions, ImageOptions, RunOptions):
    """Fit, score and report: which training images made each query?

    What stands in the folder already is not made again.

    Attributes:
        data: Training images, as for fit.
        queries: The images to explain, as for score.
        output: The folder to write: the operator, scores, a page, a table, and all options.
        params: The parameters to cover, as for fit.
        curvature: The approximation of the curvature.
        fit_draws: The number of draws of timestep and noise for each image of the fit.
        num_draws: The number of draws for each training image's gradient.
        query_draws: The number of draws for each query.
        seed: The seed of the draws.
        augment: The augmentation that training used.
        method: What scores are, as for score.
        ridge: The ridge of --method regression.
        damping: What is added to the curvature's eigenvalues before it is inverted.
        relative: Take the damping in units of each block's mean eigenvalue.
        measurement: What is measured at the queries, a name of the registry of measurements.
        top: The number of training images in each row of a query on the page.
    """

    data: Path
    queries: Path
    output: Path
    params: list[str] | None = None
    curvature: Literal["ekfac", "kfac"] = FitOptions.curvature
    fit_draws: int = FitOptions.num_draws
    num_draws: int = ScoreOptions.num_draws
    query_draws: int = ScoreOptions.query_draws
    seed: int = FitOptions.seed
    augment: Literal["flip"] | None = None
    method: Literal["influence", "regression"] = "influence"
    ridge: float = ScoreOptions.ridge
    damping: float = ScoreOptions.damping
    relative: bool = False
    measurement: str = field(
        default="loss", metadata={"choices": MEASUREMENTS, "help": options_text}
    )
    top: int = ReportOptions.top

    def steps(self) -> tuple[FitOptions, ScoreOptions, ReportOptions]:
        """The options of the commands that it runs one after the other.

        Raises:
            ValueError: If options contradict each other.
        """
        operator, scores = (self.output / f"{n}.safetensors" for n in ("operator", "scores"))
        fit = self._of(FitOptions, output=operator, num_draws=self.fit_draws)
        score = self._of(ScoreOptions, output=scores, operator=operator)
        page = self.output / "report.html"
        report = self._of(
            ReportOptions, output=page, scores=scores, operator=operator, overwrite=True
        )
        return fit, score, report

    def _of(self, cls: type[Any], **changed: Any) -> Any:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return cls(**{f.name: v for f in fields(cls) for v in _given(f.name, own, changed)})


def _given(name: str, own: dict[str, Any], changed: dict[str, Any]) -> list[Any]:
    return [values[name] for values in (changed, own) if name in values][:1]


@dataclass(frozen=True, kw_only=True)
class ValidatePlanOptions(Checked):
    """Plan on which parts of the training images networks are to be trained anew.

    Attributes:
        data: The training images.
        output: The folder to write: a list of images for each part, and the plan itself.
        kind: What parts are: subsets (random ones of one size), groups (everything but one class),
            or removals (without the images most helpful to each query, by --scores).
        num_parts: The number of random subsets.
        fraction: The part of the images in a random subset.
        seed: The seed of what is random.
        scores: A file that score wrote, for --kind removals.
        remove: How many of the most helpful images are removed, for --kind removals.
        overwrite: Replace a plan.
        log: A file to append a line of JSON to for each event.
        debug: Show the traceback of an error.
    """

    data: Path
    output: Path
    kind: Literal["subsets", "groups", "removals"] = "subsets"
    num_parts: int = 64
    fraction: float = 0.5
    seed: int = 0
    scores: Path | None = None
    remove: list[str] | None = None
    overwrite: bool = False
    log: Path | None = None
    debug: bool = False


@dataclass(frozen=True, kw_only=True)
class ValidateMeasureOptions(ModelOptions, TrainingOptions, ImageOptions, RunOptions):
    """Measure the queries under every retrained network, on the same draws of noise.

    Attributes:
        plan: The folder of the plan.
        retrained: The folder of the retrained networks, each of the name of its part (or
            part_seed0, part_seed1): a pipeline, a model (with --scheduler), or an adapter (with
            --pipeline).
        queries: The queries.
        output: The file to write, .safetensors.
        measurement: What is measured at the queries, a name of the registry of measurements.
        query_draws: The number of draws for each query.
        seed: The seed of the draws.
    """

    plan: Path
    retrained: Path
    queries: Path
    output: Path
    measurement: str = field(
        default="loss", metadata={"choices": MEASUREMENTS, "help": options_text}
    )
    query_draws: int = 64
    seed: int = 12345


@dataclass(frozen=True, kw_only=True)
class ValidateJudgeOptions(Checked):
    """Judge how well scores predicted what the retrained networks did.

    Attributes:
        plan: The folder of the plan.
        measured: The file that validate measure wrote.
        scores: Files that score wrote for the same queries, each perhaps as name=file; differences
            are to the first.
        output: The page (.html) or file of numbers (.json) to write.
        bootstrap: The number of resamples for intervals.
        overwrite: Replace an existing output.
        log: A file to append a line of JSON to for each event.
        debug: Show the traceback of an error.
    """

    plan: Path
    measured: Path
    output: Path
    scores: list[str] | None = None
    bootstrap: int = 1000
    overwrite: bool = False
    log: Path | None = None
    debug: bool = False


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Print what a file of an operator or of scores holds.

    Attributes:
        file: The file to look into.
        log: A file to append a line of JSON to for each event.
        debug: Show the traceback of an error.
    """

    file: Path
    log: Path | None = None
    debug: bool = False


def in_bytes(gigabytes: float | None) -> int | None:
    """Bytes of an option in gigabytes."""
    return None if gigabytes is None else max(1, round(gigabytes * 1e9))
