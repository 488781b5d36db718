"""What scores were made from, in a few lines that a person wants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def settings_of(header: Mapping[str, Any], num_queries: int, num_train: int) -> list[list[str]]:
    """Terms and texts, at most ten; of what a header does not know there is no line.

    Args:
        header: The header of a file of scores.
        num_queries: The number of queries.
        num_train: That of training images.
    """
    identity, run = header["identity"], header.get("run", {})
    query, operator = identity.get("query", {}), identity.get("operator", {})
    draws = [
        f"{side['regression']['num_draws']} of each {what}"
        for side, what in ((identity.get("train", {}), "training image"), (query, "query"))
        if "regression" in side
    ]
    fitted = operator.get("regression", {}).get("num_draws")
    curvature = operator.get("kind", "") + (f", {fitted} draws of each image" if fitted else "")
    resolution = header.get("form", {}).get("resolution")
    data = _text(run.get("data")) + (f", at {resolution} pixels" if resolution else "")
    versions = operator.get("versions", {})
    found = {
        "Scores": f"{num_queries:,} queries × {num_train:,} training images",
        "Method": " and ".join(header.get("methods", ())),
        "Measured": query.get("measurement", ""),
        "Draws of noise": ", ".join(draws),
        "Curvature": curvature,
        "Damping": f"{query['damping']:g}" if "damping" in query else "",
        "Network": _text(run.get("pipeline") or run.get("model")),
        "Adapter": _text(run.get("lora")),
        "Training images": data,
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return [[term, text] for term, text in found.items() if text]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(Path(value))
