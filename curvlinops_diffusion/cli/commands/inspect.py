"""``inspect``: what a file of an operator or of scores holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curvlinops_diffusion.cli.options import InspectOptions
from curvlinops_diffusion.influence.score_files import SCORES
from curvlinops_diffusion.linalg.operator_files import block_rows, read_header


def inspect(options: InspectOptions) -> None:
    """Print a file's header and table.

    Raises:
        ValueError: If it is of no known kind.
    """
    if options.file.suffix != ".safetensors":
        raise ValueError(
            f"'{options.file}' is neither an operator's file, .safetensors as fit writes it, nor "
            "one of scores, .safetensors as score writes it. Pass one of these."
        )
    if SCORES.holds(options.file):
        _print_scores(options.file)
    else:
        _print_operator(options.file)


def _print_scores(path: Path) -> None:
    from curvlinops_diffusion.influence.stored_scores import StoredScores  # with PyTorch

    scores_QN = StoredScores.open(path)
    header = scores_QN.header
    Q, N = scores_QN.shape
    print(f"influence scores of {N} training images on {Q} queries")
    least = min(float(scores_N.min()) for scores_N in scores_QN)
    most = max(float(scores_N.max()) for scores_N in scores_QN)
    print(f"from {least:.3g} to {most:.3g}")
    for q, name in enumerate(header["queries"][:20]):
        scores_N = scores_QN[q]
        best = int(scores_N.argmax())
        print(f"  {name}: most positive {header['train'][best]} ({scores_N[best]:+.3g})")
    _print_settings(header["identity"])


def _print_operator(path: Path) -> None:
    header = read_header(path)
    rows = block_rows(header)
    entries = sum(row["parameters"] for row in rows)
    print(f"{header['kind']} with {entries:,} parameters in {len(rows)} blocks")
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"  {row['name']:{width}}  {row['kind']:9}  {row['parameters']:>12,}")
    _print_settings(header["info"])


def _print_settings(settings: Mapping[str, Any]) -> None:
    print(json.dumps(settings, indent=2))
