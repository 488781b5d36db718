"""``attribute``: from images to a page, by fit, score and report."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from curvlinops_diffusion.cli.commands.fit import fit
from curvlinops_diffusion.cli.commands.report import report
from curvlinops_diffusion.cli.commands.score import score
from curvlinops_diffusion.cli.events import event, first_process, say
from curvlinops_diffusion.cli.options import AttributeOptions
from curvlinops_diffusion.influence.stored_scores import StoredScores
from curvlinops_diffusion.runtime.files import make_folder, write_bytes

# what says how a run went, and nothing about its result
_OF_THE_RUN = ("output", "overwrite", "dry_run", "log", "quiet", "debug")


def attribute(options: AttributeOptions) -> None:
    """Run the three commands, and write table and options beside what they write.

    Raises:
        ValueError: If the folder holds another run, or as the three.
    """
    of_fit, of_score, of_report = options.steps()
    if not options.dry_run:
        make_folder(options.output)
    fit(of_fit)
    if options.dry_run:
        return
    score(of_score)
    if not first_process():
        return
    # not before: a folder of another run has been refused by now
    write_bytes(options.output / "run.yaml", _as_yaml(options).encode())
    table = options.output / "scores.csv"
    StoredScores.open(of_score.output, check=False).export(table)
    report(of_report)
    event("attributed", folder=str(options.output))
    say(f"Open '{of_report.output}'. Scores: '{of_score.output}'; as a table: '{table}'")


def _as_yaml(options: AttributeOptions) -> str:
    """All that decides the result, as ``--config`` reads it."""
    plain: dict[str, Any] = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in _OF_THE_RUN or value is None:
            continue
        plain[field.name] = str(value.absolute()) if isinstance(value, Path) else value
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
