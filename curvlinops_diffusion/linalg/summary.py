"""What a block-diagonal operator says of itself: a table of its blocks, and what is covered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

# rows at the start and at the end of a shortened table
_SHOWN = 12


@dataclass(frozen=True)
class Summary:
    """A table with a line above and lines below.

    Attributes:
        title: The line above.
        rows: What the table's rows say, a text for each column.
        notes: The lines below.
    """

    COLUMNS = ("block", "kind", "parameters", "shape", "MiB", "trace")

    title: str
    rows: list[tuple[str, ...]]
    notes: list[str]

    @classmethod
    def of(cls, name: str, table: Sequence[dict[str, Any]], info: Mapping[str, Any]) -> Summary:
        """That of an operator of this name, with its table and what it says of how it was made."""
        rows = [_texts(row) for row in table]
        covered = sum(row["parameters"] for row in table)
        title = f"{name} with {covered:,} parameters in {len(rows)} blocks"
        others, left_out = (info.get(key, {}) for key in ("others", "left_out"))
        notes = [f"by automatic differentiation: {name} ({why})" for name, why in others.items()]
        notes.append(
            f"left out: {', '.join(left_out)}" if left_out else "nothing selected is left out"
        )
        return cls(title, rows, notes)

    def shortened(self) -> Summary:
        """The same without the middle of a long table."""
        hidden = len(self.rows) - 2 * _SHOWN
        if hidden <= 1:
            return self
        line = (f"… {hidden} more, which print() shows", *[""] * (len(self.COLUMNS) - 1))
        return replace(self, rows=[*self.rows[:_SHOWN], line, *self.rows[-_SHOWN:]])

    def text(self) -> str:
        """As lines of text."""
        width = max(len(row[0]) for row in self.rows)
        return "\n".join(
            [self.title, *(_line(row, width) for row in (self.COLUMNS, *self.rows)), *self.notes]
        )

    def html(self) -> str:
        """As HTML."""
        head = "".join(f"<th>{name}</th>" for name in self.COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<div><p><b>{escape(self.title)}</b></p>{table}{notes}</div>"


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["block"],
        row["kind"],
        f"{row['parameters']:,}",
        "×".join(map(str, row["shape"])),
        f"{row['bytes'] / 2**20:.2f}",
        f"{row['trace_share']:.2%}",
    )


def _line(row: tuple[str, ...], width: int) -> str:
    block, kind, parameters, shape, size, trace = row
    line = f"{block:{width}}  {kind:10}  {parameters:>12}  {shape:>16}  {size:>9}  {trace}"
    return line.rstrip()
