"""The options of each command, flags and keys of a YAML file.

An option of the library's has default and help of its signature and docstring there, and says here
only how its values are written. Those of the program alone have no default but none.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

from curvlinops_diffusion.cli.signatures import REQUIRED, parameters
from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS, options_text

ATTRIBUTOR = "attributor:Attributor.__init__"
PIPELINE = "attributor:Attributor.from_pipeline"
FIT = "attributor:Attributor.fit"
SCORE = "attributor:Attributor.score"
LOAD = "attributor:Attributor.load"
REPORT = "attribution:Attribution.report"
KFAC = "curvature.options:KFACOptions"
PASSES = "runtime.passes:PassOptions"
REGRESSION = "diffusion.regression:NoisedRegression.__init__"
PLAN = "influence.validation.plans:RetrainingPlan.random_subsets"
CHECK = "validation.checking:check"
JUDGE = "influence.validation.judgements:linear_datamodelling_score"


@dataclass(frozen=True)
class Option:
    """An option.

    Attributes:
        type: How it is written: a type, or a ``Literal`` of what may be chosen; ``list`` of either
            for several values.
        default: Its value if it is not given, ``REQUIRED`` for none.
        help: What it is, in sentences.
        source: The function of the library that it is a parameter of, and its name there; ``None``
            for one of the program alone.
    """

    type: Any
    default: Any
    help: str
    source: tuple[str, str] | None = None

    @property
    def several(self) -> bool:
        """Whether it takes several values."""
        return getattr(self.type, "__origin__", None) is list


@dataclass(frozen=True)
class Command:
    """A command of the program.

    Attributes:
        title: What it does, in a sentence.
        groups: Its options by name, by the title of their group.
        earlier: The option that names a file of an earlier command, which says what that was given.
    """

    title: str
    groups: Mapping[str, Mapping[str, Option]]
    earlier: str | None = None

    @property
    def options(self) -> dict[str, Option]:
        """All of its options, by name."""
        return {name: option for own in self.groups.values() for name, option in own.items()}


def flag(name: str) -> str:
    """The flag of an option."""
    return "--" + name.replace("_", "-")


# the options of the program alone
_OWN: dict[str, tuple[Any, str]] = {
    "data": (
        Path,
        "Training images: a folder as its trainer had it (captions beside the images or metadata, "
        "kohya's 30_name, or subfolders that are classes), the dataset.toml of kohya's scripts, a "
        "data set of the library datasets saved to disk or by its id on the Hub (owner/name), or "
        "an .npz file.",
    ),
    "queries": (Path, "The images to explain, in the same forms, or one image file."),
    "operator": (Path, "The file that fit wrote, which says what that was given."),
    "scores": (Path, "A file that score wrote, which says what that was given."),
    "plan": (Path, "The folder that validate plan wrote."),
    "measured": (Path, "The file that validate measure wrote."),
    "retrained": (
        Path,
        "The folder of the retrained networks, each of the name of its part (or part_seed0, "
        "part_seed1): a pipeline, a model (with --scheduler), or an adapter (with --pipeline).",
    ),
    "output": (Path, ""),
    "file": (Path, "The file to look into."),
    "folders": (
        bool,
        "Write a folder of each part as well, as trainers take --data: links to its images, with "
        "their captions and metadata.",
    ),
    "json": (bool, "Print all that the file's header holds, as JSON."),
    "kind": (
        Literal["subsets", "groups", "removals"],
        "What parts are: subsets (random ones of one size, the default), groups (all but one "
        "class), or removals (without the images most helpful to each query by --scores, the "
        "default with --remove).",
    ),
    "remove": (list[str], "How many images are removed, for removals."),
    "pipeline": (
        Path,
        "The folder of a diffusers pipeline, of save_pretrained; or an id on the Hub (owner/name), "
        "which is downloaded unless it is in the cache or HF_HUB_OFFLINE is set.",
    ),
    "pipeline_config": (
        Path,
        "Where --pipeline is a single .safetensors file: the folder that says what it is made of, "
        "as save_pretrained writes it (model_index.json, configs, tokenizers; weights are not "
        "needed); by default one beside the file, of its name.",
    ),
    "variant": (str, "The kind of weights files, where there are several: fp16, say."),
    "model": (Path, "A diffusers model in place of a pipeline; needs --scheduler."),
    "scheduler": (Path, "The folder of the model's scheduler."),
    "lora": (
        list[str],
        "Adapters that the network was fine-tuned by: a .safetensors file of save_lora_weights, of "
        "kohya's scripts, LyCORIS or OneTrainer; a folder of PEFT's, or of all that a trainer has "
        "saved on its way, of which the final one is taken; or an id on the Hub (owner/name, "
        "owner/name/file); several as name=path. Curvature and gradients are then of their "
        "parameters alone.",
    ),
    "checkpoints": (
        list[str],
        "Earlier checkpoints of the same training, adapters (in place of --lora; of a folder all "
        "that it holds) or pipelines: "
        "scores are averaged over them and the network, for as many times the work.",
    ),
    "device": (str, "The device: cpu, cuda, cuda:1; by default cuda, if there is one."),
    "dtype": (
        Literal["float32", "float64", "bfloat16", "float16"],
        "The precision that the network is loaded in; by default that of PyTorch.",
    ),
    "shard_network": (
        bool,
        "Each process of torchrun keeps a part of the network's parameters only, for networks that "
        "no device holds; each module's are gathered when it runs.",
    ),
    "dry_run": (bool, "Print the cost in samples, memory and disk, counted, and stop."),
    "time": (
        bool,
        "As --dry-run, and how long it takes, estimated from a batch that the network is run on.",
    ),
    "log": (Path, "A file to which a line of JSON is appended for each event."),
    "quiet": (bool, "Show no progress."),
    "debug": (bool, "Show the traceback of an error."),
}
#: How images are resized and cropped.
SIZING = "resolution buckets bucket_step bucket_min bucket_max bucket_no_upscale interpolation"
#: How training images lie on disk.
LAYOUT = (
    "caption_extension caption_lines caption_column image_column trigger_word split skip_unreadable"
)
# options of the library: where they are, how they are written where the signature does not say it,
# and what they are where a command line has less of it
_OF_LIBRARY: dict[str, tuple[Any, ...]] = {
    name: tuple(entry)
    for names, *entry in (
        ("params training_arguments", PIPELINE, list[str]),
        (f"{LAYOUT} {SIZING} reduction condition_dropout prior_loss_weight", PIPELINE),
        (
            "buckets",
            PIPELINE,
            bool | str,
            "The aspect buckets that images are resized and cropped to: --buckets alone for those "
            "of kohya's scripts, square for the one that they have without; heights and widths, "
            "'672,1568;…', as --aspect_ratio_buckets of diffusers' scripts, auto for their "
            "--use_aspect_ratio_buckets; onetrainer or ai-toolkit for theirs. Batches are of one "
            "bucket each.",
        ),
        ("autocast", PIPELINE, Literal["bfloat16", "float16"]),
        ("latent_cache", PIPELINE, Path),
        (
            "weighting",
            PIPELINE,
            Literal["min-snr", "debiased", "cosmap", "inverse-variance", "preconditioned"],
            "How training weighted noise levels; by default all alike. The scripts of Stable "
            "Diffusion 3 do it as preconditioned.",
        ),
        (
            "recipe",
            PIPELINE,
            str,
            "The adapter's file or folder, or the config of its trainer (kohya's scripts, "
            "diffusers', OneTrainer, ai-toolkit, SimpleTuner), of which the options are read that "
            "are not given; by default that of --lora. none reads none.",
        ),
        (
            "prompt",
            f"{PIPELINE} prompts",
            str,
            "The prompt of all images that have none of their own, queries included.",
        ),
        ("snr_gamma", "diffusion.weightings:MinSNRWeighting gamma"),
        (
            "timesteps",
            REGRESSION,
            str,
            "How training drew timesteps: stratified or uniform, perhaps of some levels "
            "(uniform:LOW:END), or logit-normal (logit-normal:MEAN:STD, from data to noise).",
        ),
        ("augment", REGRESSION, Literal["flip"], "The augmentation that training used."),
        (
            "noise_offset input_perturbation tag_dropout random_crop shuffle_captions",
            REGRESSION,
        ),
        (
            "keep_tokens",
            REGRESSION,
            int,
            "Tags at the beginning of captions that are neither moved nor left out.",
        ),
        ("seed batch_size", ATTRIBUTOR),
        ("curvature num_draws overwrite", FIT),
        ("fit_draws", f"{FIT} num_draws", None, "Draws for each image of the fit."),
        (
            "method",
            SCORE,
            list[Literal["influence", "regression", "pixels", "latents", "embedding"]],
        ),
        ("held_out", SCORE, Path),
        (
            "embedding",
            SCORE,
            Path,
            "What embedding compares images by: the folder of an image model of transformers "
            "(DINO, CLIP), as save_pretrained writes it.",
        ),
        ("damping relative rtol ridge query_block max_draws query_draws", SCORE),
        ("other_data", LOAD),
        ("last", "loading.epochs:adapters_by_step", int),
        ("top", REPORT),
        (
            "group_by",
            REPORT,
            str,
            "What groups of training images do to each query is shown, too: by folder, by class, "
            "or by a column of their metadata.",
        ),
        ("bootstrap", JUDGE, None, "Resamples for intervals."),
        ("num_parts fraction", PLAN),
        ("num_queries shuffle_weights", CHECK),
        ("checkpoint_every", PASSES),
        (
            "sharded",
            PASSES,
            bool,
            "Each process of torchrun keeps the blocks of some layers only, and writes a file of "
            "its own of them, and of the scores of the images that it has seen.",
        ),
        (
            "max_memory",
            PASSES,
            float,
            "Gigabytes that factors may take beside the network and a training pass; where they "
            "are more, layers are fitted in groups, each by passes of its own.",
        ),
        ("timeout", "cli.running:process_group"),
    )
    for name in names.split()
}


def _options(names: str, **other: Any) -> dict[str, Option]:
    """Options by name, with an exclamation mark where one must be given.

    Args:
        names: The names.
        other: For options of these names the source in the library, or what they are said to be.
    """
    # measurements may be added to
    library = {"measurement": (SCORE, Literal[tuple(MEASUREMENTS)], options_text()), **_OF_LIBRARY}
    found = {}
    for word in names.split():
        name = word.rstrip("!")
        if name in _OWN:
            kind, text = _OWN[name]
            default = REQUIRED if word.endswith("!") else False if kind is bool else None
            found[name] = Option(kind, default, other.get(name, text))
            continue
        where, kind, text = (*library.get(name, (KFAC,)), None, None)[:3]
        where, _, there = other.get(name, where).partition(" ")
        source = (where, there or name)
        known = parameters(where)[source[1]]
        told = in_flags(text or known.help).replace("`", "")
        if known.type is bool:
            told = told.replace("False for", f"{flag(f'no_{name}')} for")
        found[name] = Option(kind or known.type, known.default, told, source)
        assert found[name].type is not None, f"{where} does not say how {name} is written"
    return found


#: The trained network.
NETWORK = (
    "pipeline pipeline_config variant model scheduler lora device dtype autocast latent_cache "
    "shard_network"
)
#: The loss that it was trained with, and on what; the same for all commands of a run.
TRAINING = (
    "weighting snr_gamma reduction timesteps condition_dropout noise_offset input_perturbation "
    "training_arguments augment random_crop shuffle_captions keep_tokens tag_dropout "
    f"{SIZING} prior_loss_weight prompt {LAYOUT} seed recipe"
)
_RUN = "batch_size sharded max_memory checkpoint_every timeout overwrite dry_run log quiet debug"
_JUDGED = (
    "Files that score wrote for the same queries, each perhaps as name=file; differences are to "
    "the first."
)


@cache
def commands() -> dict[str, Command]:
    """The commands by name."""
    first, last = "Inputs and outputs", "The run"
    common = {
        "The network": _options(NETWORK),
        "Its training": _options(TRAINING),
        last: _options(f"{_RUN} time"),
    }
    # of a command that computes nothing long
    short = {last: _options("overwrite log quiet debug")}
    curvature = _options(" ".join(["params curvature", *parameters(KFAC)]))
    scores = _options(
        "method embedding held_out measurement damping relative rtol ridge num_draws max_draws "
        "query_draws query_block",
        num_draws=SCORE,
    )
    return {
        "attribute": Command(
            "Fit, score and report: which training images made each query?",
            {
                first: _options(
                    "data! queries! output! checkpoints last",
                    output="The folder to write: curvature, scores, page, table and options.",
                ),
                "The curvature": {**_options("fit_draws"), **curvature},
                "The scores": {**scores, **_options("top group_by")},
                **common,
            },
        ),
        "fit": Command(
            "Fit K-FAC or EK-FAC to training images.",
            {
                first: _options("data! output!", output="The file to write, .safetensors."),
                "The curvature": {**_options("num_draws"), **curvature},
                **common,
            },
        ),
        "score": Command(
            "Score every training image for every query.",
            {
                first: _options(
                    "operator! queries! output! data other_data",
                    output="The file to write, .safetensors.",
                    data="The training images; by default those of the operator.",
                ),
                "The scores": scores,
                **common,
            },
            "operator",
        ),
        "report": Command(
            "Write a page with the training images that helped and hindered each query most, or a "
            "table.",
            {
                first: _options(
                    "scores! output! data queries operator top group_by",
                    output="The page to write, .html; or a table of all scores, or with --group-by "
                    "of groups, .csv or .parquet.",
                    data="The training images, if they have moved.",
                    queries="The queries, if they have moved.",
                    operator="The curvature, if it has moved, of which the page has a spectrum.",
                ),
                **short,
            },
            "scores",
        ),
        "inspect": Command(
            "Say what a file of an operator or of scores is of, from what, and by what.",
            {first: _options("file!"), last: _options("json log debug")},
        ),
        "validate-check": Command(
            "Check how far scores are to be trusted, in minutes and without training.",
            {
                first: _options(
                    "operator! output! data other_data",
                    output="The page (.html) or file of numbers (.json) to write.",
                    data="The training images; by default those of the operator.",
                ),
                "The checks": {
                    "method": Option(
                        Literal["influence", "regression"],
                        parameters(CHECK)["method"].default,
                        "The method that is checked, one at a time.",
                        (CHECK, "method"),
                    ),
                    **_options("num_queries num_draws shuffle_weights", num_draws=CHECK),
                    **_options("damping relative rtol ridge"),
                    "group_by": Option(
                        str, None, parameters(CHECK)["group_by"].help, (CHECK, "group_by")
                    ),
                },
                "The network": common["The network"],
                "Its training": common["Its training"],
                last: _options("batch_size max_memory timeout overwrite dry_run log quiet debug"),
            },
            "operator",
        ),
        "validate-plan": Command(
            "Plan on which parts of the training images networks are to be trained anew.",
            {
                first: _options(
                    f"output! data scores kind remove num_parts fraction seed folders {LAYOUT}",
                    output="The folder to write: the plan, and a list of images for each part.",
                    data="The training images; by default those of --scores.",
                    seed=PLAN,
                ),
                **short,
            },
            "scores",
        ),
        "validate-measure": Command(
            "Measure the queries under every retrained network, on the same draws of noise.",
            {
                first: _options(
                    "plan! retrained! output! scores queries measurement query_draws",
                    output="The file to write, .safetensors.",
                    queries="The images to measure; by default those of --scores.",
                    query_draws="cli.validate:measured",
                ),
                **common,
                last: _options(_RUN),
                "Its training": _options(TRAINING, seed="cli.validate:measured"),
            },
            "scores",
        ),
        "validate-judge": Command(
            "Judge how well scores predicted what the retrained networks did.",
            {
                first: _options(
                    "plan! measured! output!",
                    output="The page (.html) or file of numbers (.json) to write.",
                )
                | {"scores": Option(list[str], None, _JUDGED)}
                | _options("bootstrap"),
                **short,
            },
        ),
    }


def options_of(name: str, **given: Any) -> Namespace:
    """The options of a command: those given, else their defaults.

    Raises:
        ValueError: If a number is out of range.
    """
    options = Namespace(command=name)
    for key, option in commands()[name].options.items():
        usual = None if option.default is REQUIRED else option.default
        setattr(options, key, given.pop(key, usual))
        _check(key, option.type, getattr(options, key))
    vars(options).update(given)
    return options


def in_flags(text: str) -> str:
    """A message of the library, its arguments called as the program's options are."""
    renamed = {"images": "data", "prompts": "prompt"}
    known = {*_OWN, *_OF_LIBRARY, *parameters(KFAC), "measurement", *renamed}

    def option(match: re.Match[str]) -> str:
        name, value = match[1], match[2] or ""
        value = "" if value == "=True" else value.replace("=", " ").replace("'", "")
        return f"{flag(renamed.get(name, name))}{value}" if name in known else match[0]

    return re.sub(r"`(\w+)(=[^`]+)?`", option, text)


