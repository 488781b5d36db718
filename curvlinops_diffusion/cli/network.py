"""The trained network: a pipeline, or a model and its scheduler, from folders on this machine."""

from __future__ import annotations

import inspect
import json
import logging
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import is_transformers_available
from diffusers.utils import logging as diffusers_logging

from curvlinops_diffusion.cli.decided import parse_arguments
from curvlinops_diffusion.cli.paths import check_network
from curvlinops_diffusion.cli.running import event, num_processes, say
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.weightings import weighting_of
from curvlinops_diffusion.loading.adapters import load_adapters, names_in, networks_of
from curvlinops_diffusion.loading.network import TEXT_ENCODERS, Network
from curvlinops_diffusion.loading.saved_networks import configs_of, part_folder, parts_of
from curvlinops_diffusion.loading.weights import check_can_load, check_loaded, misfits
from curvlinops_diffusion.runtime.checks import quoted
from curvlinops_diffusion.runtime.sharded_networks import divide


def load_network(options: Namespace, covered: Sequence[str] = ()) -> Network:
    """Load what the options name; weights only from safetensors files.

    Args:
        options: The options of a command.
        covered: Names or patterns of parameters that are covered: text encoders are part of the
            network where they begin with theirs.

    Raises:
        ValueError: If they name no network, or it cannot be loaded; or if a condition was dropped
            that it does not take.
    """
    _set_up_logs(options.quiet)
    objective_options: dict[str, Any] = {
        "weighting": weighting_of(options.weighting, options.snr_gamma),
        "reduction": options.reduction,
        "autocast": None if options.autocast is None else getattr(torch, options.autocast),
    }
    arguments = parse_arguments(options.training_arguments)
    check_network(options)
    device = options.device or "cpu"
    if options.device is None and torch.cuda.is_available():
        device = f"cuda:{torch.cuda.current_device()}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} is not to be had here: {quoted(error)}.") from error
    check_can_load()
    if options.pipeline is not None:
        objective_options["text_encoders"] = any(n.startswith(TEXT_ENCODERS) for n in covered)
    load = _of_model if options.pipeline is None else _of_pipeline
    objective, pipeline, trained = load(options, arguments, device, objective_options)
    patterns = getattr(options, "params", None)  # score takes those of the operator
    network = Network.of(objective, pipeline, patterns, trained)
    return network.with_prompt(options.prompt)  # for queries as well as training images


# an objective, the pipeline that it is of, and the parameters that adapters' files hold
_Loaded = tuple[DenoisingObjective, Any, list[str] | None]


def _of_pipeline(
    options: Namespace, arguments: Mapping[str, Any], device: str, objective_options: dict[str, Any]
) -> _Loaded:
    configs = configs_of(options.pipeline, options.pipeline_config)
    # the parts that it was saved without, a text encoder say, which loading asks for
    left_out = {name: None for name, kind in parts_of(configs).items() if kind is None}
    if options.pipeline.is_file():
        pipeline = _of_single_file(options, configs, left_out)
    else:
        pipeline = _loaded(diffusers.DiffusionPipeline, options.pipeline, options, **left_out)
    modules = networks_of(pipeline)
    for name, part in modules.items():
        check_loaded(part, part_folder(options.pipeline, name), options.variant)
    trained = load_adapters(options.lora, modules, pipeline) if options.lora else {}
    if options.shard_network:
        _divide(next(iter(modules.values())), device)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    for part in modules.values():
        part.eval()
    objective = DenoisingObjective.from_pipeline(
        pipeline,
        latent_cache=options.latent_cache,
        condition_dropout=options.condition_dropout,
        training_arguments=arguments,
        **objective_options,
    )
    if objective.training_arguments:
        event("training arguments", **objective.training_arguments)
        say(arguments_text(objective.training_arguments))
    names = names_in(objective.model, modules, trained) if options.lora else None
    return objective, pipeline, names


