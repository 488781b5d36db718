"""``score``: an operator, training images and queries to scores."""

from __future__ import annotations

import io
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlinops_diffusion.cli.checkpoints import checkpoint_of, going_on, remove
from curvlinops_diffusion.cli.commands.cost import score_cost
from curvlinops_diffusion.cli.commands.fit import (
    check_output,
    check_same,
    nothing_to_do,
    training_images,
    training_regression,
)
from curvlinops_diffusion.cli.events import event, say
from curvlinops_diffusion.cli.images.images import open_images
from curvlinops_diffusion.cli.network import load_network
from curvlinops_diffusion.cli.options import ScoreOptions
from curvlinops_diffusion.cli.processes import is_first, process_group, with_own_device
from curvlinops_diffusion.curvature.load import load_operator
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.scores import influence_scores
from curvlinops_diffusion.runtime.files import FileKind, differences, write_bytes
from curvlinops_diffusion.runtime.passes import PassOptions

SCORES = FileKind(
    "curvlinops_diffusion.scores",
    "influence scores",
    "Make it by curvlinops-diffusion score.",
)


# what of a regression's description fit and score must share
_OBJECTIVE = ("prediction_type", "reduction", "num_levels", "process", "weighting", "encoder")


def score(options: ScoreOptions) -> None:
    """Score every training image for every query, and write the scores.

    Raises:
        ValueError: If something is missing or does not fit together.
    """
    check_output(options.output, (".safetensors", ".npy"))
    with process_group(options.timeout) as several:
        network = load_network(with_own_device(options))
        known = training_images(network, options)
        train = training_regression(network, known, options, in_pairs(options.num_draws))
        form = network.form(options.resolution)
        images = open_images(options.queries, form, network.condition, known)
        query = NoisedRegression(
            network.objective,
            images,
            options.query_draws,
            options.seed + 1,
            batch_size=options.batch_size,
            antithetic=in_pairs(options.query_draws),
        )
        operator = load_operator(options.operator, network.objective.model)
        _check_same_objective(options, operator.info, train)
        if not options.other_data:
            _check_same_images(options, operator.info, train)
        if options.dry_run:
            if is_first():
                print(score_cost(train, query, operator, options).text())
            return
        measured = {"measurement": options.measurement, "damping": options.damping}
        identity = {
            "train": train.identity({}),
            "query": query.identity(measured),
            "operator": json.loads(json.dumps(operator.info)),
        }
        if options.output.exists() and not options.overwrite:
            header, scores_QN = _read(options.output)
            check_same(options.output, header, identity)
            if scores_QN is not None:
                nothing_to_do(options.output)
                return
        checkpoint = checkpoint_of(options.output)
        passes = PassOptions(
            checkpoint, options.checkpoint_every, distributed=several, progressbar=not options.quiet
        )
        J_train = ExampleGradientLinearOperator(train, operator.param_names)
        J_query = ExampleGradientLinearOperator(
            query, operator.param_names, measurement=options.measurement
        )
        inverse, block = operator.inverse(options.damping), options.query_block
        scores_QN = going_on(
            lambda: influence_scores(J_query, inverse, J_train, query_block=block, passes=passes),
            checkpoint,
            options.overwrite,
        )
        if not is_first():
            return
        names = {"train": known.names, "queries": images.names}
        write_scores(options.output, scores_QN, names, identity)
        remove(checkpoint)
        Q, N = scores_QN.shape
        event("scored", file=str(options.output), queries=Q, training_images=N)
        say(f"Wrote {options.output}: {Q} queries × {N} training images")


def in_pairs(num_draws: int) -> bool:
    """Whether so many draws are made antithetic pairs, which gradients gain by."""
    return num_draws % 2 == 0


def write_scores(
    path: Path, scores_QN: Tensor, names: dict[str, list[str]], identity: dict[str, Any]
) -> None:
    """Write scores with the names of queries and training images.

    Raises:
        ValueError: If the file cannot be written.
    """
    header = {**names, "identity": identity}
    scores_QN = scores_QN.detach().cpu().contiguous()
    if path.suffix == ".safetensors":
        SCORES.write(path, {"scores": scores_QN}, header)
        return
    buffer = io.BytesIO()
    np.save(buffer, scores_QN.numpy(), allow_pickle=False)
    # two files cannot appear at once: the index says which array it is of
    header["sha256"] = sha256(buffer.getvalue()).hexdigest()
    write_bytes(_index(path), json.dumps(header, indent=1).encode())
    write_bytes(path, buffer.getvalue())


def read_scores(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Read scores, ``[Q, N]``, and the names and settings that belong to them.

    Raises:
        ValueError: If the file is missing, damaged, or of something else.
    """
    header, scores_QN = _read(path)
    if scores_QN is None:
        raise ValueError(
            f"'{_index(path)}' is not the index of '{path}': the program was stopped between the "
            "two, or one was replaced. Run score again with the same options."
        )
    try:
        sizes = (len(header["queries"]), len(header["train"]))
        identity = dict(header["identity"])
    except (KeyError, TypeError, ValueError) as error:
        raise SCORES.damaged(path, f"{type(error).__name__}: {error}") from error
    if tuple(scores_QN.shape) != sizes:
        raise SCORES.damaged(path, f"{tuple(scores_QN.shape)} scores for {sizes} names")
    return scores_QN, {**header, "identity": identity}


def _read(path: Path) -> tuple[dict[str, Any], Tensor | None]:
    """Header and scores; no scores where they are not those that the header is of."""
    if path.suffix != ".npy":
        header, tensors = SCORES.read(path)
        if not isinstance(header, dict):
            raise SCORES.damaged(path, f"it is of type {type(header).__name__}")
        return header, tensors.get("scores", torch.empty(0))
    for needed in (path, _index(path)):
        if not needed.is_file():
            raise ValueError(f"There is no file '{needed}'. {SCORES.advice}")
    try:
        raw = path.read_bytes()
        header = dict(json.loads(_index(path).read_text()))
        scores_QN = torch.from_numpy(np.load(io.BytesIO(raw), allow_pickle=False))
    except Exception as error:  # numpy's reader raises many kinds
        raise SCORES.damaged(path, f"{type(error).__name__}: {error}") from error
    same = header.get("sha256", "") in ("", sha256(raw).hexdigest())
    return header, scores_QN if same else None


def _index(path: Path) -> Path:
    return path.with_suffix(".index.json")


def _check_same_images(
    options: ScoreOptions, info: dict[str, Any], train: NoisedRegression
) -> None:
    data = info.get("data") or info.get("identity", {}).get("data", {})
    fitted = data.get("digest")
    if fitted is not None and fitted != train.data_identity()["digest"]:
        raise ValueError(
            f"'{options.operator}' was fitted to other images than those of --data "
            f"'{options.data}'. Pass the same, or --other-data if that is meant."
        )


def _check_same_objective(
    options: ScoreOptions, info: dict[str, Any], train: NoisedRegression
) -> None:
    """Curvature and gradients must be of one loss; draws and precision are free."""
    here = json.loads(json.dumps(train.description))
    there = info.get("regression", {})
    known = [key for key in _OBJECTIVE if key in there and key in here]
    different = differences({k: there[k] for k in known}, {k: here[k] for k in known})
    if different:
        raise ValueError(
            f"'{options.operator}' was fitted with another objective: {'; '.join(different)}. Pass "
            "the pipeline, or model and scheduler, that it was fitted with."
        )
