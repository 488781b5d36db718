"""``validate plan``: on which parts of the training images networks are to be trained anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from curvlinops_diffusion.cli.events import event, say
from curvlinops_diffusion.cli.options import ValidatePlanOptions
from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS
from curvlinops_diffusion.influence.read_scores import read_scores, whole
from curvlinops_diffusion.influence.validation.plans import HEADER, Removal, RetrainingPlan
from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.named_images import NamedImages
from curvlinops_diffusion.loading.preprocessing import Form


def validate_plan(options: ValidatePlanOptions) -> None:
    """Write a plan, and a list of files for each part.

    Raises:
        ValueError: If something is missing, or there is a plan already.
    """
    if (options.output / HEADER).exists() and not options.overwrite:
        raise ValueError(
            f"'{options.output}' holds a plan, which networks may have been trained by. Pass "
            "another --output, or --overwrite."
        )
    images = open_images(options.data, Form(None, None, None))
    plan = _plan(options, images)
    plan.info["digests"] = images.source_digests()
    plan.save(options.output, images.names)
    event("planned", folder=str(options.output), parts=len(plan.parts), images=plan.num_data)
    say(
        f"Wrote {options.output}: {len(plan.parts)} parts of {plan.num_data:,} images. Train a "
        f"network on the images that each PART.txt lists, and save it as FOLDER/PART, several "
        "seeds as FOLDER/PART_seed0, FOLDER/PART_seed1, …"
    )


def _plan(options: ValidatePlanOptions, images: NamedImages) -> RetrainingPlan:
    N, seed = len(images), options.seed
    if options.kind == "subsets":
        return RetrainingPlan.random_subsets(N, options.num_parts, options.fraction, seed)
    if options.kind == "groups":
        labels: list[Any] | None = images.conditions.get("class_labels")
        if labels is None:
            raise ValueError(
                f"'{options.data}' has no classes to leave out. Put each group into a folder of "
                "its own, or give a 'label' for each image in metadata.jsonl."
            )
        numbers = torch.tensor([-1 if label is None else label for label in labels])
        names = None if images.classes is None else images.classes.order
        return RetrainingPlan.leave_one_group_out(numbers, names)
    if options.scores is None or not options.remove:
        raise ValueError("--kind removals needs --scores FILE and --remove N …")
    try:
        sizes = [int(size) for size in options.remove]
    except ValueError:
        raise ValueError(f"--remove {' '.join(options.remove)}: pass whole numbers.") from None
    assert options.scores is not None
    method = options.scores.stem
    if method.lower() in (Removal.NOTHING, Removal.CONTROL):
        raise ValueError(
            f"Parts are named after '{options.scores}', and controls are called "
            f"'{method.lower()}'. Rename the file."
        )
    scores, header = read_scores(options.scores)
    scored = header.get("sources")
    same = header["train"] == images.names
    if not same or (scored is not None and scored != images.source_digests()):
        raise ValueError(
            f"'{options.scores}' is of other training images than '{options.data}' holds. Pass "
            "those that were scored."
        )
    helpful = _sign_of_help(options.scores, header) * whole(scores)
    return RetrainingPlan.removals(helpful, sizes, method=method, seed=seed)


def _sign_of_help(path: Path, header: dict[str, Any]) -> int:
    """The sign that helpful images have in a file of scores; older files are of the loss.

    Raises:
        ValueError: If neither sign means helpful, or nothing is known of what was measured.
    """
    name = header["identity"].get("query", {}).get("measurement", "loss")
    signs = {known: entry.better.helpful_sign for known, entry in MEASUREMENTS.items()}
    if not signs.get(name):
        fit = ", ".join(known for known, sign in signs.items() if sign)
        raise ValueError(
            f"'{path}' has scores of {name}, of which neither sign means helpful, so that nothing "
            f"is most helpful by it. Pass scores of one of {fit}: score --measurement …"
        )
    return signs[name]
