"""Paths that a command is given, checked before PyTorch and the network are loaded."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from curvlinops_diffusion.cli.options import (
    AttributeOptions,
    FitOptions,
    ReportOptions,
    ScoreOptions,
    ValidateJudgeOptions,
    ValidateMeasureOptions,
    ValidatePlanOptions,
)
from curvlinops_diffusion.cli.outputs import check_output, check_output_is_new
from curvlinops_diffusion.influence.score_files import SCORES
from curvlinops_diffusion.linalg.operator_files import OPERATOR, read_header
from curvlinops_diffusion.loading.folders import ACCEPTED
from curvlinops_diffusion.loading.saved_networks import (
    check_adapter,
    check_model,
    check_pipeline,
    check_scheduler,
    parts_of,
)
from curvlinops_diffusion.runtime.files import check_can_be_made, files_below, named_path

_OUTPUTS = {
    FitOptions: ((".safetensors",), OPERATOR.key),
    ScoreOptions: ((".safetensors", ".npy"), SCORES.key),
    ReportOptions: ((".html",), None),
    ValidateMeasureOptions: ((".safetensors",), "curvlinops_diffusion.measured"),
    ValidateJudgeOptions: ((".html", ".json"), None),
}
# those of which a finished output is recognised, and not made again
_GOES_ON = (FitOptions, ScoreOptions)
# files beside images, or of something else, by their suffixes
_NO_IMAGES = {".bin", ".ckpt", ".csv", ".json", ".jsonl", ".log", ".md", ".pt", ".pth", ".py"}
_NO_IMAGES |= {".safetensors", ".txt", ".yaml", ".yml", ".html"}
_FOLDERS = {
    "plan": ("Pass the folder that validate plan wrote.", "plan.safetensors"),
    "retrained": ("Pass the folder of the retrained networks.", None),
}


def check_paths(options: Any) -> None:
    """Check what a command reads and writes, as far as file names and headers tell.

    Args:
        options: The options of a command.

    Raises:
        ValueError: If a path does not exist, is of another kind or damaged, or cannot be written.
    """
    given = vars(options)
    if type(options) in _OUTPUTS:
        suffixes, kind = _OUTPUTS[type(options)]
        check_output(options.output, suffixes, _inputs(given), kind)
        if not isinstance(options, _GOES_ON):
            check_output_is_new(options.output, options.overwrite)
    if isinstance(options, ValidatePlanOptions | AttributeOptions):
        check_can_be_made(options.output, "--output")
    cache = given.get("latent_cache")
    if cache is not None and not cache.is_dir():  # a full one need not be written to
        check_can_be_made(cache, "--latent-cache")
    if "pipeline" in given:
        check_network(options)
    for name in ("data", "queries"):
        if given.get(name) is not None:
            _check_images(given[name], name)
    for name, (advice, header) in _FOLDERS.items():
        if given.get(name) is not None:
            _check_folder(given[name], name, advice, header)
    for name, path in _inputs(given):
        if name == "--operator":
            check_exists(path, name, "Make it by curvlinops-diffusion fit.")
            _check_shards(path, read_header(path))
        elif name == "--scores":
            _check_scores(check_exists(path, name, SCORES.advice))
        elif name == "--measured":
            check_exists(path, name, "Make it by curvlinops-diffusion validate measure.")


def check_exists(path: Path, option: str, advice: str) -> Path:
    """Check that there is a file or folder of a name; return it.

    Raises:
        ValueError: If there is none; with the name that may be meant.
    """
    try:
        if os.path.lexists(path) and not path.exists():
            raise ValueError(f"'{path}' ({option}) is a link to what does not exist. {advice}")
        if path.exists():
            return path
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise ValueError(f"'{path}' ({option}) cannot be read: {error.strerror}.") from error
    raise ValueError(f"'{path}' does not exist. {advice}{_meant(path)}")


def _meant(path: Path) -> str:
    """A guess at another name."""
    if "\\" in str(path) and os.sep == "/":
        return " Folders on this machine are separated by /, not by backslashes."
    try:
        siblings = [sibling.name for sibling in path.parent.iterdir()]
    except OSError:
        siblings = []
    close = difflib.get_close_matches(path.name, siblings, 1, cutoff=0.75)
    if close:
        return f" Did you mean '{path.with_name(close[0])}'?"
    return "" if path.is_absolute() else f" Relative paths are below '{Path.cwd()}'."


def _inputs(given: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """What a command reads, by its flags; each of several."""
    names = ("data", "queries", "operator", "scores", "plan", "measured", "model", "pipeline")
    for name in (*names, "lora"):
        value = given.get(name)
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                yield f"--{name}", each if isinstance(each, Path) else named_path(each)[1]


def check_network(options: Any) -> None:
    """Check that options name one network, by folders that hold what is loaded.

    Raises:
        ValueError: If they do not.
    """
    pipeline, model, scheduler = options.pipeline, options.model, options.scheduler
    retrained = isinstance(options, ValidateMeasureOptions)  # of whole networks that stand there
    if not (retrained and pipeline is None and model is None) and (
        (pipeline is None) == (model is None) or (model is None) != (scheduler is None)
    ):
        raise ValueError(
            "Pass --pipeline FOLDER, or --model FOLDER and --scheduler FOLDER, as written by "
            "save_pretrained."
        )
    advice = "Pass a folder of save_pretrained as {}; nothing is downloaded."
    for option, path, check in (
        ("--pipeline", pipeline, partial(check_pipeline, variant=options.variant)),
        ("--model", model, partial(check_model, variant=options.variant)),
        ("--scheduler", scheduler, check_scheduler),
    ):
        if path is not None:
            check(check_exists(path, option, advice.format(option)))
    parts = ["model"] if pipeline is None else list(parts_of(pipeline))
    for text in options.lora or ():
        path = named_path(text)[1]
        check_exists(path, "--lora", "Pass the file or folder of an adapter as --lora.")
        if pipeline is not None or model is not None:
            check_adapter(path, parts)


def _check_images(path: Path, name: str) -> None:
    accepted = f"{ACCEPTED}, as --{name}."
    check_exists(path, f"--{name}", accepted)
    if path.is_file():
        if path.suffix.lower() in _NO_IMAGES:
            raise ValueError(f"'{path}' is in no known form. {accepted}")
        if path.stat().st_size == 0:
            raise ValueError(f"'{path}' is empty. {accepted}")
        _check_readable(path)
        return
    if (path / "model_index.json").is_file():
        raise ValueError(f"'{path}' is a pipeline, and --{name} takes images. {accepted}")
    if not any(_may_be_image(file) for file in files_below(path)):
        raise ValueError(f"'{path}' holds no images. {accepted}")


def _may_be_image(path: Path) -> bool:
    return path.name[0] != "." and path.suffix.lower() not in _NO_IMAGES | {""}


def _check_readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}.") from error


def _check_folder(path: Path, name: str, advice: str, header: str | None) -> None:
    check_exists(path, f"--{name}", advice)
    if not path.is_dir():
        raise ValueError(f"--{name} '{path}' is a file. {advice}")
    if header is not None and not (path / header).is_file():
        raise ValueError(f"'{path}' holds no {header}. {advice}")
    if not any(path.iterdir()):
        raise ValueError(f"'{path}' is empty. {advice}")


def _check_shards(path: Path, header: Any) -> None:
    """Check that the files are there that a file of an operator or of scores names."""
    listed = header.get("shards", []) if isinstance(header, dict) else []
    names = [entry["file"] if isinstance(entry, dict) else entry for entry in listed]
    missing = [name for name in names if not path.with_name(Path(name).name).is_file()]
    if missing:
        raise ValueError(
            f"'{path}' is of {len(names)} files, and {len(missing)} are not beside it: "
            f"'{missing[0]}' first. Copy them to the same folder."
        )


def _check_scores(path: Path) -> None:
    if path.suffix == ".npy":
        for needed in (path, path.with_suffix(".index.json")):
            if not needed.is_file():
                raise ValueError(f"There is no file '{needed}'. {SCORES.advice}")
        return
    _check_shards(path, SCORES.read_header(path))
