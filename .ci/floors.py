"""Prints the least versions that pyproject.toml allows, as constraints of pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in (*project["dependencies"], *extras["cli"], *extras["demo"]):
    floor = re.match(r"([\w-]+)>=([\w.]+)", requirement)
    assert floor, f"{requirement} has no floor"
    print(f"{floor[1]}=={floor[2]}")
