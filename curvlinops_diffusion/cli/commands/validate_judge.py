"""``validate judge``: how well scores predicted what retrained networks did."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from curvlinops_diffusion import page
from curvlinops_diffusion.cli.events import event, say
from curvlinops_diffusion.cli.measured_files import read_measured
from curvlinops_diffusion.cli.options import ValidateJudgeOptions
from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS, Better
from curvlinops_diffusion.influence.stored_scores import StoredScores
from curvlinops_diffusion.influence.validation.judgements import (
    linear_datamodelling_score,
    removal_effects,
)
from curvlinops_diffusion.influence.validation.plans import RetrainingPlan
from curvlinops_diffusion.page.figures import intervals
from curvlinops_diffusion.runtime.files import named_path, write_bytes

TEMPLATE = Path(page.__file__).parent / "validation.html.j2"


def validate_judge(options: ValidateJudgeOptions) -> None:
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
        found["removals"] = _removals(plan, values_SMQ)
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
    """Scores by their names ``[Q, N]``, of the sign of what was measured.

    Raises:
        ValueError: If they are of other queries or training images, or two have one name.
    """
    if not words:
        raise ValueError("Pass the scores to judge: --scores FILE …, each perhaps as NAME=FILE.")
    found: dict[str, Tensor] = {}
    better = MEASUREMENTS[header["measurement"]].better
    for word in words:
        named, path = named_path(word)
        name = named or path.stem
        scores = StoredScores.open(path)
        own = scores.header
        names = plan.info.get("names")
        if own["queries"] != header["queries"] or names not in (None, own["train"]):
            raise ValueError(
                f"'{path}' is of other queries than '{header['queries'][0]}', …, or of other "
                "training images than the plan. Score the same images as were planned and measured."
            )
        if name in found:
            raise ValueError(f"Two --scores are called '{name}'. Pass them as NAME=FILE.")
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
        scores_QN = scores.whole()
        if not scores_QN.isfinite().all():
            count = int((~scores_QN.isfinite()).sum())
            raise ValueError(
                f"'{path}' has {count} scores that are not finite. Pass scores that are."
            )
        found[name] = -scores_QN if opposite else scores_QN
    return found


def _scored(
    plan: RetrainingPlan,
    values_SMQ: Tensor,
    scores: dict[str, Tensor],
    bootstrap: int,
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
        rows.append(row | {"per_query": one.per_query.tolist()})
    return {"agreement": first.agreement, "ceiling": first.ceiling, "methods": rows}


def _removals(plan: RetrainingPlan, values_SMQ: Tensor) -> list[dict[str, Any]]:
    effects = removal_effects(plan.parts, values_SMQ, plan.info["method"])
    return [{"removed": k, **vars(effect)} for k, effect in effects.items()]


def _plain(value: Any) -> Any:
    """Plain values with ``None`` in place of undefined numbers, which JSON has not."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _text(value: float | None, form: str) -> str:
    """A number as text; ``None`` as undefined."""
    return "undefined" if value is None else format(value, form)


def _lines(found: dict[str, Any]) -> list[str]:
    """Say what was found, for people."""
    if "removals" in found:
        return [
            f"Without the {row['removed']} most helpful images: {row['change']:+.1%}"
            + ("" if row["error"] is None else f" ± {row['error']:.1%}")
            + ("" if row["control"] is None else f"; without random ones {row['control']:+.1%}")
            for row in found["removals"]
        ]
    lines = []
    for row in found["methods"]:
        low, high = (_text(end, ".3f") for end in row["interval"])
        line = f"{row['method']}: {_text(row['lds'], '.3f')} [{low}, {high}]"
        if "minus_first" in row:
            minus = row["minus_first"]
            low, high = (_text(end, "+.3f") for end in minus["interval"])
            line += f", {_text(minus['difference'], '+.3f')} [{low}, {high}] to the first"
        undefined = sum(score is None for score in row["per_query"])
        if undefined:
            line += f"; undefined for {undefined} of {found['queries']} queries, left out"
        lines.append(line)
    if found["ceiling"] is not None:
        lines.append(
            f"Two seeds agree by {found['agreement']:.2f}; a perfect predictor would have "
            f"{found['ceiling']:.2f}"
        )
    return lines


def _page(found: dict[str, Any]) -> str:
    figure = None
    if "methods" in found:
        rows = [
            (row["method"], row["lds"], *row["interval"])
            for row in found["methods"]
            if row["lds"] is not None
        ]
        figure = intervals(rows, found["ceiling"])
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _text
    return environment.from_string(TEMPLATE.read_text()).render(
        figure=figure, quantity=MEASUREMENTS[found["measurement"]].quantity, **found
    )
