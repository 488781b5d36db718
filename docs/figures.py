"""Figures of the pages *Concepts* and *Evidence*, drawn when the documentation is built."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DDPMScheduler
from matplotlib.colors import SymLogNorm
from quoted_numbers import result_of
from sklearn.datasets import load_digits
from tables import METHODS, PIXELS, PROBLEM_NAMES, REGRESSION
from torch import nn

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    NoisedRegression,
)

DOCS = Path(__file__).parent
BLUE, RED, GREY = "#4a6fa5", "#b4413c", "#8a93a6"
# whose setting is chosen by the result
BEST = ("Journey-TRAK", "DAS", "TRAK", "D-TRAK")
# whose differences to EK-FAC are drawn
COMPARED = (
    *("no curvature", "Journey-TRAK", "DAS", "TRAK", "D-TRAK", "EK-FAC, the paper's recipe"),
    *("K-FAC", "K-FAC, regression on the loss", REGRESSION, PIXELS),
)
#: Methods against the training's length, and their labels.
AT_LENGTHS = {
    "EK-FAC": "EK-FAC influence",
    "K-FAC, regression on the prediction, squared": "regression on the prediction, squared",
    "D-TRAK": "D-TRAK (best)",
    PIXELS: "regression on pixels, squared",
}


def write_figures(folder: Path = DOCS / "_figures") -> None:
    """Write all of them, each as its function's name."""
    matplotlib.use("Agg")
    folder.mkdir(exist_ok=True)
    for draw in FIGURES:
        with warnings.catch_warnings(), plt.rc_context({"font.size": 9, "svg.hashsalt": "figures"}):
            warnings.simplefilter("ignore")
            figure = draw()
            figure.savefig(folder / f"{draw.__name__}.svg", bbox_inches="tight", facecolor="white")
        plt.close(figure)


def draws() -> plt.Figure:
    """An image at several noise levels."""
    x0 = torch.tensor(load_digits().images[3]).float() / 8 - 1
    scheduler = DDPMScheduler()
    figure, axes = plt.subplots(1, 6, figsize=(7, 1.5))
    torch.manual_seed(0)
    for axis, t in zip(axes, (None, 50, 200, 400, 600, 900), strict=True):
        noised = x0 if t is None else scheduler.add_noise(x0, torch.randn(8, 8), torch.tensor(t))
        axis.imshow(noised, cmap="gray_r", vmin=-1.5, vmax=1.5)
        axis.set_title("the image" if t is None else f"t = {t}", fontsize=9)
        axis.axis("off")
    return figure


def influence() -> plt.Figure:
    """A training loss with and without one image, and a query's loss at both minima."""
    w = np.linspace(-1.2, 2.2, 200)
    full, without, query = 0.5 * w**2, 0.55 * (w - 0.6) ** 2 + 0.1, 0.35 * (w + 0.4) ** 2 + 0.25
    figure, axis = plt.subplots(figsize=(5.2, 2.6))
    axis.plot(w, full, color=BLUE, label="training loss, all images")
    axis.plot(w, without, color=BLUE, linestyle="--", label="without one of them")
    axis.plot(w, query, color=RED, label="loss of the query")
    before, after = (0.35 * (v + 0.4) ** 2 + 0.25 for v in (0.0, 0.6))
    for v, low, high in ((0.0, 0.0, before), (0.6, 0.1, after)):
        axis.plot([v, v], [low, high], color=GREY, linestyle=":", linewidth=1)
        axis.plot(v, high, "o", color=RED, markersize=4)
    axis.annotate("", (0.78, after), (0.78, before), arrowprops={"arrowstyle": "->", "color": RED})
    axis.text(0.86, (before + after) / 2, "influence", color=RED, va="center")
    axis.set(xlabel="a weight of the network", yticks=[], ylim=(-0.05, 1.1))
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def curvature() -> plt.Figure:
    """The exact GGN of a network of two layers, K-FAC and EK-FAC."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 4, bias=False))
    x0 = torch.randn(60, 4) @ torch.tensor(
        [[1.0, 0.7, 0, 0], [0, 1, 0.5, 0], [0, 0, 1, 0.6], [0, 0, 0, 1]]
    )

    class Denoiser(nn.Module):
        """The network, which ignores the time."""

        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            """Denoise."""
            output: torch.Tensor = self.net(x)
            return output

    objective = DenoisingObjective(Denoiser(), DDPMScheduler())
    regression = NoisedRegression(objective, x0, 8)
    names = ("exact", "K-FAC", "EK-FAC")
    operators = (
        DiffusionGGNLinearOperator(regression),
        DiffusionKFACLinearOperator(regression, fisher_type="type-2"),
        DiffusionEKFACLinearOperator(regression, fisher_type="type-2"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(7, 2.5))
    for axis, name, operator in zip(axes, names, operators, strict=True):
        dense = operator @ torch.eye(operator.shape[1])
        axis.imshow(dense, cmap="RdBu_r", norm=SymLogNorm(0.01, vmin=-0.6, vmax=0.6))
        axis.set(title=name, xticks=[], yticks=[])
    return figure


def damping() -> plt.Figure:
    """Small eigenvalues under several dampings."""
    eigenvalues = np.logspace(-10, 1, 200)
    figure, axis = plt.subplots(figsize=(5.2, 2.4))
    for value, color in ((1e-8, BLUE), (1e-4, GREY), (1e-1, RED)):
        exponent = int(np.log10(value))
        label = f"damping $10^{{{exponent}}}$"
        axis.loglog(eigenvalues, 1 / (eigenvalues + value), color=color, label=label)
    axis.set(xlabel="eigenvalue of the curvature", ylabel="of its damped inverse")
    axis.legend(frameon=False, fontsize=8)
    return figure


def retraining() -> plt.Figure:
    """The linear data-modelling score of the loss, with intervals, for each method."""
    figure = _by_problem(METHODS, lambda row: row, "lds")
    for axis, problem in zip(figure.axes, PROBLEM_NAMES, strict=True):
        for kind, color in KINDS.items():
            ceiling = result_of(f"lds_{problem}")["ceilings"][f"loss, {kind}"]
            axis.axvline(ceiling, color=color, linestyle=":", linewidth=1)
        axis.set(xlabel="linear data-modelling score", xlim=(-0.05, 0.95))
    return figure


def differences() -> plt.Figure:
    """Differences to EK-FAC's score of the loss, with intervals."""
    figure = _by_problem(COMPARED, lambda row: row["minus_ekfac"], "difference")
    for axis in figure.axes:
        axis.axvline(0, color=GREY, linewidth=0.5)
        axis.set(xlabel="difference to EK-FAC")
    return figure


