"""``validate``: do scores predict what retrained networks do? Plan, measure, judge."""

from __future__ import annotations

import json
import re
import shutil
from argparse import Namespace
from functools import partial
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.cli.network import load_network
from curvlinops_diffusion.cli.options import LAYOUT, PLAN, REGRESSION, SIZING, chosen, picked
from curvlinops_diffusion.cli.running import event, say
from curvlinops_diffusion.diffusion.regression import OF_TRAINING, NoisedRegression
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS, Better
from curvlinops_diffusion.influence.score_files import helpful_sign
from curvlinops_diffusion.influence.stored_scores import StoredScores
from curvlinops_diffusion.influence.validation.judgements import (
    RemovalEffect,
    linear_datamodelling_score,
    removal_effects,
)
from curvlinops_diffusion.influence.validation.plans import HEADER, Removal, RetrainingPlan
from curvlinops_diffusion.loading.folders import write_part_folders
from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.layout import Layout
from curvlinops_diffusion.loading.named_images import NamedImages
from curvlinops_diffusion.loading.preprocessing import Form
from curvlinops_diffusion.page.figures import intervals
from curvlinops_diffusion.page.templates import number_text, rendered
from curvlinops_diffusion.runtime.checkpoints import OtherCheckpointError
from curvlinops_diffusion.runtime.files import FileKind, named_path, write_bytes
from curvlinops_diffusion.runtime.passes import PassOptions, computed_once

MEASURED = FileKind(
    "curvlinops_diffusion.measured",
    "measurements of retrained networks",
    "Make it by curvlinops-diffusion validate measure.",
)
_SEED = re.compile(r"_seed(\d+)$")


def validate_plan(options: Namespace) -> None:
    """Write a plan, and a list of files for each part.

    Raises:
        ValueError: If something is missing, or there is a plan already.
    """
    if (options.output / HEADER).exists() and not options.overwrite:
        raise ValueError(
            f"'{options.output}' holds a plan, which networks may have been trained by. Pass "
            "another --output, or --overwrite."
        )
    layout = Layout(**picked(options, LAYOUT))
    images = open_images(options.data, Form(None, None, None), layout=layout)
    plan = _plan(options, images)
    plan.info["digests"] = images.source_digests()
    if options.folders:
        of_parts = {
            part: [images.names[n] for n in kept.nonzero().flatten().tolist()]
            for part, kept in zip(plan.parts, ~plan.left_out, strict=True)
        }
        write_part_folders(options.data, layout, of_parts, options.output)
    plan.save(options.output, images.names)
    event("planned", folder=str(options.output), parts=len(plan.parts), images=plan.num_data)
    where = "folder PART holds" if options.folders else "PART.txt lists"
    say(
        f"Wrote {options.output}: {len(plan.parts)} parts of {plan.num_data:,} images. Train a "
        f"network on the images that each {where}, and save it as retrained/PART, several "
        "seeds as retrained/PART_seed0, retrained/PART_seed1, …"
    )
    named = f"--scores {options.scores}" if options.scores else None
    say(
        f"Then: curvlinops-diffusion validate measure --plan {options.output} "
        f"{named or '--pipeline PIPELINE --queries QUERIES'} --retrained retrained "
        "--output measured.safetensors"
    )


def _plan(options: Namespace, images: NamedImages) -> RetrainingPlan:
    kind = options.kind or ("subsets" if options.remove is None else "removals")
    if kind == "subsets":
        return RetrainingPlan.random_subsets(len(images), **chosen(options, PLAN))
    if kind == "groups":
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
    method = options.scores.stem
    if method.lower() in (Removal.NOTHING, Removal.CONTROL):
        raise ValueError(
            f"Parts are named after '{options.scores}', and those of controls are called "
            f"'{method.lower()}'. Rename the file."
        )
    try:
        sizes = [int(size) for size in options.remove]
    except ValueError:
        raise ValueError(f"--remove takes whole numbers, got {options.remove}.") from None
    scores = StoredScores.open(options.scores)
    header = scores.header
    scored = header.get("sources")
    same = header["train"] == images.names
    if not same or (scored is not None and scored != images.source_digests()):
        raise ValueError(
            f"'{options.scores}' is of other training images than '{options.data}' holds. Pass "
            "those that were scored."
        )
    name = header["identity"].get("query", {}).get("measurement", "loss")
    signs = {known: entry.better.helpful_sign for known, entry in MEASUREMENTS.items()}
    if not signs.get(name):
        fit = ", ".join(known for known, sign in signs.items() if sign)
        raise ValueError(
            f"'{options.scores}' has scores of {name}, of which neither sign means helpful, so "
            f"that nothing is most helpful by it. Pass scores of one of {fit}: score --measurement "
            "…"
        )
    helpful = helpful_sign(header) * scores.whole()
    return RetrainingPlan.removals(helpful, sizes, method=method, seed=options.seed)


