"""``inspect``: say in ten lines what a file of an operator or of scores is of; or all as JSON."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from curvlinops_diffusion.cli.options import TRAINING, commands
from curvlinops_diffusion.influence.score_files import SCORES
from curvlinops_diffusion.linalg.operator_files import block_rows, read_header

_NAMES = {"ekfac": "EK-FAC", "kfac": "K-FAC"}
_INPUTS = "pipeline model scheduler lora checkpoints params data queries operator"


def inspect(options: Namespace) -> None:
    """Print what a file is of, from what, and by what.

    Raises:
        ValueError: If it is of no known kind.
    """
    path = options.file
    if path.suffix != ".safetensors":
        raise ValueError(
            f"'{path}' is neither an operator's file, .safetensors as fit writes it, nor one of "
            "scores, as score writes it. Pass one of these."
        )
    header, lines = _of_scores(path) if SCORES.holds(path) else _of_operator(path)
    if options.json:
        return print(json.dumps(header, indent=1))
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:{width}}  {text}")


def _of_scores(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from curvlinops_diffusion.influence.agreement import Agreement  # with PyTorch
    from curvlinops_diffusion.influence.gap import GeneralisationGap
    from curvlinops_diffusion.influence.methods import Method
    from curvlinops_diffusion.influence.stored_scores import StoredScores

    scores_QN = StoredScores.open(path)
    header, (Q, N) = scores_QN.header, scores_QN.shape
    run, identity = header.get("run", {}), header["identity"]
    least = min(float(scores_N.min()) for scores_N in scores_QN)
    most = max(float(scores_N.max()) for scores_N in scores_QN)
    sides = [identity.get(side, {}) for side in ("train", "query")]
    train, query = (side.get("regression", {}).get("num_draws", "unknown") for side in sides)
    asked = {k: v for k, v in sides[1].items() if k in ("damping", "relative", "rtol")}
    measured = sides[1].get("measurement", "loss")
    of, gap = header.get("checkpoints"), GeneralisationGap.of_header(header)
    methods = header.get("methods", ["influence"])
    not_known = "not known: that takes multiples of 4"
    if not Method(methods[0]).takes_draws:
        not_known = f"{methods[0]} look at the images alone: no draws could make them surer"
    lines = {
        "scores": f"{' and '.join(methods)}, of {N:,} training images "
        f"on {Q:,} queries, from {least:.3g} to {most:.3g}"
        + (f"; averages over {len(of)} checkpoints" if of else ""),
        **_inputs(run),
        "training": _training(run),
        "measured": f"{measured}, {_settings(asked)}",
        **({} if gap is None else {"gap": f"held-out less training loss {gap}"}),
        "draws": f"{train} for each training image, {query} for each query",
        "agreement": str(Agreement.of_header(header) or not_known),
        "written": _written(path, identity.get("operator", {}).get("versions", {})),
    }
    return header, lines


def _of_operator(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    header = read_header(path)
    info, rows = header["info"], block_rows(header)
    entries, kinds = sum(row["parameters"] for row in rows), Counter(row["kind"] for row in rows)
    kind, run = header["kind"], info.get("run", {})
    known = commands()["fit"].options
    changed = {
        name: value
        for name, value in info.get("options", {}).items()
        if name in known and value != known[name].default
    }
    left_out = info.get("left_out", {})
    lines = {
        "operator": f"{_NAMES.get(kind, kind)} of {entries:,} parameters in {len(rows)} blocks "
        f"({', '.join(f'{count} {name}' for name, count in kinds.most_common())})",
        **_inputs(run),
        "training": _training(run),
        "draws": f"{info['regression']['num_draws']} for each image",
        "options": _settings(changed) or "the defaults",
        "left out": ", ".join(left_out) if left_out else "nothing",
        "written": _written(path, info.get("versions", {})),
    }
    if "images" in info and "data" in run:
        lines["data"] += f" ({info['images']})"
    return {**header, "blocks": rows}, lines


def _inputs(run: Mapping[str, Any]) -> dict[str, str]:
    """The files and folders that a run was given, by the names of the program's options."""
    given = {name: run[name] for name in _INPUTS.split() if run.get(name) is not None}
    return {k: ", ".join(v) if isinstance(v, list) else str(v) for k, v in given.items()}


def _training(run: Mapping[str, Any]) -> str:
    """How training differed from the plain loss, as options that are not at their default."""
    known = commands()["fit"].options
    given = {k: run[k] for k in TRAINING.split() if k in run and run[k] != known[k].default}
    if "weighting" not in given:
        given.pop("snr_gamma", None)
    return _settings(given) or ("the defaults" if run else "not known: made in Python")


def _settings(values: Mapping[str, Any]) -> str:
    texts = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in values.items()}
    return ", ".join(
        f"{k.replace('_', ' ')} {'' if v is True else v}".strip() for k, v in texts.items()
    )


def _written(path: Path, versions: Mapping[str, str]) -> str:
    at = datetime.fromtimestamp(path.stat().st_mtime).astimezone().strftime("%Y-%m-%d %H:%M %Z")
    by = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{at}{by and f', by {by}'}"
