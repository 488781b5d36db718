"""Templates of pages, and how they write names and numbers."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup


def rendered(template: str, **values: Any) -> str:
    """Render a page of a template in this folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number_text, "name": _name_html}
    return environment.get_template(f"{template}.html.j2").render(**values)


def number_text(value: float | None, form: str) -> str:
    """Write a number; ``None`` as undefined."""
    return "undefined" if value is None else format(value, form)


def _name_html(name: str) -> Markup:
    """A name, in whose suffix no line is broken."""
    stem, suffix = os.path.splitext(name)
    if len(suffix) > 12:
        stem, suffix = name, ""
    end = Markup('<span class="end">{}</span>').format(suffix) if suffix else ""
    parts = Markup("<wbr>").join(re.split(r"(?<=[/_-])(?=.)", stem))
    return Markup('<span class="name">{}{}</span>').format(parts, end)
