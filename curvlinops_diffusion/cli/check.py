"""``validate check``: how far are scores to be trusted? In minutes, without training."""

from __future__ import annotations

from argparse import Namespace

from curvlinops_diffusion.cli.attribute import opened_attributor
from curvlinops_diffusion.cli.options import CHECK, SCORE, chosen
from curvlinops_diffusion.cli.running import event, is_first, say
from curvlinops_diffusion.runtime.passes import PassOptions
from curvlinops_diffusion.runtime.processes import Processes
from curvlinops_diffusion.validation.checking import SHUFFLED_DRAWS, check


def validate_check(options: Namespace) -> None:
    """Check an operator's scores, print what was found, and write it.

    Raises:
        ValueError: If something is missing or does not fit together.
    """
    # of the commands that run for hours
    long = {"sharded": False, "checkpoint_every": PassOptions.checkpoint_every}
    with opened_attributor(
        Namespace(**vars(options), **long, measurement="loss"), options.operator
    ) as attributor:
        arguments = chosen(options, CHECK) | chosen(options, SCORE)
        images, draws = attributor.regression.num_data, options.num_draws
        asked = 3 * min(options.num_queries, images)
        scored = (1 + options.shuffle_weights) * (images + asked) * draws
        fitted = options.shuffle_weights * images * SHUFFLED_DRAWS
        cost = f"{scored:,} samples forward and backward for scores, {fitted:,} for a curvature"
        if options.dry_run:
            if is_first():
                print(cost)
            return
        say(f"Checking: {cost}")
        found = check(attributor, **arguments)
        Processes.of_all().all_or_none(lambda: found.save(options.output) if is_first() else None)
    event("checked", file=str(options.output), **found.as_dict())
    if is_first():
        print(found)
    say(f"Wrote {options.output}")