def _of_model(
    options: Namespace, arguments: Mapping[str, Any], device: str, objective_options: dict[str, Any]
) -> _Loaded:
    model = _loaded(diffusers.AutoModel, options.model, options)
    check_loaded(model, options.model, options.variant)
    trained = load_adapters(options.lora, {"model": model}, None) if options.lora else {}
    embedded = inspect.signature(model.forward).parameters.get("encoder_hidden_states")
    if embedded is not None and embedded.default is embedded.empty:
        raise ValueError(
            f"The network of '{options.model}' takes embeddings of prompts. Pass --pipeline FOLDER "
            "with its text encoder."
        )
    if options.condition_dropout > 0 or arguments:
        name = "--training-arguments" if arguments else "--condition-dropout"
        raise ValueError(
            f"{name} needs a pipeline, which says how its network is given conditions, got --model "
            f"'{options.model}'. Pass --pipeline FOLDER instead."
        )
    scheduler = _scheduler(options.scheduler)
    if options.shard_network:
        _divide(model, device)
    objective = DenoisingObjective(model.to(device).eval(), scheduler, **objective_options)
    names = names_in(objective.model, {"model": model}, trained) if options.lora else None
    return objective, None, names


def arguments_text(arguments: Mapping[str, Any]) -> str:
    """A line for people, which can be passed to the program as it is."""
    pairs = (f"{name}={json.dumps(value)}" for name, value in arguments.items())
    return "Training gave the network " + " ".join(pairs)


def _divide(model: torch.nn.Module, device: str) -> None:
    """Divide the denoiser among processes."""
    if num_processes() == 1:
        raise ValueError(
            "--shard-network needs several processes, got one. Start them by torchrun "
            "--nproc-per-node=N -m curvlinops_diffusion …"
        )
    divide(model, torch.device(device))


def _set_up_logs(quiet: bool) -> None:
    """Show loading bars unless ``quiet``; of wrong weights the program itself tells."""
    diffusers_logging.set_verbosity(logging.CRITICAL)
    libraries = [diffusers_logging]
    if is_transformers_available():
        from transformers.utils import logging as transformers_logging

        libraries.append(transformers_logging)
    if quiet:  # not imported before there are data of it
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for library in libraries:
        (library.disable_progress_bar if quiet else library.enable_progress_bar)()


def _of_single_file(options: Namespace, configs: Path, left_out: Mapping[str, None]) -> Any:
    """A pipeline of a single file, by diffusers' own loader and a folder that describes it."""
    name = json.loads((configs / "model_index.json").read_text())["_class_name"]
    load = getattr(getattr(diffusers, str(name), None), "from_single_file", None)
    if load is None:
        raise ValueError(
            f"'{options.pipeline}' is of a {name}, by '{configs}', which diffusers does not load "
            "from a single file. Pass a folder of save_pretrained as --pipeline."
        )
    try:
        return load(
            str(options.pipeline),
            config=str(configs),
            local_files_only=True,
            torch_dtype=_dtype(options),
            **left_out,
        )
    except Exception as error:
        told = quoted(error)
        if "meta tensor" in told:  # as torch calls parameters that nothing was loaded into
            told = "it lacks some of the weights."
        raise ValueError(
            f"'{options.pipeline}' cannot be loaded as '{configs}' describes it: {told} Pass "
            "--pipeline-config with a pipeline of the same kind."
        ) from error


def _dtype(options: Namespace) -> torch.dtype:
    found: torch.dtype = getattr(torch, options.dtype or "", torch.get_default_dtype())
    return found


def _loaded(cls: Any, folder: Path, options: Namespace, **parts: None) -> Any:
    try:
        return cls.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=_dtype(options),
            variant=options.variant,
            **parts,
        )
    except Exception as error:
        reasons = misfits(folder, options.variant)
        if reasons:
            raise ValueError(
                f"'{folder}' cannot be loaded: {'; '.join(reasons)}. Copy configuration and "
                "weights of one and the same save_pretrained."
            ) from error
        raise ValueError(f"'{folder}' cannot be loaded: {quoted(error)}") from error


def _scheduler(folder: Path) -> Any:
    path = folder / "scheduler_config.json"
    try:
        cls = getattr(diffusers, json.loads(path.read_text())["_class_name"])
        if not issubclass(cls, diffusers.SchedulerMixin):
            raise TypeError(f"{cls.__name__} is none")
        return cls.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"'{folder}' holds no scheduler of diffusers: {quoted(error).rstrip('.')}. Pass a "
            "folder with scheduler_config.json."
        ) from error
