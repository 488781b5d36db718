"""Named measurements, an entry each, which program, report and documentation read.

Without torch, so that the program can list them before anything is computed. A new one is a
function or class in this folder and an entry of :data:`MEASUREMENTS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import Any


class Better(Enum):
    """Values of a measurement that are good, and what follows for the sign of scores."""

    LOWER = "lower is better, so positive means helpful"
    HIGHER = "higher is better, so here negative means helpful"
    NEITHER = "neither sign means helpful"

    @property
    def helpful_sign(self) -> int:
        """The sign of scores that means helpful; 0 if neither does."""
        return {Better.LOWER: 1, Better.HIGHER: -1, Better.NEITHER: 0}[self]


@dataclass(frozen=True)
class NamedMeasurement:
    """A measurement as users name it, a phrase that describes it, and the word for its values.

    It is ``file:name`` in this folder, a function of (noised batch, prediction) or a class without
    arguments.
    """

    where: str
    summary: str
    better: Better
    quantity: str = "value"

    def load(self) -> Any:
        """The measurement itself."""
        module, name = self.where.split(":")
        found = getattr(import_module(f"{__package__}.{module}"), name)
        return found() if isinstance(found, type) else found


MEASUREMENTS: dict[str, NamedMeasurement] = {
    "loss": NamedMeasurement("losses:loss", "the training loss", Better.LOWER, "loss"),
    "squared_norm": NamedMeasurement(
        "losses:squared_norm",
        "D-TRAK's mean square of the prediction",
        Better.NEITHER,
        "mean square",
    ),
    "signed_prediction": NamedMeasurement(
        "losses:SignedPrediction",
        "the prediction's component along random signs",
        Better.NEITHER,
        "component",
    ),
    "simplified_elbo": NamedMeasurement(
        "losses:SimplifiedELBO",
        "the transitions of the negative evidence lower bound, in nats",
        Better.LOWER,
        "bound",
    ),
    "elbo": NamedMeasurement(
        "losses:ELBO",
        "the whole negative evidence lower bound, with prior and reconstruction, in nats",
        Better.LOWER,
        "bound",
    ),
    "log_likelihood": NamedMeasurement(
        "losses:LogLikelihood",
        "the log-likelihood by the probability-flow ODE, in nats",
        Better.HIGHER,
        "log-likelihood",
    ),
}


def sentence_of(name: str) -> str:
    """State what was measured and what a score's sign means; empty for an unknown name."""
    entry = MEASUREMENTS.get(name)
    return "" if entry is None else f"Measured: {name}, {entry.summary}; {entry.better.value}."


def options_text() -> str:
    """Describe all of them, as the help of an option."""
    listed = "; ".join(f"{name} ({entry.summary})" for name, entry in MEASUREMENTS.items())
    signs = ""
    for better in Better:
        *first, last = [n for n, e in MEASUREMENTS.items() if e.better is better]
        names = f"{', '.join(first)} and {last}" if first else last
        signs += f" For {names} {better.value}."
    return f"What is measured at the queries: {listed}.{signs}"
