"""Settings of the documentation."""

import os
import sys
import warnings
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from figures import write_figures
from quoted_numbers import substitutions
from tables import write_tables

write_tables()
write_figures()
rst_prolog = substitutions()

project = "curvlinops_diffusion"
author = "The curvlinops_diffusion authors"
copyright = author  # noqa: A001
version = release = version_of("curvlinops-diffusion")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # with the pages, which are read without a network too
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "_figures", "_tables", "examples", "gallery/*.ipynb", "gallery/*.py"]
html_theme = "furo"
html_title = "curvlinops_diffusion"
html_static_path = ["_static"]
html_css_files = ["pages.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings describe the arguments
# upstream's docstrings, inherited, are not in a form that passes without warnings
autodoc_inherit_docstrings = False

# what the examples in docstrings take for granted, as the API page says
doctest_global_setup = """
import tempfile
import warnings

import torch
from diffusers import DDPMScheduler, UNet2DModel

from curvlinops_diffusion import *
from curvlinops_diffusion.baselines import *
from curvlinops_diffusion.layers import *
from curvlinops_diffusion.measurements import *
from curvlinops_diffusion.timesteps import *
from curvlinops_diffusion.validation import *
from curvlinops_diffusion.weightings import *

warnings.simplefilter("ignore")
torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    layers_per_block=1,
    block_out_channels=(8, 8),
    norm_num_groups=4,
    attention_head_dim=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
images = torch.randn(10, 1, 8, 8)
objective = DenoisingObjective(unet, DDPMScheduler())
train = NoisedRegression(objective, images, num_draws=4)
query = NoisedRegression(objective, torch.randn(2, 1, 8, 8), num_draws=8, seed=1)
folder = tempfile.mkdtemp()
"""


_threads = torch.get_num_threads()


def _reset(gallery_conf: dict[str, object], fname: str) -> None:
    """Before each example: no warnings of the libraries on its page, threads as at the start."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(_threads)


class _Arguments:
    """The command lines of the examples."""

    def __call__(self, gallery_conf: dict[str, object], script_vars: dict[str, Any]) -> list[str]:
        """The demo is run for a shorter time than by ``make demo``."""
        if Path(script_vars["src_file"]).stem != "influence_digits":
            return []
        return ["--steps", "700", "--draws", "16", "--output", str(DOCS / "_build" / "demo")]

    def __repr__(self) -> str:
        """The same in each build, so that it is not taken for another setting."""
        return "arguments"


# examples import each other's set-up
os.environ["PYTHONPATH"] = str(DOCS / "examples")
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": "examples/",
    "reset_argv": _Arguments(),
    "within_subsection_order": "FileNameSortKey",
    "reset_modules": ("matplotlib", _reset),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "remove_config_comments": True,
    "min_reported_time": 1,
}
# a function of the settings cannot be compared with the last build's
suppress_warnings = ["config.cache"]
