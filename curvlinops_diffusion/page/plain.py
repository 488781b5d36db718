"""Pages of sentences and tables, without a script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2


def plain_page(template: str, **values: Any) -> str:
    """A page of a template in this folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number_text
    return environment.get_template(f"{template}.html.j2").render(**values)


def number_text(value: float | None, form: str) -> str:
    """A number as text; ``None`` as undefined."""
    return "undefined" if value is None else format(value, form)