KINDS = {"held-out": BLUE, "generated": RED}


def _by_problem(
    methods: tuple[str, ...], entry_of: Callable[[dict[str, Any]], dict[str, Any]], key: str
) -> plt.Figure:
    """An axis for each problem, a line for each method, with intervals."""
    size = (11, 1.2 + 0.8 * len(methods))
    figure, axes = plt.subplots(2, 3, figsize=size, sharey=True, layout="constrained")
    for axis in axes.flat[len(PROBLEM_NAMES) :]:
        axis.remove()
    for axis, (problem, title) in zip(axes.flat, PROBLEM_NAMES.items(), strict=False):
        rows = {(r["method"], r["cell"]): r for r in result_of(f"lds_{problem}")["methods"]}
        for (kind, color), shift in zip(KINDS.items(), (0.14, -0.14), strict=True):
            found = {m: rows[m, f"loss, {kind}"] for m in methods if (m, f"loss, {kind}") in rows}
            entries = [entry_of(row) for row in found.values()]
            middle = np.array([entry[key] for entry in entries])
            ends = np.array([[e[key] - e["low"], e["high"] - e[key]] for e in entries]).T
            places = np.array([methods.index(method) + shift for method in found])
            style: dict[str, Any] = {"fmt": "o", "color": color, "markersize": 4, "label": kind}
            axis.errorbar(middle, places, xerr=ends.clip(min=0), **style)
        axis.set(title=title)
        labels = [f"{method} (best)" if method in BEST else method for method in methods]
        axis.set_yticks(range(len(methods)), labels)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside right upper"
    )
    return figure


def draws_needed() -> plt.Figure:
    """The score of the digits' loss against draws of each training image."""
    rows = result_of("retraining_draws")["scores"]
    figure, axis = plt.subplots(figsize=(5.2, 2.6))
    for scheme, dashes in (("antithetic", "-"), ("uniform", "--")):
        own = [row for row in rows if row["scheme"] == scheme]
        for kind, color in KINDS.items():
            points = [row["draws"] for row in own], [row[f"loss, {kind}"] for row in own]
            axis.semilogx(
                *points, f"o{dashes}", color=color, markersize=3, label=f"{kind}, {scheme}"
            )
    numbers = [row["draws"] for row in rows]
    axis.set_xticks(numbers, [str(number) for number in numbers])
    axis.minorticks_off()
    axis.set(xlabel="draws of each training image", ylabel="linear data-modelling score")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def training_length() -> plt.Figure:
    """Scores of methods against the training's length: of the loss, and of what it changes by."""
    lengths = result_of("training_length")["lengths"]
    passes = [row["passes"] for row in lengths]
    titles = {"linear": "the linear part", "squared": "the square", "loss": "their sum, the loss"}
    figure, axes = plt.subplots(1, len(titles), figsize=(10, 3), sharey=True)
    for axis, (part, title) in zip(axes, titles.items(), strict=True):
        for number, (method, label) in enumerate(AT_LENGTHS.items()):
            found = [row["methods"][method][part] for row in lengths]
            middle = [entry["lds"] for entry in found]
            line = axis.plot(passes, middle, f"C{number}o-", markersize=3, label=label)
            ends = [[entry[end] for entry in found] for end in ("low", "high")]
            axis.fill_between(passes, *ends, color=line[0].get_color(), alpha=0.08, linewidth=0)
        axis.set(title=title, xlabel="passes over the images", xscale="log")
        axis.set_xticks(passes, [str(number) for number in passes])
        axis.minorticks_off()
        axis.axhline(0, color=GREY, linewidth=0.5)
    axes[0].set(ylabel="linear data-modelling score")
    axes[-1].legend(frameon=False, fontsize=7, loc="upper left")
    figure.tight_layout()
    return figure


FIGURES: tuple[Callable[[], plt.Figure], ...] = (
    *(draws, influence, curvature, damping),
    *(retraining, differences, draws_needed, training_length),
)

if __name__ == "__main__":
    write_figures()
