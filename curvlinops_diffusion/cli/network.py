"""The trained network: a pipeline, or a model and its scheduler, from folders on this machine."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import is_transformers_available
from diffusers.utils import logging as diffusers_logging

from curvlinops_diffusion.cli.events import event, say
from curvlinops_diffusion.cli.options import FitOptions, ScoreOptions, ValidateMeasureOptions
from curvlinops_diffusion.cli.paths import check_network
from curvlinops_diffusion.cli.processes import is_first, num_processes
from curvlinops_diffusion.cli.training_arguments import arguments_text, parse_arguments
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.loading.adapters import load_adapters, names_in
from curvlinops_diffusion.loading.misfits import misfits
from curvlinops_diffusion.loading.network import TEXT_ENCODERS, Network
from curvlinops_diffusion.loading.saved_networks import part_folder, parts_of
from curvlinops_diffusion.loading.weights import check_can_load, check_loaded
from curvlinops_diffusion.runtime.checks import quoted
from curvlinops_diffusion.runtime.sharded_networks import divide

NetworkOptions = FitOptions | ScoreOptions | ValidateMeasureOptions


def load_network(options: NetworkOptions, text_encoders: bool = False) -> Network:
    """Load what the options name; weights only from safetensors files.

    Args:
        options: The options.
        text_encoders: Whether text encoders are part of the network.

    Raises:
        ValueError: If they name no network, or it cannot be loaded; or if a condition was dropped
            that it does not take.
    """
    _set_up_logs(options.quiet)
    objective_options = options.objective_options()
    arguments = parse_arguments(options.training_arguments)
    check_network(options)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} is not to be had here: {quoted(error)}.") from error
    check_can_load()
    autocast = None if options.autocast is None else getattr(torch, options.autocast)
    if options.pipeline is not None:
        # the parts that it was saved without, a text encoder say, which loading asks for
        left_out = {n: None for n, kind in parts_of(options.pipeline).items() if kind is None}
        pipeline = _loaded(diffusers.DiffusionPipeline, options.pipeline, options, **left_out)
        modules = _modules(pipeline)
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
            autocast=autocast,
            text_encoders=text_encoders,
            training_arguments=arguments,
            **objective_options,
        )
        if objective.training_arguments and is_first():
            event("training arguments", **objective.training_arguments)
            say(arguments_text(objective.training_arguments))
        return _network(objective, pipeline, options, modules, trained)
    assert options.model is not None
    assert options.scheduler is not None
    model = _loaded(diffusers.AutoModel, options.model, options)
    check_loaded(model, options.model, options.variant)
    modules = {"model": model}
    trained = load_adapters(options.lora, modules, None) if options.lora else {}
    embedded = inspect.signature(model.forward).parameters.get("encoder_hidden_states")
    if embedded is not None and embedded.default is embedded.empty:
        raise ValueError(
            f"The network of '{options.model}' takes embeddings of prompts. Pass --pipeline FOLDER "
            "with its text encoder."
        )
    if options.condition_dropout > 0:
        raise ValueError(
            f"--condition-dropout {options.condition_dropout} arrived with --model, which does not "
            "say what a dropped condition is replaced by. Pass --pipeline FOLDER."
        )
    if arguments:
        raise ValueError(
            f"--training-arguments {' '.join(arguments)} got no pipeline whose network could be "
            "given them. Pass --pipeline FOLDER instead of --model."
        )
    scheduler = _scheduler(options.scheduler)
    if options.shard_network:
        _divide(model, device)
    objective = DenoisingObjective(
        model.to(device).eval(), scheduler, autocast=autocast, **objective_options
    )
    return _network(objective, None, options, modules, trained)


def _divide(model: torch.nn.Module, device: str) -> None:
    """Divide the denoiser among processes.

    Raises:
        ValueError: If there is only one.
    """
    if num_processes() == 1:
        raise ValueError(
            "--shard-network arrived in a process on its own. Start several: torchrun "
            "--nproc-per-node=N -m curvlinops_diffusion ..."
        )
    divide(model, torch.device(device))


def _set_up_logs(quiet: bool) -> None:
    """Bars of loading unless told to be quiet; no warnings of weights, which are checked here."""
    diffusers_logging.set_verbosity_error()
    libraries = [diffusers_logging]
    if is_transformers_available():
        from transformers.utils import logging as transformers_logging

        libraries.append(transformers_logging)
    for library in libraries:
        (library.disable_progress_bar if quiet else library.enable_progress_bar)()


def _modules(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The networks of a pipeline by their names there, the denoiser first."""
    found = {
        name: part
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    return dict(sorted(found.items(), key=lambda item: item[0] not in ("unet", "transformer")))


def _network(
    objective: DenoisingObjective,
    pipeline: Any,
    options: NetworkOptions,
    modules: Mapping[str, torch.nn.Module],
    trained: Mapping[str, list[str]],
) -> Network:
    """Read off network and autoencoder which images and conditions they take.

    Raises:
        ValueError: If there is a prompt, and they take none.
    """
    names = names_in(objective.model, modules, trained) if options.lora else None
    patterns = getattr(options, "params", None)  # score takes those of the operator
    return Network.of(objective, pipeline, patterns, names).with_prompt(options.prompt)


def of_text_encoders(names: Iterable[str]) -> bool:
    """Whether names or patterns of parameters are of text encoders, too."""
    return any(name.startswith(TEXT_ENCODERS) for name in names)


def _loaded(cls: Any, folder: Path, options: NetworkOptions, **parts: None) -> Any:
    try:
        return cls.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=getattr(torch, options.dtype),
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