# whole numbers that are no counts
_ANY = {"seed", "max_dense", "keep_tokens"}


def _check(name: str, kind: Any, value: Any) -> None:
    """Check before PyTorch is loaded what holds for all numbers, and for choices of several."""
    kinds = (kind, *get_args(kind))
    choices = [choice for one in kinds for choice in get_args(one) if one is not kind]
    for each in value if isinstance(value, list) else ():
        if choices and each not in choices:
            raise ValueError(f"{flag(name)} must be of {', '.join(choices)}, got {each}.")
    if value is None or isinstance(value, str | bool | list):
        return
    if int in kinds and name not in _ANY and value < 1:
        raise ValueError(f"{flag(name)} must be a whole number of at least 1, got {value}.")
    if float in kinds and not (isfinite(value) and value >= 0):
        raise ValueError(f"{flag(name)} must be a finite number of at least 0, got {value}.")


def chosen(options: Namespace, where: str) -> dict[str, Any]:
    """The arguments of a function of the library, by their names there.

    Args:
        options: The options of a command.
        where: The function, as :func:`~curvlinops_diffusion.cli.signatures.parameters` takes it.
    """
    return {
        option.source[1]: getattr(options, key)
        for key, option in commands()[options.command].options.items()
        if option.source is not None and option.source[0] == where
    }


def picked(options: Namespace, names: str) -> dict[str, Any]:
    """Some of the options, by name."""
    return {name: getattr(options, name) for name in names.split()}