def validate_measure(options: Namespace) -> None:
    """Measure, network by network; what was measured before is kept.

    Raises:
        ValueError: If a network is missing, or cannot be loaded.
    """
    plan = RetrainingPlan.open(options.plan)
    found = networks_of(options.retrained, plan.parts)
    if options.dry_run:
        count = len(open_images(options.queries, Form(None, None, **picked(options, SIZING))))
        samples = count * options.query_draws
        print(f"{len(found):,} networks, {samples:,} samples forward under each")
        return
    checkpoint = options.output.with_name(f"{options.output.name}.checkpoint")
    values, names, digests = [], [], []
    for seed in sorted({seed for seed, _ in found}):
        row = []
        for part in plan.parts:
            measuring = partial(
                measured,
                _of(options, found[seed, part]),
                f"{part}, seed {seed}",
                checkpoint,
                options.seed,
                options.query_draws,
            )
            try:
                values_Q, images = measuring()
            except OtherCheckpointError:
                if not options.overwrite:
                    raise
                shutil.rmtree(checkpoint)
                values_Q, images = measuring()
            row.append(values_Q)
            names, digests = images.names, images.digests
            event("measured", part=part, seed=seed, mean=float(values_Q.mean()))
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
    shutil.rmtree(checkpoint, ignore_errors=True)
    S, M, Q = values_SMQ.shape
    say(f"Wrote {options.output}: {Q} queries under {M} networks of {S} seeds")
    say(
        f"Then: curvlinops-diffusion validate judge --plan {options.plan} --measured "
        f"{options.output} --scores {options.scores or 'scores.safetensors'} --output judged.html"
    )


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


def measured(
    options: Namespace, label: str, checkpoint: Path, seed: int = 12345, query_draws: int = 64
) -> tuple[Tensor, NamedImages]:
    """The values of one network ``[Q]``, and the queries; on draws that scores do not have.

    Args:
        options: The options, with the network's.
        label: What it is called in the checkpoint.
        checkpoint: A folder that values are kept in.
        seed: The seed of the draws.
        query_draws: Draws of timestep and noise for each query.
    """
    network = load_network(options)
    layout = Layout(**picked(options, LAYOUT)).for_queries()
    form = network.form(**picked(options, SIZING))
    images = open_images(options.queries, form, network.condition, layout=layout)
    recipe = {k: v for k, v in chosen(options, REGRESSION).items() if k not in OF_TRAINING}
    query = NoisedRegression(
        network.objective,
        images,
        query_draws,
        seed,
        batch_size=options.batch_size,
        **recipe,
    )
    J = ExampleGradientLinearOperator(query, measurement=options.measurement)
    passes = PassOptions(checkpoint, progressbar=not options.quiet)
    of = {"measurement": options.measurement}
    found = computed_once(label, query, lambda: {"values": J.values()}, passes, of)
    return found["values"].cpu(), images


def _of(options: Namespace, path: Path) -> Namespace:
    """The options with a retrained network: a pipeline, a model, or an adapter of the base."""
    changed: dict[str, Any] = {"lora": [str(path)]}
    if (path / "model_index.json").is_file():
        changed = {"pipeline": path, "model": None, "scheduler": None}
    elif (path / "config.json").is_file():
        if options.scheduler is None:
            raise ValueError(f"'{path}' is a model alone: pass --scheduler FOLDER as well.")
        changed = {"model": path, "pipeline": None}
    elif options.pipeline is None and options.model is None:
        raise ValueError(
            f"'{path}' holds neither a pipeline nor a model of diffusers. For adapters pass what "
            "they were trained on, by --pipeline FOLDER."
        )
    return Namespace(**(vars(options) | changed))


