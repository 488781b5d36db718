"""Reads the data set configuration of kohya's ``sd-scripts``: ``dataset.toml``, or JSON."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from os.path import commonpath
from pathlib import Path
from typing import Any

from curvlinops_diffusion.loading.metadata import decoded

#: How the names of such files end.
SUFFIXES = (".toml", ".json")
_COUNTS = ("batch_size", "bucket_reso_steps", "max_bucket_reso", "min_bucket_reso", "resolution")


def _kinds(**names: str) -> dict[str, tuple[type, ...]]:
    """The options of a table, with the types that each may be of."""
    kinds: dict[str, tuple[type, ...]] = {"count": (int,), "number": (int, float), "flag": (bool,)}
    kinds |= {"text": (str,), "list": (list,), "table": (dict,), "side": (int, list)}
    return {name: kinds[kind] for kind, own in names.items() for name in own.split()}


# options of outer tables hold for the inner ones
_OF_DATASETS = _kinds(
    count="batch_size bucket_reso_steps max_bucket_reso min_bucket_reso validation_seed",
    flag="bucket_no_upscale enable_bucket",
    number="network_multiplier validation_split",
    side="resolution",
)
_OF_SUBSETS = _kinds(
    flag="color_aug flip_aug random_crop shuffle_caption enable_wildcard cache_info",
    count="num_repeats keep_tokens token_warmup_min caption_dropout_every_n_epochs",
    text="caption_extension class_tokens caption_prefix caption_suffix keep_tokens_separator "
    "secondary_separator caption_separator resize_interpolation",
    number="caption_dropout_rate caption_tag_dropout_rate token_warmup_step",
    list="face_crop_aug_range",
    table="custom_attributes",
)
_OF_ONE = _kinds(
    text="image_dir metadata_file conditioning_data_dir",
    flag="is_reg alpha_mask",
)
# what changes what the network is shown, and no option of ours expresses
_REFUSED = {
    "color_aug": "changes colours at random",
    "face_crop_aug_range": "cuts around faces",
    "alpha_mask": "weights pixels by their alpha",
    "enable_wildcard": "chooses lines and words of captions at random",
    "caption_dropout_every_n_epochs": "drops all captions of some epochs",
    "conditioning_data_dir": "shows the network another image",
    "validation_split": "leaves out images that are not named",
}
# what decides nothing that is computed here, or is not followed
_UNREAD = (
    "validation_seed",
    "custom_attributes",
    "cache_info",
    "token_warmup_min",
    "token_warmup_step",
)
_OF_BUCKETS = {
    "bucket_reso_steps": "bucket_step",
    "min_bucket_reso": "bucket_min",
    "max_bucket_reso": "bucket_max",
    "bucket_no_upscale": "bucket_no_upscale",
}
_RESIZED = {
    "bilinear": "bilinear",
    "linear": "bilinear",
    "bicubic": "bicubic",
    "cubic": "bicubic",
    "lanczos": "lanczos",
}
_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"}


def is_config(given: Any) -> bool:
    """Tell whether data are given as such a file, by its name alone."""
    return isinstance(given, str | PathLike) and Path(given).suffix.lower() in SUFFIXES


@dataclass(frozen=True)
class ListedImage:
    """An image as training saw it.

    Attributes:
        file: Its file.
        prompt: Its prompt.
        kept: The tags at both ends of it that stay where they are; ``None`` for all.
        times: How often training saw it in an epoch.
        batch_size: The size of batches that it came in.
        regularises: Whether it is there to preserve a prior.
    """

    file: Path
    prompt: str
    kept: tuple[int, int] | None
    times: int
    batch_size: int
    regularises: bool


def names_of(images: Sequence[ListedImage]) -> list[str]:
    """Paths below the folder that holds all images, numbered where one is listed again."""
    whole = [str(image.file.absolute()) for image in images]
    around = Path(commonpath([str(Path(name).parent) for name in whole]))
    seen: Counter[str] = Counter()
    names = []
    for name in whole:
        seen[name] += 1
        again = f" ({seen[name]})" if seen[name] > 1 else ""
        names.append(Path(name).relative_to(around).as_posix() + again)
    return names


def weights_of(images: Sequence[ListedImage]) -> list[float] | None:
    """Weigh images by how often each was seen, on average 1; ``None`` if all alike.

    A loss is the mean over a batch, of which there are more where they are smaller.
    """
    times = [image.times / image.batch_size for image in images]
    return None if len(set(times)) == 1 else [each * len(times) / sum(times) for each in times]


class DatasetConfig:
    """A file that lists data, checked.

    Attributes:
        path: The file.
        unread: Options in it that decide nothing here, or are not followed.
        settings: The options of ours that it decides.

    Raises:
        ValueError: If it cannot be read, an option is unknown or of another kind, or training saw
            something that cannot be expressed.
    """

    def __init__(self, path: str | PathLike[str]):
        self.path = Path(path)
        tables = self._parsed()
        general = self._table(tables.get("general", {}), "[general]", _OF_DATASETS | _OF_SUBSETS)
        self._subsets: list[_Subset] = []
        found = tables.get("datasets")
        datasets = found if isinstance(found, list) else []
        if not datasets or tables.keys() - {"general", "datasets"}:
            raise ValueError(
                f"'{self.path}' must hold [[datasets]] with [[datasets.subsets]], and perhaps "
                f"[general], got {sorted(tables)}. Pass the file that kohya's scripts were given "
                "as --dataset_config, or a folder of images."
            )
        for number, dataset in enumerate(datasets, 1):
            own = dict(dataset) if isinstance(dataset, dict) else {}
            subsets = own.pop("subsets", None)
            where = f"[[datasets]] {number}"
            outer = self._table(own, where, _OF_DATASETS | _OF_SUBSETS)
            for place, subset in enumerate(subsets if isinstance(subsets, list) else [], 1):
                within = f"[[datasets.subsets]] {place} of {where}"
                inner = self._table(subset, within, _OF_SUBSETS | _OF_ONE)
                options = general | outer | inner
                self._subsets.append(_Subset(self.path, within, number, options))
        if not self._subsets:
            raise ValueError(f"'{self.path}' has no [[datasets.subsets]]. Name folders of images.")
        named = {
            name for subset in self._subsets for name, value in subset.options.items() if value
        }
        for name, what in _REFUSED.items():
            if name in named:
                raise ValueError(
                    f"'{self.path}' has {name}, which {what}, and scores would be of another "
                    "training. Take it out if this training did not have it."
                )
        if any(subset.options.get("network_multiplier", 1) != 1 for subset in self._subsets):
            raise ValueError(f"'{self.path}' has a network_multiplier that is not 1. Take it out.")
        self.unread = [name for name in _UNREAD if name in named]
        self.settings = dict(self._settings())

    def _parsed(self) -> dict[str, Any]:
        try:
            text = decoded(self.path)
            is_json = self.path.suffix.lower() == ".json"
            found = json.loads(text) if is_json else tomllib.loads(text)
        except OSError as error:
            raise ValueError(f"'{self.path}' cannot be read: {error.strerror}.") from error
        except (json.JSONDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise ValueError(
                f"'{self.path}' is not understood: {error}. Write it as kohya's scripts read it "
                "(in TOML, paths with backslashes stand in single quotes)."
            ) from error
        return found if isinstance(found, dict) else {}

    def _table(
        self, table: Any, where: str, known: Mapping[str, tuple[type, ...]]
    ) -> dict[str, Any]:
        """Check the options of a table."""
        if not isinstance(table, dict):
            raise ValueError(f"{where} of '{self.path}' must be a table, got {table!r}.")
        for name, value in table.items():
            if name not in known:
                meant = difflib.get_close_matches(name, known, 1)
                raise ValueError(
                    f"{where} of '{self.path}' has the option '{name}', which kohya's scripts do "
                    f"not know there.{f' Is {meant[0]} meant?' if meant else ' Take it out.'}"
                )
            kinds, wanted = known[name], ""
            if not isinstance(value, kinds) or (bool not in kinds and isinstance(value, bool)):
                wanted = " or ".join(kind.__name__ for kind in kinds)
            elif name in _COUNTS and isinstance(value, int) and value < 1:
                wanted = "at least 1"
            if wanted:
                raise ValueError(
                    f"{where} of '{self.path}': {name} must be {wanted}, got {value!r}."
                )
        return table

    def _settings(self) -> Iterator[tuple[str, Any]]:
        """Yield the options of ours that it decides."""
        resolution, bucketed = self._shared("resolution"), self._shared("enable_bucket")
        if isinstance(resolution, list):
            if len(resolution) != 2 or len(set(resolution)) != 1:
                raise ValueError(
                    f"'{self.path}' has the resolution {resolution}, and `resolution` is the side "
                    "of a square. Prepare the images at that size, and pass their folder."
                )
            resolution = resolution[0]
        if resolution is not None:
            yield "resolution", resolution
        if bucketed:
            yield "buckets", True
            for theirs, ours in _OF_BUCKETS.items():
                if (value := self._shared(theirs)) is not None:
                    yield ours, value
        elif bucketed is False and resolution is not None:
            yield "buckets", "square"  # to which images are resized as to any other bucket
        if (how := self._shared("resize_interpolation")) is not None:
            if how not in _RESIZED:
                raise ValueError(
                    f"'{self.path}' has resize_interpolation '{how}', and `interpolation` may be "
                    f"{', '.join(dict.fromkeys(_RESIZED.values()))}."
                )
            yield "interpolation", _RESIZED[how]
        if self._shared("random_crop"):
            if bucketed is False:
                raise ValueError(
                    f"'{self.path}' has random_crop without enable_bucket: parts of images that "
                    "are not resized, which cannot be expressed. Take one of them out if it was "
                    "not so."
                )
            yield "random_crop", True
        if self._shared("flip_aug"):
            yield "augment", "flip"
        if dropped := self._shared("caption_dropout_rate"):
            yield "condition_dropout", float(dropped)
        if dropped := self._shared("caption_tag_dropout_rate"):
            self._shared("shuffle_caption")  # of captions in order, too, tags are left out
            yield "tag_dropout", float(dropped)
        if any(subset.options.get("shuffle_caption") for subset in self._subsets):
            yield "shuffle_captions", True

    def _shared(self, name: str) -> Any:
        """An option that all subsets must share; ``None`` if it is not there."""
        first = self._subsets[0]
        for other in self._subsets:
            one, two = first.options.get(name), other.options.get(name)
            if (one or None) != (two or None):  # those that are not there are off
                raise ValueError(
                    f"'{self.path}' has {name} {one} in {first.where} and {two} in {other.where}, "
                    "and here all images of a run share it. Make it the same, or attribute to each "
                    "with a file of its own."
                )
        values = (subset.options.get(name) for subset in self._subsets)
        return next((value for value in values if value is not None), None)

    def images(self, caption_extension: str | None = None) -> tuple[list[ListedImage], list[str]]:
        """Find the images and read their captions; return notes on them, too, a clause each.

        The names of captions end in ``caption_extension`` where the file does not say so; without,
        in ``.caption``, as of kohya's scripts.

        Raises:
            ValueError: If a folder or file is missing or damaged, or there are no images.
        """
        varies = bool(self.settings.keys() & {"shuffle_captions", "tag_dropout"})
        found: list[ListedImage] = []
        notes: list[str] = []
        for number in dict.fromkeys(subset.dataset for subset in self._subsets):
            first: dict[str, _Subset] = {}  # a folder that is named again is not read again
            for subset in self._subsets:
                if subset.dataset == number:
                    first.setdefault(subset.source, subset)
            own: list[ListedImage] = []
            for subset in first.values():
                images, said = subset.images(caption_extension or ".caption", varies)
                own += images
                notes += said
            train = [image for image in own if not image.regularises]
            prior = [image for image in own if image.regularises]
            seen = _balanced([i.times for i in prior], sum(i.times for i in train))
            if 0 in seen:
                notes.append(f"{seen.count(0)} regularisation image(s) that training did not reach")
            found += train
            found += [replace(i, times=n) for i, n in zip(prior, seen, strict=True) if n]
        if not found:
            raise ValueError(f"'{self.path}' names no images: {'; '.join(notes)}.")
        return found, notes


@dataclass(frozen=True)
class _Subset:
    """A table of images, with what the tables around it say."""

    path: Path
    where: str
    dataset: int
    options: Mapping[str, Any]

    @property
    def source(self) -> str:
        """Its file or folder, by which a second table of it is known."""
        return str(self.options.get("metadata_file") or self.options.get("image_dir"))

    def _found(self, option: str) -> Path:
        """A folder or file as it is named, or relative to the config."""
        named = str(self.options[option])
        for place in (Path(named), self.path.parent / named):
            if place.exists():
                return place
        raise ValueError(
            f"'{named}', the {option} of {self.where} of '{self.path}', does not exist here. Edit "
            f"{option}; relative paths are below the current folder, or that of the file."
        )

    def images(self, extension: str, varies: bool) -> tuple[list[ListedImage], list[str]]:
        """Find its images in order, with notes; ``varies`` if any captions differ by draw."""
        own, text = self.options, self.options.get("class_tokens") or ""
        times, prior = int(own.get("num_repeats", 1)), bool(own.get("is_reg"))
        if times < 1:
            return [], [f"none of '{self.source}', which is repeated {times} times"]
        captions = list(self._captions(extension))
        notes = [
            f"{times} × {len(captions)} {'regularisation ' * prior}image(s) of '{self.source}'"
        ]
        if bare := [file.name for file, caption in captions if caption is None]:
            notes.append(f"{len(bare)} without a caption ({bare[0]}, …), with {text!r} as prompt")
        size = int(own.get("batch_size", 1))
        made = ((file, self._prompt(text if c is None else c, varies)) for file, c in captions)
        return [ListedImage(file, *prompt, times, size, prior) for file, prompt in made], notes

    def _captions(self, extension: str) -> Iterator[tuple[Path, str | None]]:
        """Yield the images with their captions; ``None`` for none."""
        if "metadata_file" in self.options:
            yield from self._of_metadata(self._found("metadata_file"))
            return
        if "image_dir" not in self.options:
            raise ValueError(f"{self.where} of '{self.path}' has no image_dir. Name the folder.")
        folder = self._found("image_dir")
        if not folder.is_dir():
            raise ValueError(f"'{folder}', the image_dir of {self.where}, is a file.")
        end = str(self.options.get("caption_extension") or extension)
        end = end if end.startswith(".") else f".{end}"
        for file in sorted(folder.iterdir(), key=str):
            if file.suffix.lower() in _IMAGES and file.name[0] != "." and file.is_file():
                yield file, _caption_of(file, end)

    def _of_metadata(self, file: Path) -> Iterator[tuple[Path, str]]:
        """Yield the images of fine-tuning, whose captions are tags after a sentence."""
        lines = file.suffix.lower() == ".jsonl"
        try:
            text = decoded(file)
            rows = map(json.loads, filter(str.strip, text.split("\n"))) if lines else ()
            found = {row["image_path"]: row for row in rows} if lines else json.loads(text)
            entries = [(str(key), dict(entry)) for key, entry in found.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wanted = '{"a.png": {"caption": "a cat"}}'
            wanted = '{"image_path": "a.png", "caption": "a cat"}' if lines else wanted
            raise ValueError(
                f"'{file}' is not understood ({error}). It must be like {wanted}."
            ) from error
        folder = self._found("image_dir") if "image_dir" in self.options else file.parent
        separator = self.options.get("caption_separator", ",")
        for key, entry in entries:
            image = folder / key
            if not image.is_file():
                alike = [p for p in image.parent.glob("*") if p.stem == image.name]
                image = next((p for p in alike if p.suffix.lower() in _IMAGES), image)
            if not image.is_file():
                raise ValueError(f"'{image}' does not exist, which '{file}' names. Put it there.")
            parts = [str(entry.get(name) or "") for name in ("caption", "tags")]
            yield image, separator.join(filter(None, parts))

    def _prompt(self, caption: str, varies: bool) -> tuple[str, tuple[int, int] | None]:
        """A prompt as training has it, and the tags at its ends that stay where they are."""
        own, separator = self.options, self.options.get("caption_separator", ",")
        text = f"{own['caption_prefix']} {caption}" if own.get("caption_prefix") else caption
        text = f"{text} {own['caption_suffix']}" if own.get("caption_suffix") else text
        text, inner = text.split("\n")[0], own.get("secondary_separator")
        kept = max(int(own.get("keep_tokens", 0)), 0), 0
        if not (own.get("shuffle_caption") or own.get("caption_tag_dropout_rate")):
            # where no subset says it, the command of training may have, and the user's option
            stays = varies or "shuffle_caption" in own
            return text.replace(inner, separator) if inner else text, None if stays else kept
        if separator != "," or (inner and inner in text):
            name = "caption_separator" if separator != "," else "secondary_separator"
            raise ValueError(
                f"{self.where} of '{self.path}' varies captions by {name} {own[name]!r}, and tags "
                "are separated by commas here. Write the captions so."
            )
        end = own.get("keep_tokens_separator")
        if end and end in text:
            parts = [
                [t.strip() for t in part.split(",") if t.strip()] for part in text.split(end, 2)
            ]
            tags = [tag for part in parts for tag in part]
            return ", ".join(tags), (len(parts[0]), len(parts[2]) if len(parts) > 2 else 0)
        return text, kept


def _caption_of(image: Path, end: str) -> str | None:
    """Read the first line of the caption beside an image, whose name may end in a face's place."""
    stems = [image.stem]
    if len(words := image.stem.split("_")) >= 5:
        stems.append("_".join(words[:-4]))
    for stem in stems:
        file = image.with_name(stem + end)
        if file.is_file():
            text = decoded(file)
            if not text:
                raise ValueError(f"The caption '{file}' is empty. Write it, or remove the file.")
            return re.split(r"\r\n|\r|\n", text)[0].strip()
    return None


def _balanced(repeats: list[int], wanted: int) -> list[int]:
    """Count how often each regularisation image is seen, as many in all as are wanted."""
    # first each as often as it is repeated, while they are wanted; then one more of each in turn
    seen, turn = [0] * len(repeats), repeats
    while wanted > 0 and repeats:
        for n, times in enumerate(turn):
            if wanted > 0:
                seen[n] += times
                wanted -= times
        turn = [1] * len(repeats)
    return seen
