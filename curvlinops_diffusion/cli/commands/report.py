"""``report``: scores as a self-contained page."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import matplotlib.pyplot as plt
import torch
from PIL import Image
from torch import Tensor

from curvlinops_diffusion.cli.events import event, say
from curvlinops_diffusion.cli.images.images import NamedImages, open_images
from curvlinops_diffusion.cli.images.preprocessing import Form
from curvlinops_diffusion.cli.options import ReportOptions
from curvlinops_diffusion.cli.outputs import check_output
from curvlinops_diffusion.cli.score_files import read_scores
from curvlinops_diffusion.influence.measurements.registry import sentence_of
from curvlinops_diffusion.linalg.operator_files import block_rows
from curvlinops_diffusion.linalg.storage import read_blocks
from curvlinops_diffusion.runtime.files import write_bytes

matplotlib.use("Agg")  # draws to files, needs no screen


TEMPLATE = Path(__file__).parent / "report.html.j2"


def report(options: ReportOptions) -> None:
    """Write the page.

    Raises:
        ValueError: If images and scores do not belong together.
    """
    inputs = {"--scores": options.scores, "--operator": options.operator}
    check_output(options.output, (".html",), inputs)
    if options.output.exists() and not options.overwrite:
        raise ValueError(f"'{options.output}' exists. Pass --overwrite, or another --output.")
    scores_QN, header = read_scores(options.scores)
    form = Form(None, None, options.resolution)
    train, queries = (open_images(path, form) for path in (options.data, options.queries))
    for images, names, what in (
        (train, header["train"], "data"),
        (queries, header["queries"], "queries"),
    ):
        if images.names != names:
            raise ValueError(
                f"--{what} holds {len(images.names)} images that are not the {len(names)} that "
                f"'{options.scores}' is of. Pass the folder that was scored."
            )
    page = (
        jinja2.Environment(autoescape=True)
        .from_string(TEMPLATE.read_text())
        .render(
            queries=_queries(scores_QN, train, queries, options.top),
            num_train=len(train),
            measured=sentence_of(header["identity"].get("query", {}).get("measurement", "")),
            histogram=_histogram(scores_QN),
            operator=None if options.operator is None else _operator(options.operator),
            settings=json.dumps(header["identity"], indent=2),
            scores=options.scores.name,
        )
    )
    write_bytes(options.output, page.encode())
    event("reported", file=str(options.output))
    say(f"Wrote {options.output}")


def _queries(
    scores_QN: Tensor, train: NamedImages, queries: NamedImages, top: int
) -> list[dict[str, Any]]:
    result = []
    for q, scores_N in enumerate(scores_QN):
        top = min(top, len(scores_N))
        orders = {
            "most positive": scores_N.topk(top).indices,
            "most negative": scores_N.topk(top, largest=False).indices,
            "most neutral": scores_N.abs().topk(top, largest=False).indices,
        }
        result.append(
            {
                "name": queries.names[q],
                "image": _data_url(queries.image(q)),
                "rows": {
                    title: [
                        {
                            "name": train.names[n],
                            "image": _data_url(train.image(n)),
                            "score": f"{float(scores_N[n]):+.2e}",
                        }
                        for n in order.tolist()
                    ]
                    for title, order in orders.items()
                },
            }
        )
    return result


def _data_url(x: Tensor) -> str:
    """An image in [-1, 1] as the address of a PNG file inside the page."""
    bytes_HWC = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    image = Image.fromarray(bytes_HWC.squeeze(-1).numpy())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _histogram(scores_QN: Tensor) -> str:
    figure, axis = plt.subplots(figsize=(7, 2.2))
    axis.hist(scores_QN.flatten().double().numpy(), bins=80, color="#4a6fa5")
    axis.set_yscale("log")
    axis.set_xlabel("score")
    axis.set_ylabel("pairs")
    return _svg(figure)


def _operator(path: Path) -> dict[str, Any]:
    """An operator's spectrum, and a row for each block."""
    header, blocks = read_blocks(path)
    rows, spectra = block_rows(header), []
    for row, placed in zip(rows, blocks, strict=True):
        values = placed.block.eigen(placed.name).eigenvalues.flatten()
        spectra.append(values)
        row |= {"trace": float(values.sum()), "largest": float(values.max())}
    total = sum(row["trace"] for row in rows) or 1.0
    values = torch.cat(spectra).sort(descending=True).values.clamp(min=1e-30)
    figure, axis = plt.subplots(figsize=(7, 2.6))
    axis.loglog(range(1, len(values) + 1), values.double().numpy(), color="#4a6fa5")
    axis.set_ylim(bottom=max(float(values[0]) * 1e-14, 1e-30))
    axis.set_xlabel("number")
    axis.set_ylabel("eigenvalue")
    covered = sum(row["parameters"] for row in rows)
    for row in rows:
        row["share"] = f"{row['trace'] / total:.2%}"
        row["largest"] = f"{row['largest']:.2e}"
        row["parameters"] = f"{row['parameters']:,}"
    left_out = header["info"].get("left_out", {})
    return {
        "kind": header["kind"],
        "rows": rows,
        "spectrum": _svg(figure),
        "covered": f"{covered:,}",
        "left_out": left_out,
    }


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
