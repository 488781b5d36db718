"""The program on images of several shapes."""

import torch

from curvlinops_diffusion import StoredScores
from curvlinops_diffusion.cli.options import options_of
from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.cli.validate import measured
from curvlinops_diffusion.linalg.operator_files import read_header
from tests.cli.cases import arguments
from tests.loading.test_sizes import folder_of

BUCKETS = "8,8; 8,12"


def test_buckets_from_fit_to_scores(folder, tmp_path, capsys):
    """What was said to ``fit`` holds for queries, and may not be contradicted."""
    data = folder_of(tmp_path / "train", (16, 16), (16, 25), (9, 9), (8, 13))
    queries = folder_of(tmp_path / "queries", (16, 24), (8, 8))
    paths = [str(tmp_path / name) for name in ("e.safetensors", "s.safetensors")]
    asked = ["--data", data, "--buckets", BUCKETS, "--interpolation", "bicubic"]
    fitted = ["--params", "conv_in.weight", "--curvature", "kfac", "--output", paths[0]]
    assert run(arguments(folder, "fit", *map(str, asked), *fitted)) == 0
    assert "Read 4 images, 2 buckets (2 of 8×8, 2 of 8×12) from" in capsys.readouterr().err
    chosen = {k: read_header(paths[0])["info"]["run"][k] for k in ("buckets", "interpolation")}
    assert chosen == {"buckets": BUCKETS, "interpolation": "bicubic"}
    scored = ["--operator", paths[0], "--queries", str(queries), "--output", paths[1]]
    assert run(arguments(folder, "score", *scored)) == 0
    stored = StoredScores.open(paths[1])
    assert stored.whole().shape == (2, 4)
    assert stored.header["form"]["buckets"] == [[8, 8], [8, 12]]
    assert run(arguments(folder, "score", *scored, "--buckets", "8,8")) == 2
    assert f"--buckets 8,8 contradicts '{paths[0]}'" in capsys.readouterr().err


def test_kohyas_buckets_are_asked_for_by_a_flag(folder, capsys):
    """Alone or with a value of truth; they need a resolution."""
    for words in (["--buckets"], ["--buckets", "true"]):
        assert run(arguments(folder, "fit", *words)) == 2
        assert "--buckets needs the --resolution that training had" in capsys.readouterr().err


def test_retrained_networks_are_measured_on_the_same_sizes(folder, tmp_path):
    queries = folder_of(tmp_path / "queries", (16, 24), (8, 8))
    own = {"pipeline": folder / "pipeline", "queries": queries, "quiet": True, "query_draws": 1}
    options = options_of("validate-measure", **own, buckets=BUCKETS)
    values, images = measured(options, "all", tmp_path / "checkpoint")
    assert images.shapes == [(8, 12), (8, 8)]
    assert torch.isfinite(values).all()
