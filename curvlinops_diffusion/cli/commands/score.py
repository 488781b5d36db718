"""``score``: an operator, training images and queries to scores."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from curvlinops_diffusion.cli.checkpoints import checkpoint_of, nothing_to_do, remove
from curvlinops_diffusion.cli.commands.cost import score_cost
from curvlinops_diffusion.cli.commands.fit import training_images, training_regression
from curvlinops_diffusion.cli.commands.scoring import Scoring, inversion_of
from curvlinops_diffusion.cli.events import event, say
from curvlinops_diffusion.cli.network import Network, load_network, of_text_encoders
from curvlinops_diffusion.cli.options import ScoreOptions, in_bytes
from curvlinops_diffusion.cli.outputs import check_output_is_same
from curvlinops_diffusion.cli.processes import is_first, process_group, with_own_device
from curvlinops_diffusion.curvature.load import (
    check_same_objective,
    is_of_same_images,
    load_operator,
)
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.agreement import Agreement
from curvlinops_diffusion.influence.read_scores import header_and_scores
from curvlinops_diffusion.linalg.operator_files import read_header
from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.named_images import NamedImages
from curvlinops_diffusion.runtime.files import check_space
from curvlinops_diffusion.runtime.passes import PassOptions


def score(options: ScoreOptions) -> None:
    """Score every training image for every query, and write the scores.

    Raises:
        ValueError: If something is missing or does not fit together.
    """
    with process_group(options.timeout) as several:
        covered = (name for name, _ in read_header(options.operator)["parameters"])
        network = load_network(with_own_device(options), of_text_encoders(covered))
        known = training_images(network, options)
        train = training_regression(network, known, options, in_pairs(options.num_draws))
        images = open_images(
            options.queries, network.form(options.resolution), network.condition, known
        )
        if is_first():
            say(f"Read {images.summary()} from {options.queries}")
        query = _query_regression(network, images, options)
        held = PassOptions(
            distributed=several,
            sharded=several and options.sharded,
            max_memory=in_bytes(options.max_memory),
        )
        operator = load_operator(options.operator, network.objective.model, passes=held)
        check_same_objective(
            options.operator,
            operator.info,
            train,
            "Pass the pipeline, or model and scheduler, that it was fitted with, and the same "
            "options of training.",
        )
        if not options.other_data:
            _check_same_images(options, operator.info, train)
        if options.dry_run:
            cost = score_cost(train, query, operator, options)  # by all, who may share a network
            if is_first():
                print(cost.text())
            return
        identity = {
            "train": train.identity({}),
            "query": query.identity(
                {"measurement": options.measurement, **inversion_of(options), **_method(options)}
            ),
            "operator": json.loads(json.dumps(operator.info)),
        }
        if _is_done(options, identity):
            nothing_to_do(options.output)
            return
        size = query.num_data * train.num_data * operator.dtype.itemsize
        check_space(options.output.parent, 3 * size, "The scores, and those of halves,")
        names = {"train": known.names, "queries": images.names}
        told = {
            "form": {"channels": network.channels, "resolution": options.resolution},
            "condition": asdict(network.condition),
            "digests": {"train": known.digests, "queries": images.digests},
            "sources": known.source_digests() if is_first() else [],
        }
        scoring = Scoring(options, train, query, operator, several, names, identity, told)
        sure = scoring.write()
        if not is_first():
            return
        remove(checkpoint_of(options.output))
        Q, N = query.num_data, train.num_data
        event("scored", file=str(options.output), queries=Q, training_images=N, **sure)
        say(f"Wrote {options.output}: {Q} × {N} scores, of queries and training images")
        say(_how_sure({**sure, **names}))


def _method(options: ScoreOptions) -> dict[str, Any]:
    """The method, if it is not influence, of which older files say nothing."""
    if options.method == "influence":
        return {}
    return {"method": options.method, "ridge": options.ridge}


def _query_regression(
    network: Network, images: NamedImages, options: ScoreOptions
) -> NoisedRegression:
    """The queries with draws of their own."""
    return NoisedRegression(
        network.objective,
        images,
        options.query_draws,
        options.seed + 1,
        batch_size=options.batch_size,
        antithetic=in_pairs(options.query_draws),
        **options.regression_options(),
    )


def _is_done(options: ScoreOptions, identity: dict[str, Any]) -> bool:
    """Tell whether the output is there already, whole.

    Raises:
        ValueError: If what is there was made with other options, and may not be overwritten.
    """
    if not options.output.exists() or options.overwrite:
        return False
    header, scores_QN = header_and_scores(options.output)
    check_output_is_same(options.output, header, identity)
    return scores_QN is not None


def _how_sure(header: dict[str, Any]) -> str:
    """A line for people."""
    found = Agreement.of_header(header)
    if found is None:
        return (
            "How sure they are is not known: pass multiples of 4 as --num-draws and --query-draws"
        )
    return f"How sure: {found}"


def in_pairs(num_draws: int) -> bool:
    """Whether draws are paired antithetically: yes if their number is even; it reduces variance."""
    return num_draws % 2 == 0


def _check_same_images(
    options: ScoreOptions, info: dict[str, Any], train: NoisedRegression
) -> None:
    if not is_of_same_images(info, train):
        raise ValueError(
            f"'{options.operator}' was fitted to other images than those of --data "
            f"'{options.data}'. Pass the same, or --other-data if that is meant."
        )
