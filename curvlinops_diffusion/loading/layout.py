"""Options that say how training data lie on disk, where that cannot be read off them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

#: The columns that are read, and what they are called here.
COLUMNS = {
    "text": "prompt",
    "label": "class_labels",
    "original_size": "original_size",
    "crops_coords_top_left": "crops_coords_top_left",
    "target_size": "target_size",
}
# what shards of WebDataset call them
_WEBDATASET = {"txt": "prompt", "cls": "class_labels"}
#: As the column of captions, the name of each file without its end.
FILE_NAME = "file_name"
#: What ai-toolkit replaces by the trigger word.
TRIGGERS = ("[trigger]", "[name]")
_LINES = Literal["first", "all"]
# what is about prompts, for networks that take them
_OF_PROMPTS = ("caption_extension", "caption_lines", "caption_column", "trigger_word")


@dataclass(frozen=True)
class Layout:
    """Options of :meth:`~curvlinops_diffusion.Attributor.from_pipeline` on how data lie on disk.

    Attributes:
        caption_extension: As there, and so are all but the last.
        caption_lines: Likewise.
        caption_column: Likewise.
        image_column: Likewise.
        trigger_word: Likewise.
        split: Likewise.
        skip_unreadable: Likewise.
        of_queries: Whether they need not have the columns.
    """

    caption_extension: str | None = None
    caption_lines: _LINES = "first"
    caption_column: str | None = None
    image_column: str | None = None
    trigger_word: str | None = None
    split: str | None = None
    skip_unreadable: bool = False
    of_queries: bool = False

    def __post_init__(self) -> None:
        """Check what may be chosen."""
        if self.caption_lines not in get_args(_LINES):
            accepted = " or ".join(map(repr, get_args(_LINES)))
            raise ValueError(f"`caption_lines` must be {accepted}, got {self.caption_lines!r}.")

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> Self:
        """Take what it has out of other options."""
        own = {field.name for field in fields(cls)} & options.keys()
        return cls(**{name: options.pop(name) for name in own})

    def for_queries(self) -> Self:
        """The layout of queries, which lie elsewhere: columns where there are some of the names."""
        return replace(self, split=None, of_queries=True)

    def check_taken(self, key: str | None) -> None:
        """Check that nothing is said of prompts to a network of another condition ``key``.

        Raises:
            ValueError: If something is.
        """
        for name in _OF_PROMPTS if key != "prompt" else ():
            value = getattr(self, name)
            if value != getattr(Layout, name):
                takes = "no condition" if key is None else "labels"
                raise ValueError(f"The network takes {takes}, got {name}={value!r}. Leave it out.")

    @property
    def end(self) -> str | None:
        """The end of captions' names, with its dot."""
        end = self.caption_extension
        return None if end is None else f".{end.removeprefix('.')}"

    @property
    def file_columns(self) -> tuple[str, ...]:
        """The columns of metadata that may name the image's file, as ``datasets`` calls them."""
        column, usual = self.image_column, (FILE_NAME, "image_file_name")
        asked = () if column is None else (column, f"{column}_file_name")
        return (*asked, *usual) if self.of_queries or not asked else asked

    def check_no_columns(self, where: str) -> None:
        """Check that no column is asked for of images that have none; ``file_name`` all have.

        Raises:
            ValueError: If one is.
        """
        for name in ("caption_column", "image_column") if not self.of_queries else ():
            value = getattr(self, name)
            if value is not None and (name, value) != ("caption_column", FILE_NAME):
                raise ValueError(
                    f"`{name}` must be left out, got {value!r}: {where} has no columns, of "
                    "metadata.jsonl, say."
                )

    def columns(self, found: Collection[str], where: str) -> dict[str, str]:
        """The columns to read, of those that are found, with their names here.

        Raises:
            ValueError: If that of captions is none of them.
        """
        wanted = self.caption_column
        there = wanted in found and wanted != FILE_NAME
        if not (there or wanted in (None, FILE_NAME) or self.of_queries):
            raise ValueError(
                f"`caption_column` must be a column of {where}, got {wanted!r}. There are "
                f"{', '.join(sorted(found)) or 'none'}: pass one of them, or leave it out."
            )
        known = COLUMNS | (_WEBDATASET if "__key__" in found else {})
        if there or (wanted == FILE_NAME and not self.of_queries):
            known = {theirs: ours for theirs, ours in known.items() if ours != "prompt"}
            known |= {str(wanted): "prompt"} if there else {}
        return {theirs: ours for theirs, ours in known.items() if theirs in found}
