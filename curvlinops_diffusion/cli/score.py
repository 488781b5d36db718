"""``score``: an operator, training images and queries to scores."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlinops_diffusion._files import FileKind, write_bytes
from curvlinops_diffusion.cli.cost import ScoreCost
from curvlinops_diffusion.cli.events import event, say
from curvlinops_diffusion.cli.fit import check_output, checkpoint_of, training_regression
from curvlinops_diffusion.cli.images import NamedImages, open_images
from curvlinops_diffusion.cli.network import load_network
from curvlinops_diffusion.cli.options import ScoreOptions
from curvlinops_diffusion.cli.processes import is_first, process_group, with_own_device
from curvlinops_diffusion.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.identity import data_identity, differences, identity_of
from curvlinops_diffusion.influence import influence_scores
from curvlinops_diffusion.operators.load import load_operator
from curvlinops_diffusion.passes import PassOptions
from curvlinops_diffusion.regression import NoisedRegression

SCORES = FileKind(
    "curvlinops_diffusion.scores",
    "influence scores",
    "Make it by curvlinops-diffusion score.",
)


def score(options: ScoreOptions) -> None:
    """Score every training image for every query, and write the scores.

    Raises:
        ValueError: If something is missing or does not fit together.
    """
    check_output(options.output, (".safetensors", ".npy"))
    with process_group(options.timeout) as several:
        network = load_network(with_own_device(options))
        train = training_regression(network, options, in_pairs(options.num_draws))
        form = network.form(options.resolution)
        images = open_images(options.queries, form, network.conditioned)
        query = NoisedRegression(
            network.objective,
            images,
            options.query_draws,
            options.seed + 1,
            batch_size=options.batch_size,
            antithetic=in_pairs(options.query_draws),
        )
        operator = load_operator(options.operator, network.objective.model)
        if not options.other_data:
            _check_same_images(options, operator.info, train)
        if options.dry_run:
            if is_first():
                print(ScoreCost.of(train, query, operator, options).text())
            return
        measured = {"measurement": options.measurement, "damping": options.damping}
        identity = {
            "train": identity_of(train, {}),
            "query": identity_of(query, measured),
            "operator": json.loads(json.dumps(operator.info)),
        }
        if options.output.exists() and not options.overwrite:
            _check_same_scores(options.output, identity)
            say(f"'{options.output}' was made with the same options; nothing to do")
            return
        checkpoint = checkpoint_of(options.output)
        passes = PassOptions(
            checkpoint, options.checkpoint_every, distributed=several, progressbar=not options.quiet
        )
        J_train = ExampleGradientLinearOperator(train, operator.param_names)
        J_query = ExampleGradientLinearOperator(
            query, operator.param_names, measurement=options.measurement
        )
        scores_QN = influence_scores(
            J_query,
            operator.inverse(options.damping),
            J_train,
            query_block=options.query_block,
            passes=passes,
        )
        if not is_first():
            return
        names = {"train": _names(options.data, form), "queries": images.names}
        write_scores(options.output, scores_QN, names, identity)
        shutil.rmtree(checkpoint)
        Q, N = scores_QN.shape
        event("scored", file=str(options.output), queries=Q, training_images=N)
        say(f"Wrote {options.output}: {Q} queries × {N} training images")


def in_pairs(num_draws: int) -> bool:
    """Whether so many draws are made antithetic pairs, which gradients gain by."""
    return num_draws % 2 == 0


def _names(path: Path, form: Any) -> list[str]:
    images: NamedImages = open_images(path, form)
    return images.names


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
    # the index first: scores are never without it
    write_bytes(_index(path), json.dumps(header, indent=1).encode())
    write_bytes(path, buffer.getvalue())


def read_scores(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Read scores, ``[Q, N]``, and the names and settings that belong to them.

    Raises:
        ValueError: If the file is missing, damaged, or of something else.
    """
    if path.suffix == ".npy":
        header, scores_QN = _read_array(path)
    else:
        header, tensors = SCORES.read(path)
        scores_QN = tensors.get("scores", torch.empty(0))
    try:
        sizes = (len(header["queries"]), len(header["train"]))
        identity = dict(header["identity"])
    except (KeyError, TypeError, ValueError) as error:
        raise SCORES.damaged(path, f"{type(error).__name__}: {error}") from error
    if tuple(scores_QN.shape) != sizes:
        raise SCORES.damaged(path, f"{tuple(scores_QN.shape)} scores for {sizes} names")
    return scores_QN, {**header, "identity": identity}


def _read_array(path: Path) -> tuple[Any, Tensor]:
    for needed in (path, _index(path)):
        if not needed.is_file():
            raise ValueError(f"There is no file '{needed}'. {SCORES.advice}")
    try:
        array = np.load(path, allow_pickle=False)
        return json.loads(_index(path).read_text()), torch.from_numpy(array)
    except Exception as error:  # numpy's reader raises many kinds
        raise SCORES.damaged(path, f"{type(error).__name__}: {error}") from error


def _index(path: Path) -> Path:
    return path.with_suffix(".index.json")


def _check_same_images(
    options: ScoreOptions, info: dict[str, Any], train: NoisedRegression
) -> None:
    fitted = info.get("identity", {}).get("data", {}).get("digest")
    if fitted is not None and fitted != train.once("data", data_identity)["digest"]:
        raise ValueError(
            f"'{options.operator}' was fitted to other images than those of --data "
            f"'{options.data}'. Pass the same, or --other-data if that is meant."
        )


def _check_same_scores(path: Path, identity: dict[str, Any]) -> None:
    different = differences(read_scores(path)[1]["identity"], identity)
    if different:
        raise ValueError(
            f"'{path}' exists, and was made with others: {'; '.join(different[:5])}. Pass "
            "--overwrite, or another --output."
        )
