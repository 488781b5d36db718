"""Settings of the documentation."""

import os
import sys
import warnings
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from tables import write_tables

write_tables()

project = "curvlinops_diffusion"
author = "The curvlinops_diffusion authors"
copyright = author  # noqa: A001
version = release = version_of("curvlinops-diffusion")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "_tables", "examples", "gallery/*.ipynb", "gallery/*.py"]
html_theme = "furo"
html_title = "curvlinops_diffusion"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings describe the arguments
# upstream's docstrings, inherited, are not in a form that passes without warnings
autodoc_inherit_docstrings = False

doctest_global_setup = """
import warnings

warnings.simplefilter("ignore")
"""


def _reset(gallery_conf: dict[str, object], fname: str) -> None:
    """Before each example: no warnings of the libraries on its page."""
    warnings.simplefilter("ignore")


# examples import each other's set-up
os.environ["PYTHONPATH"] = str(Path(__file__).parent / "examples")
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    # the demo takes minutes, and is run by `make demo`
    "filename_pattern": r"examples/(?!influence_digits)",
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
