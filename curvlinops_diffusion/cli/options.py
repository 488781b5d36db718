"""The options of each command; every field is a flag, and a key of a YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS, options_text

_COUNTS = (
    *("resolution", "batch_size", "num_draws", "query_draws", "query_block"),
    *("mc_samples", "gradient_group", "top"),
)
_NOT_NEGATIVE = (
    *("damping", "checkpoint_every", "timeout"),
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
            if value is not None and value < 1:
                raise ValueError(f"{flag(name)} is {value}. Pass a whole number of at least 1.")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name, None)
            if value is not None and not (isfinite(value) and value >= 0):
                raise ValueError(f"{flag(name)} is {value}. Pass a finite number of at least 0.")


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Checked):
    """The trained network.

    Attributes:
        pipeline: Folder of a diffusers pipeline, as written by save_pretrained.
        variant: Which of several kinds of weights files is loaded, for instance fp16.
        model: Folder of a diffusers model, instead of a pipeline; with scheduler.
        scheduler: Folder of its scheduler.
        lora: Adapters that the network was fine-tuned by: a .safetensors file of save_lora_weights
            or of kohya's scripts, or a folder of PEFT's; several as name=path. Curvature and
            gradients are then of their parameters alone.
        device: Where to compute: cpu, cuda, cuda:1. Default: cuda if there is one.
        dtype: Precision of the network.
        autocast: Precision of the network's passes, if lower.
        latent_cache: Folder in which latents and embeddings are kept.
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


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Checked):
    """The loss that the network was trained with; the same for fit and score.

    Attributes:
        weighting: The weight of each noise level. Default: one.
        snr_gamma: The cap of --weighting min-snr.
        reduction: Whether squared errors are averaged or summed over the entries of an image.
        timesteps: How training drew timesteps.
        condition_dropout: How often training dropped the prompt or label.
        noise_offset: The strength of training's offset noise.
        input_perturbation: The strength of training's input perturbation.
    """

    weighting: Literal["min-snr", "cosmap", "inverse-variance"] | None = None
    snr_gamma: float = 5.0
    reduction: Literal["mean", "sum"] = "mean"
    timesteps: Literal["stratified", "uniform", "logit-normal"] = "stratified"
    condition_dropout: float = 0.0
    noise_offset: float = 0.0
    input_perturbation: float = 0.0

    def objective_options(self) -> dict[str, Any]:
        """Arguments of ``DenoisingObjective``."""
        from curvlinops_diffusion.diffusion import weightings  # needs PyTorch, --help does not

        made = {
            "min-snr": lambda: weightings.MinSNRWeighting(self.snr_gamma),
            "cosmap": weightings.CosmapWeighting,
            "inverse-variance": weightings.InverseVarianceWeighting,
        }
        weighting = None if self.weighting is None else made[self.weighting]()
        return {"weighting": weighting, "reduction": self.reduction}

    def regression_options(self) -> dict[str, Any]:
        """Arguments of ``NoisedRegression``."""
        names = ("timesteps", "noise_offset", "input_perturbation")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Checked):
    """Options that turn images into what the network was trained on.

    Attributes:
        resolution: Resize images to this size (shorter side, then cut from the middle). Default:
            images must have the network's size.
        prompt: The prompt of the images (of data and queries) that have none of their own.
    """

    resolution: int | None = None
    prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunOptions(Checked):
    """Options of every command that computes.

    Attributes:
        batch_size: Images that the network sees at once.
        checkpoint_every: Seconds between two checkpoints.
        timeout: Seconds that a process waits for the others, with torchrun.
        overwrite: Replace an output file, and a checkpoint, that was made with other weights, data,
            draws or options.
        dry_run: Print passes, memory, disk and time for as many processes, and stop.
        log: File to append a line of JSON to for each event.
        quiet: Show no progress.
        debug: Show the traceback of an error.
    """

    batch_size: int = 32
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
        output: The operator's file, .safetensors.
        params: Parameters to cover, by names or patterns such as '*attn*'. Default: all, or with
            --lora those of the adapters.
        curvature: The approximation.
        num_draws: Draws of timestep and noise for each image.
        seed: Seed of the draws.
        augment: Augmentation in training, drawn like noise.
        fisher_type: Which curvature.
        mc_samples: Loss vectors a draw.
        kfac_approx: How the Kronecker factors are found, weight sharing above all.
        gradient_group: Images whose gradients are added up before they are squared (EK-FAC).
    """

    data: Path
    output: Path
    params: list[str] | None = None
    curvature: Literal["ekfac", "kfac"] = "ekfac"
    num_draws: int = 8
    seed: int = 0
    augment: Literal["flip"] | None = None
    fisher_type: Literal["mc", "type-2", "empirical", "forward-only"] = "mc"
    mc_samples: int = 1
    kfac_approx: Literal["expand", "reduce", "shampoo", "rank-one"] = "expand"
    gradient_group: int = 1

    def kfac_options(self) -> dict[str, Any]:
        """Select the options that K-FAC and EK-FAC take, by their names there."""
        names = ["fisher_type", "mc_samples", "kfac_approx"]
        names += ["gradient_group"] if self.curvature == "ekfac" else []
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(ModelOptions, TrainingOptions, ImageOptions, RunOptions):
    """Score every training image for every query.

    Attributes:
        operator: The file that fit wrote.
        data: The training images, the same as for fit.
        queries: The images to explain, in the same forms, or one image file.
        output: The scores' file: .safetensors, or .npy with an index of names beside it.
        damping: The damping of the inverse.
        measurement: What is measured at the queries, a name of the registry of measurements.
        num_draws: Draws for each training image; an even number is drawn in antithetic pairs, and
            of a multiple of four two halves are compared, to say how sure the scores are.
        query_draws: Draws for each query; likewise.
        seed: Seed of the training images' draws; the queries have the next one.
        augment: Augmentation in training, drawn like noise.
        query_block: Queries whose gradients are held at once.
        other_data: Accept an operator that was fitted to other images.
    """

    operator: Path
    data: Path
    queries: Path
    output: Path
    damping: float = 1e-8
    measurement: str = field(
        default="loss", metadata={"choices": MEASUREMENTS, "help": options_text}
    )
    num_draws: int = 64
    query_draws: int = 64
    seed: int = 0
    augment: Literal["flip"] | None = None
    query_block: int = 64
    other_data: bool = False


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Checked):
    """Write a page with the training images that helped and hindered each query most.

    Attributes:
        scores: The file that score wrote.
        data: The training images.
        queries: The queries.
        output: The page, .html.
        operator: The operator's file, for spectra and coverage.
        top: Training images of each kind for each query.
        resolution: As for score; only for files that do not say it themselves.
        overwrite: Replace an existing page.
        log: File to append a line of JSON to for each event.
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
class InspectOptions:
    """Print what a file of an operator or of scores holds.

    Attributes:
        file: The file.
        log: File to append a line of JSON to for each event.
        debug: Show the traceback of an error.
    """

    file: Path
    log: Path | None = None
    debug: bool = False
