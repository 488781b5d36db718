"""Settings of the documentation."""

import sys
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
]
exclude_patterns = ["_build", "_tables", "examples"]
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
