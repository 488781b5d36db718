"""Paths that a command is given, checked before PyTorch and the network are loaded."""

from __future__ import annotations

import difflib
import os
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from curvlinops_diffusion.cli.options import flag
from curvlinops_diffusion.cli.running import say
from curvlinops_diffusion.influence.score_files import SCORES
from curvlinops_diffusion.linalg.operator_files import OPERATOR, read_header
from curvlinops_diffusion.loading.epochs import adapters_by_step
from curvlinops_diffusion.loading.folders import ACCEPTED, check_images
from curvlinops_diffusion.loading.hub import on_hub
from curvlinops_diffusion.loading.saved_networks import (
    check_adapter,
    check_model,
    check_pipeline,
    check_scheduler,
    configs_of,
    parts_of,
)
from curvlinops_diffusion.runtime.files import (
    check_can_be_made,
    check_can_be_written,
    kind_of,
    named_path,
)

# the suffixes and the kind of what a command writes
_OUTPUTS = {
    "fit": ((".safetensors",), OPERATOR.key),
    "score": ((".safetensors",), SCORES.key),
    "report": ((".html", ".csv", ".parquet"), None),
    "validate-check": ((".html", ".json"), None),
    "validate-measure": ((".safetensors",), "curvlinops_diffusion.measured"),
    "validate-judge": ((".html", ".json"), None),
}
# those of which a finished output is recognised, and not made again
_GOES_ON = ("fit", "score")
_FOLDERS = {
    "embedding": (
        "Pass the folder of a transformers image model, as save_pretrained writes it.",
        "config.json",
    ),
    "plan": ("Pass the folder that validate plan wrote.", "plan.safetensors"),
    "retrained": ("Pass the folder of the retrained networks.", None),
}


def check_paths(options: Namespace) -> None:
    """Check what a command reads and writes, as far as file names and headers tell.

    Args:
        options: The options of a command.

    Raises:
        ValueError: If a path does not exist, is of another kind or damaged, or cannot be written.
    """
    given = vars(options)
    if options.command in _OUTPUTS:
        _check_output(options.output, *_OUTPUTS[options.command], given)
        new = options.command in _GOES_ON or options.overwrite or not options.output.exists()
        if not new:
            raise ValueError(f"'{options.output}' exists. Pass --overwrite, or another --output.")
    if options.command in ("attribute", "validate-plan"):
        check_can_be_made(options.output, "--output")
    cache = given.get("latent_cache")
    if cache is not None and not cache.is_dir():  # a full one need not be written to
        check_can_be_made(cache, "--latent-cache")
    if "pipeline" in given:
        check_network(options)
        for path in given.get("checkpoints") or ():  # not after hours for the one before
            check_network(at_checkpoint(options, path))
    for name in ("data", "queries", "held_out"):
        if given.get(name) is not None:
            check_images(check_exists(given[name], flag(name), f"{ACCEPTED}, as {flag(name)}."))
    for name, (advice, header) in _FOLDERS.items():
        if given.get(name) is not None:
            _check_folder(given[name], name, advice, header)
    for name, path in _inputs(given):
        made = {"--operator": "fit", "--scores": "score", "--measured": "validate measure"}.get(
            name
        )
        if made is not None:
            check_exists(path, name, f"Make it by curvlinops-diffusion {made}.")
            if name != "--measured":
                _check_shards(
                    path, read_header(path) if made == "fit" else SCORES.read_header(path)
                )


def find_paths(options: Namespace) -> None:
    """Put paths in the place of ids on the Hub, and adapters in that of folders of several.

    Args:
        options: The options of a command, which are changed.

    Raises:
        ValueError: If something is neither on disk nor to be had.
    """
    given = vars(options)
    variant, config = given.get("variant"), given.get("pipeline_config")
    for name, check in (
        ("pipeline", partial(check_pipeline, variant=variant, config=config)),
        ("data", check_images),
    ):
        if given.get(name) is not None:
            kind: Any = name
            given[name] = on_hub(str(given[name]), kind, check, variant)
    latest, earlier = [], []
    for text in given.get("lora") or ():
        named, path = named_path(text)
        path, steps = _steps(str(path))
        taken = steps[-given.get("last", 1) :]
        if len(steps) > 1:
            others = ", ".join(f"'{step.name}'" for step in taken[:-1])
            also = f"with {others} as earlier checkpoints" if others else "the final one"
            say(f"Of {len(steps)} adapters in '{path}' took '{taken[-1].name}', {also}")
        latest.append(f"{named}={taken[-1]}" if named else str(taken[-1]))
        earlier += [str(step) for step in taken[:-1]]
    if given.get("lora"):
        given["lora"] = latest
        if "checkpoints" in given:
            own = [str(step) for text in given["checkpoints"] or () for step in _steps(text)[1]]
            given["checkpoints"] = [*(s for s in own if s not in latest), *earlier] or None
    if given.get("last", 1) > 1:
        if not earlier:
            raise ValueError(
                f"--last {given['last']} needs a folder of several adapters of one training as "
                "--lora. Pass that, or leave it out."
            )
        given["last"] = 1  # they are among the checkpoints now


