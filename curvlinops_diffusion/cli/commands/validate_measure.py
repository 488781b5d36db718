"""``validate measure``: the queries' values under retrained networks, on the same draws."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from curvlinops_diffusion.cli.checkpoints import checkpoint_of, going_on, remove
from curvlinops_diffusion.cli.events import event, say
from curvlinops_diffusion.cli.measured_files import MEASURED
from curvlinops_diffusion.cli.network import load_network
from curvlinops_diffusion.cli.options import ValidateMeasureOptions
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.validation.plans import RetrainingPlan
from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.preprocessing import Form
from curvlinops_diffusion.runtime.passes import PassOptions, computed_once

_SEED = re.compile(r"_seed(\d+)$")


def validate_measure(options: ValidateMeasureOptions) -> None:
    """Measure, network by network; what was measured before is kept.

    Raises:
        ValueError: If a network is missing, or cannot be loaded.
    """
    plan = RetrainingPlan.open(options.plan)
    found = networks_of(options.retrained, plan.parts)
    if options.dry_run:
        count = len(open_images(options.queries, Form(None, None, options.resolution)))
        samples = count * options.query_draws
        print(f"{len(found):,} networks, {samples:,} samples forward under each")
        return
    checkpoint = checkpoint_of(options.output)
    values, names, digests = [], [], []
    for seed in sorted({seed for seed, _ in found}):
        row = []
        for part in plan.parts:
            path = found[seed, part]
            label = f"{part}, seed {seed}"
            own = going_on(
                partial(_measured, options, path, label, checkpoint),
                checkpoint,
                options.overwrite,
            )
            row.append(own[0])
            names, digests = own[1], own[2]
            event("measured", part=part, seed=seed, mean=float(own[0].mean()))
        values.append(torch.stack(row))
    values_SMQ = torch.stack(values)
    header = {
        "parts": list(plan.parts),
        "plan": plan.digest,
        "queries": names,
        "digests": digests,
        "measurement": options.measurement,
        "query_draws": options.query_draws,
        "seed": options.seed,
    }
    MEASURED.write(options.output, {"values": values_SMQ}, header)
    remove(checkpoint)
    S, M, Q = values_SMQ.shape
    say(f"Wrote {options.output}: {Q} queries under {M} networks of {S} seeds")


def networks_of(folder: Path, parts: tuple[str, ...]) -> dict[tuple[int, str], Path]:
    """The files or folders of networks, by seed and part.

    Raises:
        ValueError: If a part has none, or not those of every seed.
    """
    found: dict[tuple[int, str], Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        name = path.name.removesuffix(".safetensors")
        match = None if name in parts else _SEED.search(name)
        seed, part = (0, name) if match is None else (int(match[1]), _SEED.sub("", name))
        if part in parts:
            if (seed, part) in found:
                raise ValueError(f"'{path}' and '{found[seed, part]}' are of one part and seed.")
            found[seed, part] = path
    seeds = sorted({seed for seed, _ in found}) or [0]
    missing = [(s, p) for s in seeds for p in parts if (s, p) not in found]
    if missing:
        some = ", ".join(f"{p} (seed {s})" for s, p in missing[:4])
        raise ValueError(
            f"'{folder}' has no network for {len(missing)} of {len(seeds) * len(parts)} parts and "
            f"seeds: {some}{', …' * (len(missing) > 4)}. Save each as '{folder}/{parts[0]}' or "
            f"'{folder}/{parts[0]}_seed0'."
        )
    return found


def _measured(
    options: ValidateMeasureOptions, path: Path, label: str, checkpoint: Path
) -> tuple[Tensor, list[str], list[str | None]]:
    """The values of one network ``[Q]``, and the queries' names and digests."""
    network = load_network(_of(options, path))
    images = open_images(options.queries, network.form(options.resolution), network.condition)
    query = NoisedRegression(
        network.objective,
        images,
        options.query_draws,
        options.seed,
        batch_size=options.batch_size,
        **options.regression_options(),
    )
    J = ExampleGradientLinearOperator(query, measurement=options.measurement)
    passes = PassOptions(checkpoint, progressbar=not options.quiet)
    measured = {"measurement": options.measurement}
    found = computed_once(label, query, lambda: {"values": J.values()}, passes, measured)
    return found["values"].cpu(), images.names, images.digests


def _of(options: ValidateMeasureOptions, path: Path) -> ValidateMeasureOptions:
    """The options with a retrained network: a pipeline, a model, or an adapter of the base.

    Raises:
        ValueError: If it is neither.
    """
    if (path / "model_index.json").is_file():
        return replace(options, pipeline=path, model=None, scheduler=None)
    if (path / "config.json").is_file():
        if options.scheduler is None:
            raise ValueError(f"'{path}' is a model alone: pass --scheduler FOLDER as well.")
        return replace(options, model=path, pipeline=None)
    if options.pipeline is None and options.model is None:
        raise ValueError(
            f"'{path}' holds neither a pipeline nor a model of diffusers. For adapters pass what "
            "they were trained on, by --pipeline FOLDER."
        )
    return replace(options, lora=[str(path)])
