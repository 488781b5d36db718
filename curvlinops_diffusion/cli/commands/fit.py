"""``fit``: training images to an operator's file."""

from __future__ import annotations

from typing import Any

from curvlinops_diffusion.cli.checkpoints import checkpoint_of, going_on, nothing_to_do, remove
from curvlinops_diffusion.cli.commands.cost import fit_cost
from curvlinops_diffusion.cli.events import event, say
from curvlinops_diffusion.cli.network import Network, load_network, of_text_encoders
from curvlinops_diffusion.cli.options import FitOptions, in_bytes
from curvlinops_diffusion.cli.outputs import check_output_is_same
from curvlinops_diffusion.cli.processes import is_first, process_group, with_own_device
from curvlinops_diffusion.curvature.ekfac import DiffusionEKFACLinearOperator
from curvlinops_diffusion.curvature.kfac import DiffusionKFACLinearOperator
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.linalg.operator_files import read_header
from curvlinops_diffusion.loading.images import NamedImages, open_images
from curvlinops_diffusion.runtime.adapters import common_list
from curvlinops_diffusion.runtime.passes import PassOptions

_OPERATORS = {"kfac": DiffusionKFACLinearOperator, "ekfac": DiffusionEKFACLinearOperator}


def fit(options: FitOptions) -> None:
    """Fit an operator, and write it.

    Raises:
        ValueError: If something is missing or does not fit together.
    """
    with process_group(options.timeout) as several:
        network = load_network(with_own_device(options), of_text_encoders(options.params or ()))
        images = training_images(network, options)
        regression = training_regression(network, images, options)
        settings, params = options.kfac_options(), network.params
        if options.dry_run:
            cost = fit_cost(regression, params, options)  # by all, who may share a network
            if is_first():
                print(cost.text())
            return
        chosen = {} if params is None else {"params": common_list(params)}
        identity = regression.identity({"curvature": options.curvature, **settings, **chosen})
        checkpoint = checkpoint_of(options.output)
        if options.output.exists() and not options.overwrite:
            check_output_is_same(options.output, read_header(options.output)["info"], identity)
            nothing_to_do(options.output)
            return
        passes = PassOptions(
            checkpoint,
            options.checkpoint_every,
            distributed=several,
            sharded=several and options.sharded,
            max_memory=in_bytes(options.max_memory),
            progressbar=not options.quiet,
        )
        make = _OPERATORS[options.curvature]
        operator = going_on(
            lambda: make(regression, params, passes=passes, **settings),
            checkpoint,
            options.overwrite,
        )
        operator.info |= {"identity": identity, "images": images.summary()}
        num_blocks = sum(operator.processes.all_gather(len(operator.blocks)))
        if passes.sharded or is_first():
            operator.save(options.output)
        if not is_first():
            return
        remove(checkpoint)
        covered, left_out = operator.shape[0], operator.info.get("left_out", {})
        event("fitted", file=str(options.output), parameters=covered, left_out=left_out)
        say(f"Wrote {options.output}: {covered:,} parameters in {num_blocks} blocks")


def training_images(network: Network, options: Any) -> NamedImages:
    """The training images, for both ``fit`` and ``score``."""
    images = open_images(options.data, network.form(options.resolution), network.condition)
    if is_first():
        say(f"Read {images.summary()} from {options.data}")
    return images


def training_regression(
    network: Network, images: NamedImages, options: Any, antithetic: bool = False
) -> NoisedRegression:
    """The training images as a problem, likewise."""
    return NoisedRegression(
        network.objective,
        images,
        options.num_draws,
        options.seed,
        batch_size=options.batch_size,
        augment=options.augment,
        augmented_conditions=list(network.condition.images) or None,  # mirrored with the image
        antithetic=antithetic,
        **options.regression_options(),
    )