def _steps(text: str) -> tuple[Path, list[Path]]:
    """An adapter's path, and the adapters of a training that it holds, the latest last."""
    path = on_hub(text, "adapter", _check_some_adapter)
    return path, adapters_by_step(path, None)


def _check_some_adapter(path: Path) -> None:
    if path.is_dir() and not any(path.rglob("*.safetensors")):
        raise ValueError(f"'{path}' holds no adapter")


def _check_output(
    path: Path, suffixes: tuple[str, ...], kind: str | None, given: dict[str, Any]
) -> None:
    """Check that a file can be written, and neither is read nor one of weights or another kind."""
    try:
        there = path.exists()
        for option, read in _inputs(given):
            if there and read.exists() and path.samefile(read):
                raise ValueError(f"--output {path} is what {option} reads. Pass another file.")
    except OSError as error:  # a name that is too long, say
        raise ValueError(f"--output {path} cannot be written: {error.strerror}.") from error
    if path.suffix not in suffixes:
        raise ValueError(f"--output {path} must end in {' or '.join(suffixes)}.")
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder. Pass the name of a file.")
    if not path.parent.is_dir():
        raise ValueError(f"The folder '{path.parent}' of --output does not exist. Create it first.")
    check_can_be_written(path, "--output")
    found = kind_of(path) if there and kind is not None else None
    if found not in (None, kind):
        what = found.rpartition(".")[2].replace("_", " ") if found else "weights"
        raise ValueError(
            f"--output {path} exists, and is a file of another kind ({what}). Pass another name; "
            "it is not replaced, --overwrite or not."
        )


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
    """Yield the paths that a command reads, each with its flag."""
    names = ("data", "queries", "held_out", "operator", "scores", "plan", "measured")
    for name in (*names, "model", "pipeline", "lora", "checkpoints"):
        value = given.get(name)
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                yield flag(name), each if isinstance(each, Path) else named_path(each)[1]


def check_network(options: Namespace) -> None:
    """Check that options name one network, by folders that hold what is loaded.

    Raises:
        ValueError: If they do not.
    """
    pipeline, model, scheduler = options.pipeline, options.model, options.scheduler
    retrained = options.command == "validate-measure"  # of whole networks that stand there
    if not (retrained and pipeline is None and model is None) and (
        (pipeline is None) == (model is None) or (model is None) != (scheduler is None)
    ):
        raise ValueError(
            "Pass --pipeline FOLDER, or --model FOLDER and --scheduler FOLDER, as save_pretrained "
            "writes them."
        )
    advice, config = "Pass a folder of save_pretrained as {}.", options.pipeline_config
    if config is not None:
        check_exists(config, "--pipeline-config", "Pass the folder of a pipeline's configs.")
    for option, path, check in (
        ("--pipeline", pipeline, partial(check_pipeline, variant=options.variant, config=config)),
        ("--model", model, partial(check_model, variant=options.variant)),
        ("--scheduler", scheduler, check_scheduler),
    ):
        if path is not None:
            check(check_exists(path, option, advice.format(option)))
    parts = ["model"] if pipeline is None else list(parts_of(configs_of(pipeline, config)))
    for text in options.lora or ():
        path = named_path(text)[1]
        check_exists(path, "--lora", "Pass the file or folder of an adapter as --lora.")
        if pipeline is not None or model is not None:
            check_adapter(path, parts)


def at_checkpoint(options: Namespace, path: str) -> Namespace:
    """The options with another checkpoint in place of the adapter, or of the network."""
    name, value = ("lora", [path]) if options.lora else ("pipeline", Path(path))
    return Namespace(**{**vars(options), name: value})


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
