"""``fit``: training images to an operator's file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from curvlinops_diffusion.cli.cost import FitCost
from curvlinops_diffusion.cli.events import event, say
from curvlinops_diffusion.cli.images import open_images
from curvlinops_diffusion.cli.network import Network, load_network
from curvlinops_diffusion.cli.options import FitOptions
from curvlinops_diffusion.cli.processes import is_first, process_group, with_own_device
from curvlinops_diffusion.identity import differences, identity_of
from curvlinops_diffusion.operators.ekfac import DiffusionEKFACLinearOperator
from curvlinops_diffusion.operators.kfac import DiffusionKFACLinearOperator
from curvlinops_diffusion.passes import PassOptions
from curvlinops_diffusion.regression import NoisedRegression
from curvlinops_diffusion.storage import read_header

_OPERATORS = {"kfac": DiffusionKFACLinearOperator, "ekfac": DiffusionEKFACLinearOperator}


def fit(options: FitOptions) -> None:
    """Fit an operator, and write it.

    Raises:
        ValueError: If something is missing or does not fit together.
    """
    check_output(options.output, (".safetensors",))
    with process_group(options.timeout) as several:
        network = load_network(with_own_device(options))
        regression = training_regression(network, options)
        settings: dict[str, Any] = {
            "fisher_type": options.fisher_type,
            "mc_samples": options.mc_samples,
            "kfac_approx": options.kfac_approx,
        }
        if options.curvature == "ekfac":
            settings["gradient_group"] = options.gradient_group
        if options.dry_run:
            if is_first():
                print(FitCost.of(regression, options).text())
            return
        identity = identity_of(regression, {"curvature": options.curvature, **settings})
        if options.output.exists() and not options.overwrite:
            if _same(options.output, identity):
                say(f"'{options.output}' was made with the same options; nothing to do")
            return
        checkpoint = checkpoint_of(options.output)
        passes = PassOptions(
            checkpoint, options.checkpoint_every, distributed=several, progressbar=not options.quiet
        )
        operator = _OPERATORS[options.curvature](regression, passes=passes, **settings)
        if not is_first():
            return
        operator.info["identity"] = identity
        operator.save(options.output)
        shutil.rmtree(checkpoint)
        covered, left_out = operator.shape[0], operator.info.get("left_out", {})
        event("fitted", file=str(options.output), parameters=covered, left_out=left_out)
        say(f"Wrote {options.output}: {covered:,} parameters in {len(operator.blocks)} blocks")


def training_regression(
    network: Network, options: Any, antithetic: bool = False
) -> NoisedRegression:
    """The training images as a problem, for both ``fit`` and ``score``."""
    images = open_images(options.data, network.form(options.resolution), network.conditioned)
    return NoisedRegression(
        network.objective,
        images,
        options.num_draws,
        options.seed,
        batch_size=options.batch_size,
        augment=options.augment,
        antithetic=antithetic,
    )


def checkpoint_of(output: Path) -> Path:
    """The folder in which a command writes down how far it has come."""
    return output.with_name(f"{output.name}.checkpoint")


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Check, before anything is computed, that a file can be written.

    Raises:
        ValueError: If it has another suffix, or its folder does not exist.
    """
    if path.suffix not in suffixes:
        raise ValueError(f"--output {path} must end in {' or '.join(suffixes)}.")
    if not path.parent.is_dir():
        raise ValueError(f"The folder '{path.parent}' of --output does not exist. Create it first.")


def _same(path: Path, identity: dict[str, Any]) -> bool:
    there = read_header(path)["info"].get("identity", {})
    different = differences(there, identity)
    if different:
        raise ValueError(
            f"'{path}' exists, and was made with others: {'; '.join(different[:5])}. Pass "
            "--overwrite, or another --output."
        )
    return True
