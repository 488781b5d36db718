"""``fit``, ``score``, ``report``, ``attribute``, which is all three, and ``validate check``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed

from curvlinops_diffusion.attribution import Attribution
from curvlinops_diffusion.attributor import Attributor
from curvlinops_diffusion.checkpoints import CheckpointAttributor, check_num_checkpoints
from curvlinops_diffusion.cli.cost import COUNTED, MEASURED, Cost, fit_cost, score_cost
from curvlinops_diffusion.cli.decided import as_yaml, of_run
from curvlinops_diffusion.cli.network import load_network
from curvlinops_diffusion.cli.options import (
    ATTRIBUTOR,
    CHECK,
    FIT,
    KFAC,
    LAYOUT,
    REGRESSION,
    SCORE,
    SIZING,
    chosen,
    picked,
)
from curvlinops_diffusion.cli.paths import at_checkpoint
from curvlinops_diffusion.cli.running import event, is_first, process_group, say
from curvlinops_diffusion.influence.methods import Method, methods_named
from curvlinops_diffusion.influence.tables import check_table
from curvlinops_diffusion.linalg.operator_files import read_header
from curvlinops_diffusion.page.gallery import group_names
from curvlinops_diffusion.runtime.files import make_folder, write_bytes
from curvlinops_diffusion.runtime.passes import PassOptions
from curvlinops_diffusion.runtime.processes import Processes
from curvlinops_diffusion.validation.checking import SHUFFLED_DRAWS, check

# rows of a table that is written beside a page unasked
_ROWS = 10_000_000


def fit(options: Namespace) -> None:
    """Fit an operator, and write it.

    Raises:
        ValueError: If something is missing or does not fit together.
    """
    with opened_attributor(options) as attributor:
        if options.dry_run or options.time:
            return _print_cost({"": _fit_cost(attributor, options)})
        _fit(attributor, options, options.output)


def _fit_cost(attributor: Attributor, options: Namespace) -> Cost:
    return fit_cost(
        attributor, **chosen(options, FIT), options=chosen(options, KFAC), timed=options.time
    )


def _fit(attributor: Attributor, options: Namespace, output: Path) -> None:
    before = _written(output)
    arguments = chosen(options, FIT) | chosen(options, KFAC) | {"output": output}
    operator = attributor.fit(**arguments).operator
    blocks = sum(operator.processes.all_gather(len(operator.blocks)))
    if before and _written(output) == before:
        return say(f"'{output}' was made with the same options; nothing to do")
    covered, left_out = operator.shape[0], operator.info.get("left_out", {})
    event("fitted", file=str(output), parameters=covered, left_out=left_out)
    say(f"Wrote {output}: {covered:,} parameters in {blocks} blocks")


def _written(output: Path) -> dict[Path, int]:
    """When a file, or each in a folder, was written; nothing if there is none."""
    files = output.glob("*.safetensors") if output.is_dir() else [output]
    return {file: file.stat().st_mtime_ns for file in files if file.exists()}


def score(options: Namespace) -> None:
    """Score every training image for every query, and write the scores.

    Raises:
        ValueError: If something is missing or does not fit together.
    """
    with opened_attributor(options, options.operator) as attributor:
        asked = _asked(attributor, options)
        if options.dry_run or options.time:
            return _print_cost({"": score_cost(attributor, timed=options.time, **asked)})
        _score(attributor, asked, options, options.output)


def _asked(attributor: Attributor, options: Namespace) -> dict[str, Any]:
    """The arguments of ``score``, its images open, which are checked before a fit."""
    found = chosen(options, SCORE) | {"queries": options.queries}
    for name in ("queries", "held_out"):
        if (folder := found[name]) is not None:
            found[name] = attributor.opened(folder, what=name)
            say(f"Read {found[name].summary()} from {folder}")
    if found["embedding"] is not None:
        from curvlinops_diffusion.loading.image_models import ImageModel

        found["embedding"] = ImageModel(found["embedding"])
    return found


def _score(
    attributor: Attributor, asked: dict[str, Any], options: Namespace, output: Path
) -> Attribution:
    before = _written(output)
    found = attributor.score(**asked, output=output, overwrite=options.overwrite)
    if before and _written(output) == before:
        say(f"'{output}' was made with the same options; nothing to do")
        return found
    sure = {} if found.agreement is None else found.agreement.as_header()
    shape = {"queries": len(asked["queries"]), "training_images": len(attributor.images.names)}
    event("scored", file=str(output), values=found.header["values"], **shape, **sure)
    say(f"Wrote {output}: {found}")
    return found


def report(options: Namespace) -> None:
    """Write the page of scores, or a table.

    Raises:
        ValueError: If images, operator and scores do not belong together.
    """
    is_table = options.output.suffix != ".html"
    if is_table:
        check_table(options.output)
    found = Attribution.load(options.scores, options.data, options.queries)
    if not is_table:
        return _report(found, options, options.output, options.operator)
    found.save(options.output, group_by=options.group_by)
    event("reported", file=str(options.output), bytes=options.output.stat().st_size)
    say(f"Wrote {options.output}")


def _report(found: Attribution, options: Namespace, output: Path, operator: Path | None) -> None:
    size = found.report(output, top=options.top, group_by=options.group_by, operator=operator)
    event("reported", file=str(output), bytes=size)
    say(f"Wrote {output} ({size / 1e6:.1f} MB)")


def attribute(options: Namespace) -> None:
    """Fit, score and report into a folder, with tables and the options beside.

    Of several checkpoints each is fitted and scored, and scores are averaged.

    Raises:
        ValueError: If the folder holds another run, or as the three.
    """
    count, folder = len(options.checkpoints or ()) + 1, options.output
    if count > 1 and len(options.lora or ()) > 1:
        raise ValueError(
            f"--checkpoints stand in place of one adapter, got {len(options.lora)} for --lora. "
            "Pass the latest of one training as --lora, the earlier ones as --checkpoints."
        )
    scores, table = folder / "scores.safetensors", folder / "scores.csv"
    operator = folder / ("operator.safetensors" if count == 1 else "operators")
    if scores.exists() and not options.overwrite:
        check_num_checkpoints(scores, count)
    if count > 1:
        say(f"{count} checkpoints: {count} times the work of one")
    with opened_attributor(options) as attributor:
        asked = _asked(attributor, options)  # checked before anything is computed
        if options.group_by is not None:
            group_names(attributor.images, options.group_by)
        named = _methods(attributor, options)
        fits = any(each.takes_draws for each in named)  # images alone need no curvature
        if options.dry_run or options.time:
            return _print_costs(attributor, asked, options, count, fits)
        if is_first():
            make_folder(folder)
        if distributed.is_initialized():
            distributed.barrier()
        if fits:
            _fit(attributor, options, operator)
            if isinstance(attributor, CheckpointAttributor):
                files = [operator / f"checkpoint{c}.safetensors" for c in range(count)]
                runs = zip(attributor.runs, files, strict=True)
                attributor.runs = [run | {"operator": str(file.absolute())} for run, file in runs]
                operator = files[-1]
            else:
                attributor.run = of_run(options) | {"operator": str(operator.absolute())}
        found = _score(attributor, asked, options, scores)
    if not is_first():
        return
    # not before: a folder of another run has been refused by now
    write_bytes(folder / "run.yaml", as_yaml(options).encode())
    Q, N = next(iter(found.by_method.values())).shape
    if Q * N > _ROWS:
        told = f"for a table of all {Q * N:,}, report --scores {scores} --output FILE.parquet"
    else:
        found.save(table)
        told = f"as a table: '{table}'"
    if options.group_by is not None:
        found.save(folder / "groups.csv", group_by=options.group_by)
    page = folder / "report.html"
    _report(found, options, page, operator if fits else None)
    event("attributed", folder=str(folder))
    say(f"Open '{page}'. Scores: '{scores}'; {told}")


def _methods(attributor: Attributor, options: Namespace) -> list[Method]:
    beside = (getattr(options, name, None) for name in ("held_out", "embedding"))
    return attributor.methods(options.method, options.measurement, options.num_draws, *beside)


def _print_costs(
    attributor: Attributor, asked: dict[str, Any], options: Namespace, count: int, fits: bool
) -> None:
    """Print the cost of the curvature, of the scores, and of both at every checkpoint."""
    of = f" of each of {count} checkpoints" if count > 1 else ""
    fitted = _fit_cost(attributor, options)
    scored = score_cost(attributor, fit=fitted, timed=options.time, **asked)
    costs = {f"The scores{of}": scored}
    if fits:
        costs = {f"The curvature{of}": fitted, **costs, "In all": fitted.then(scored)}
    if count > 1:
        costs["In all"] = costs.get("In all", scored).times(count)
    _print_cost(costs)


def _print_cost(costs: Mapping[str, Cost]) -> None:
    """Print costs by their titles, and what they are known by."""
    if not is_first():
        return
    for title, cost in costs.items():
        print("\n".join([*([title] if title else []), cost.text(), ""]))
    timed = all(cost.seconds is not None for cost in costs.values())
    print(MEASURED if timed else COUNTED)


def validate_check(options: Namespace) -> None:
    """Check an operator's scores, print what was found, and write it.

    Raises:
        ValueError: If something is missing or does not fit together.
    """
    # of the commands that run for hours
    long = {"sharded": False, "checkpoint_every": PassOptions.checkpoint_every}
    own = Namespace(**vars(options), **long, measurement="loss")
    with opened_attributor(own, options.operator) as attributor:
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
        found = check(attributor, **(chosen(options, CHECK) | chosen(options, SCORE)))
        Processes.of_all().all_or_none(lambda: found.save(options.output) if is_first() else None)
    event("checked", file=str(options.output), **found.as_dict())
    if is_first():
        print(found)
    say(f"Wrote {options.output}")


@contextmanager
def opened_attributor(options: Namespace, operator: Path | None = None) -> Iterator[Attributor]:
    """The attributor of a command, with an operator's file if there is one."""
    if hasattr(options, "method"):  # before anything is loaded or computed
        methods_named(options.method, options.measurement, options.num_draws)
    with process_group(options, options.timeout):
        names = getattr(options, "params", None) or ()
        if operator is not None:
            names = [name for name, _ in read_header(operator)["parameters"]]
        paths = getattr(options, "checkpoints", None) or []
        runs = [at_checkpoint(options, path) for path in paths] + [options]
        loaders = [partial(load_network, own, names) for own in runs]
        several = distributed.is_available() and distributed.is_initialized()
        arguments = chosen(options, ATTRIBUTOR) | chosen(options, REGRESSION)
        arguments |= picked(options, f"{SIZING} {LAYOUT} prior_loss_weight")
        gigabytes = options.max_memory
        arguments["passes"] = PassOptions(
            None,
            options.checkpoint_every,
            distributed=several,
            sharded=several and options.sharded,
            max_memory=None if gigabytes is None else max(1, round(gigabytes * 1e9)),
            progressbar=not options.quiet,
        )
        if operator is not None:
            arguments["other_data"] = options.other_data
            attributor = Attributor.load(operator, loaders[0](), options.data, **arguments)
        elif paths:
            attributor = CheckpointAttributor(loaders, options.data, **arguments)
            attributor.runs = [of_run(own) for own in runs]
        else:
            attributor = Attributor.of_network(loaders[0](), options.data, **arguments)
        attributor.run = of_run(options)
        say(f"Read {attributor.images.summary()} from {options.data}")
        if hasattr(options, "method"):  # before the fit
            _methods(attributor, options)
        yield attributor