def read_measured(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Values ``[S, M, Q]``, and what they are of.

    Raises:
        ValueError: If the file is missing, damaged, or of something else.
    """
    header, tensors = MEASURED.read(path)
    try:
        values_SMQ, sizes = tensors["values"], (len(header["parts"]), len(header["queries"]))
    except (KeyError, TypeError) as error:
        raise MEASURED.damaged(path, f"{type(error).__name__}: {error}") from error
    if values_SMQ.ndim != 3 or tuple(values_SMQ.shape[1:]) != sizes:
        raise MEASURED.damaged(path, f"values {tuple(values_SMQ.shape)} of {sizes} names")
    return values_SMQ, header


def validate_judge(options: Namespace) -> None:
    """Judge scores, and write a page or a file of numbers.

    Raises:
        ValueError: If scores, plan and measurements do not belong together.
    """
    plan = RetrainingPlan.open(options.plan)
    values_SMQ, header = read_measured(options.measured)
    if header["plan"] != plan.digest or header["parts"] != list(plan.parts):
        raise ValueError(
            f"'{options.measured}' was measured by another plan than '{options.plan}'. Pass the "
            "plan by which networks were trained."
        )
    found: dict[str, Any] = {
        "measurement": header["measurement"],
        "plan": plan.kind,
        "parts": len(plan.parts),
        "seeds": len(values_SMQ),
        "queries": len(header["queries"]),
        "training_images": plan.num_data,
    }
    if plan.kind == "removals":
        effects = removal_effects(plan.parts, values_SMQ, plan.info["method"])
        found["removals"] = [
            {"removed": k, **vars(effect), "verdict": _verdict_of_removal(effect)}
            for k, effect in effects.items()
        ]
    else:
        scores = _named_scores(options.scores or [], plan, header)
        found |= _scored(plan, values_SMQ, scores, options.bootstrap)
    found = _plain(found)
    text = json.dumps(found, indent=1) if options.output.suffix == ".json" else _page(found)
    write_bytes(options.output, text.encode())
    event("judged", file=str(options.output), **found)
    for line in _lines(found):
        say(line)
    say(f"Wrote {options.output}")


def _named_scores(
    words: list[str], plan: RetrainingPlan, header: dict[str, Any]
) -> dict[str, Tensor]:
    """Scores by their names ``[Q, N]``, of the sign of what was measured; of all methods of a file.

    Raises:
        ValueError: If they are of other queries or training images, or two have one name.
    """
    if not words:
        raise ValueError("Pass the scores to judge: --scores FILE …, each perhaps as NAME=FILE.")
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    better, names = MEASUREMENTS[header["measurement"]].better, plan.info.get("names")
    for word in words:
        named, path = named_path(word)
        name, scores = named or path.stem, StoredScores.open(path)
        own = scores.header
        if own["queries"] != header["queries"] or names not in (None, own["train"]):
            raise ValueError(
                f"'{path}' is of other queries than '{header['queries'][0]}', …, or of other "
                "training images than the plan. Score the same images as were planned and measured."
            )
        if name in taken:
            raise ValueError(f"Two --scores are called '{name}'. Pass them as NAME=FILE.")
        taken.add(name)
        digests = own.get("digests", {}).get("queries")
        if digests is not None and digests != header["digests"]:
            raise ValueError(f"'{path}' is of queries of the same names, but other images.")
        planned, scored = plan.info.get("digests"), own.get("sources")
        if None not in (planned, scored) and planned != scored:
            raise ValueError(
                f"'{path}' is of training images of the same names as the plan's, but other images."
            )
        of = MEASUREMENTS.get(own["identity"].get("query", {}).get("measurement", ""))
        # a log-likelihood falls where a loss rises
        opposite = of is not None and (of.better is Better.HIGHER) != (better is Better.HIGHER)
        for method, stored in scores.by_method.items():
            scores_QN = stored.whole()
            if count := int((~scores_QN.isfinite()).sum()):
                raise ValueError(
                    f"'{path}' has {count} scores that are not finite. Pass scores that are."
                )
            own_name = f"{name}, {method}" if len(scores.by_method) > 1 else name
            found[own_name] = -scores_QN if opposite else scores_QN
    return found


def _scored(
    plan: RetrainingPlan, values_SMQ: Tensor, scores: dict[str, Tensor], bootstrap: int
) -> dict[str, Any]:
    judged = {
        name: linear_datamodelling_score(scores_QN, plan.left_out, values_SMQ, bootstrap=bootstrap)
        for name, scores_QN in scores.items()
    }
    first, *_ = judged.values()
    rows = []
    for name, one in judged.items():
        row: dict[str, Any] = {"method": name, "lds": one.mean, "interval": list(one.interval)}
        if one is not first:
            difference, interval = one.minus(first)
            row["minus_first"] = {"difference": difference, "interval": list(interval)}
        row["verdict"] = verdict(one.mean, one.interval, one.ceiling, len(plan.parts))
        rows.append(row | {"per_query": one.per_query.tolist()})
    return {"agreement": first.agreement, "ceiling": first.ceiling, "methods": rows}


def verdict(lds: float, interval: tuple[float, float], ceiling: float | None, parts: int) -> str:
    """Say in a sentence what a linear data-modelling score and its 95 % interval mean."""
    low, high = interval
    if not all(map(isfinite, (lds, low, high))):
        return "Undefined: scores or measurements of all parts are alike."
    if low > 0:
        share = "" if ceiling is None else f", {lds / ceiling:.0%} of what training's noise allows"
        return f"Predicts retraining better than chance{share}."
    if high < 0:
        return "Predicts the opposite of what retraining does: look at the sign of what was scored."
    # an interval is as wide as 1/√parts; of an LDS of zero no number of them tells
    wanted = ceil(parts * ((high - low) / 2 / abs(lds)) ** 2) if lds else 0
    more = wanted - parts
    if not 0 < more <= 100 * parts:
        return "Not told from chance."
    return f"Not told from chance: if it is {lds:.2f}, about {more} more parts would show it."


def _verdict_of_removal(effect: RemovalEffect) -> str | None:
    """Say in a sentence whether images matter more than random ones, beyond twice the error."""
    if effect.control is None or effect.error is None:
        return None
    more = effect.change - effect.control
    if abs(more) <= 2 * effect.error:
        return "Not told from random images: train more seeds, or remove more."
    return "Matter more than random images." if more > 0 else "Matter less than random images."


def _plain(value: Any) -> Any:
    """Plain values with ``None`` in place of undefined numbers, which JSON has not."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _lines(found: dict[str, Any]) -> list[str]:
    """Say what was found, for people."""
    quantity = MEASUREMENTS[found["measurement"]].quantity
    if "removals" in found:
        return [
            f"Without the {row['removed']} most helpful images the {quantity} changes by "
            f"{row['change']:+.1%}"
            + ("" if row["error"] is None else f" ± {row['error']:.1%}")
            + ("" if row["control"] is None else f"; without random ones {row['control']:+.1%}")
            + ("" if row["verdict"] is None else f". {row['verdict']}")
            for row in found["removals"]
        ]
    lines = []
    for row in found["methods"]:
        low, high = (number_text(end, ".3f") for end in row["interval"])
        lds = number_text(row["lds"], ".3f")
        line = f"{row['method']}: LDS of the {quantity} {lds} [{low}, {high}]"
        if "minus_first" in row:
            minus = row["minus_first"]
            low, high = (number_text(end, "+.3f") for end in minus["interval"])
            line += f", {number_text(minus['difference'], '+.3f')} [{low}, {high}] to the first"
        undefined = sum(score is None for score in row["per_query"])
        if undefined:
            line += f"; undefined for {undefined} of {found['queries']} queries, left out"
        lines.append(f"{line}. {row['verdict']}")
    if found["ceiling"] is not None:
        lines.append(
            f"Two seeds agree by {found['agreement']:.2f}; a perfect predictor would have "
            f"{found['ceiling']:.2f}"
        )
    return lines


def _page(found: dict[str, Any]) -> str:
    rows = [row for row in found.get("methods", ()) if row["lds"] is not None]
    bars = [(row["method"], row["lds"], *row["interval"]) for row in rows]
    figure = intervals(bars, found["ceiling"]) if "methods" in found else None
    quantity = MEASUREMENTS[found["measurement"]].quantity
    return rendered("validation", figure=figure, quantity=quantity, **found)
