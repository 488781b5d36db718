"""The recipe of a training, read from the files of its trainer, and the options that it decides.

The door and the program have it from here. Without PyTorch, so that the program starts without.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curvlinops_diffusion.loading.dataset_config import DatasetConfig, is_config
from curvlinops_diffusion.loading.saved_networks import check_whole
from curvlinops_diffusion.loading.trainer_entries import (
    Base,
    Entries,
    Setting,
    family_of,
    plain,
)
from curvlinops_diffusion.loading.trainers import TRAINERS

#: The option that holds others, and what they are called beside the rest.
ARGUMENTS = "training_arguments"
_KOHYA, _DIFFUSERS, _ONETRAINER, _AI_TOOLKIT, _SIMPLETUNER = TRAINERS
# entries that name the base, by its name and by its kind
_NAMES = (
    "ss_sd_model_name",
    "ss_base_model",
    "pretrained_model_name_or_path",
    "base_model_name",
    "base_model_name_or_path",
    "base_model",
)
# arguments of kohya's scripts that are called otherwise in a header
_AS_IN_HEADERS = {
    "debiased_estimation_loss": "debiased_estimation",
    "pretrained_model_name_or_path": "sd_model_name",
    "vae": "vae_name",
    "max_train_epochs": "num_epochs",
    "caption_extention": "caption_extension",
}
_KINDS = ("ss_base_model_version", "modelspec.architecture", "model_type", "model_family", "arch")


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of a run, as its trainer left them.

    Attributes:
        trainer: The trainer; empty if none is known by what is there.
        source: The file that its entries were read from.
        entries: Its entries.
    """

    trainer: str
    source: Path
    entries: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base_name(self) -> str | None:
        """The name of the base that was trained on."""
        found = (self.entries.get(name) for name in _NAMES)
        found = (name[0] if isinstance(name, list) and name else name for name in found)
        return next((str(name) for name in found if name and name != "None"), None)

    @property
    def base_family(self) -> str | None:
        """The beginning of the class of its pipeline."""
        if str(self.entries.get("ss_v2")) == "True":
            return "StableDiffusion"
        found = (family_of(str(self.entries.get(name, ""))) for name in _KINDS)
        return next((family for family in found if family), None)

    def of(self, base: Base) -> list[Setting]:
        """Read the meaning of each entry for a pipeline.

        Raises:
            ValueError: If it was trained on a pipeline of another kind, or an entry is damaged.
        """
        trained_on, here = self.base_family, base.family
        if trained_on and here and trained_on != here:
            raise ValueError(
                f"'{self.source}' was trained on a {trained_on}Pipeline"
                f"{f' ({self.base_name})' if self.base_name else ''}, got a {base.kind}. Pass the "
                "pipeline that it was trained on."
            )
        if not self.trainer:
            prompt = self.entries.get("instance_prompt")
            return [Setting(f"instance_prompt={prompt}", "prompt", prompt)] if prompt else []
        return list(TRAINERS[self.trainer](Entries(self.entries, str(self.source)), base))

    def about_base(self, base: Base) -> Iterator[str]:
        """Compare the base by the hash of its file where that lies there, else by its name."""
        name = self.base_name
        if name is None or not base.name:
            return
        here, last = Path(base.name), re.split(r"[/\\]", name.rstrip("/\\"))[-1]
        short = self.entries.get("ss_sd_model_hash")
        for folder in (here, here.parent, self.source.parent):
            file = folder / last
            if short and file.is_file():
                with file.open("rb") as opened:  # a part of it is hashed by kohya's scripts
                    opened.seek(0x100000)
                    same = hashlib.sha256(opened.read(0x10000)).hexdigest()[:8] == short
                what = "is the file" if same else "has another hash than the file"
                yield f"'{file}' {what} that was trained on"
                return
        known = last.removesuffix(".safetensors").removesuffix(".ckpt")
        # the Hub's folders have slashes as two dashes
        if known != here.name and name.replace("/", "--") not in base.name:
            yield f"trained on '{name}', got '{base.name}': the same weights are needed"


def base_in(folder: Path, name: Path | None = None) -> Base:
    """A pipeline by the folder of its configs alone; ``name`` is the single file that it is in."""

    def config(*parts: str) -> dict[str, Any]:
        file = folder.joinpath(*parts)
        return _parsed(file) if file.is_file() else {}

    guided = bool(config("transformer", "config.json").get("guidance_embeds"))
    scheduler = config("scheduler", "scheduler_config.json")
    kind = str(config("model_index.json").get("_class_name", ""))
    return Base(kind, scheduler, guided, str(name or folder))


def read_settings(path: Path) -> TrainerSettings:
    """Read what a trainer left in an adapter's file or folder, or in a file of its own.

    The header of the weights; of ai-toolkit, SimpleTuner and OneTrainer the config in the folder;
    of ``diffusers``' scripts what ``accelerate`` logged; else PEFT's config and the model card,
    which name the base.

    Raises:
        ValueError: If there is no such file, or it is damaged.
    """
    if not path.exists():
        raise ValueError(f"'{path}' does not exist. Pass an adapter, or a trainer's config.")
    if path.is_file() and path.suffix != ".safetensors":
        found = _of_config(path)
        if not found.trainer:
            known = ", ".join(TRAINERS)
            raise ValueError(f"'{path}' is no config of {known}. Pass an adapter, or one of these.")
        return found
    folder = path if path.is_dir() else path.parent
    files = [file for file in sorted(path.glob("*.safetensors")) if file.name[0] != "."]
    # of several files, which are of one run, the last
    weights = path if path.is_file() else files[-1] if files else None
    header = {} if weights is None else _header(weights)
    if weights is not None and "ot_config" in header:
        config = plain(header["ot_config"])
        if not isinstance(config, dict):
            raise ValueError(
                f"'{weights}' holds a damaged ot_config. Pass `recipe='none'`, and what training "
                "did by the options."
            )
        return TrainerSettings(_ONETRAINER, weights, {**header, **config})
    if weights is not None and {"ss_session_id", "ss_network_module"} & header.keys():
        return TrainerSettings(_KOHYA, weights, header)
    run = [folder.parent] if folder.name.startswith("checkpoint") else []
    for one in (folder, *run):
        for name in ("config.yaml", "simpletuner_config.json", "config.json"):
            if (one / name).is_file():
                found = _of_config(one / name)
                if found.trainer:
                    return found
        logs = sorted(one.glob("logs/*/*/hparams.yml"), key=lambda file: file.stat().st_mtime)
        if logs:
            return _of_config(logs[-1])
    named = header | _card(folder) | _peft(folder)
    return TrainerSettings("", weights or folder, named)


def _header(file: Path) -> dict[str, Any]:
    """The strings in the header of a safetensors file."""
    check_whole(file)
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        found = json.loads(opened.read(length)).get("__metadata__")
    if found is not None and not (
        isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    ):
        raise ValueError(f"'{file}' has a damaged header. Download or copy it again.")
    return found or {}


def _of_config(file: Path) -> TrainerSettings:
    """A config of a trainer, by what is in it; of no known one, nothing."""
    values = _parsed(file)
    if file.suffix == ".toml":
        tables = [values, *(own for own in values.values() if isinstance(own, dict))]
        given = {key: own for table in tables for key, own in table.items()}
        entries = {f"ss_{_AS_IN_HEADERS.get(key, key)}": own for key, own in given.items()}
        if given.keys() & {"min_timestep", "max_timestep"}:
            levels = f"{given.get('min_timestep', 0)},{given.get('max_timestep', 1000)}"
            entries["modelspec.timestep_range"] = levels
        return TrainerSettings(_KOHYA, file, entries)
    try:
        process = values["config"]["process"][0]
    except (KeyError, IndexError, TypeError):
        process = None
    if isinstance(process, dict) and "train" in process:
        model = process["model"] if isinstance(process.get("model"), dict) else {}
        kinds = {"is_xl": "sdxl", "is_flux": "flux", "is_v3": "sd3", "is_lumina2": "lumina2"}
        arch = next((kind for key, kind in kinds.items() if model.get(key)), model.get("arch"))
        named = {"base_model": model.get("name_or_path"), "arch": arch}
        return TrainerSettings(_AI_TOOLKIT, file, process | named)
    plainly = {key.removeprefix("--"): value for key, value in values.items()}
    if "model_family" in plainly:
        return TrainerSettings(_SIMPLETUNER, file, plainly)
    if {"training_method", "model_type"} <= values.keys():
        return TrainerSettings(_ONETRAINER, file, values)
    if file.name == "hparams.yml":
        return TrainerSettings(_DIFFUSERS, file, values)
    return TrainerSettings("", file)


def _parsed(file: Path) -> dict[str, Any]:
    """The values of a file of JSON, TOML or YAML."""
    try:
        parse = {".toml": tomllib.loads, ".json": json.loads}.get(file.suffix, _of_yaml)
        values = parse(file.read_text(encoding="utf-8-sig"))
    except Exception as error:  # of three parsers
        said = " ".join(str(error).split())
        raise ValueError(
            f"'{file}' cannot be read ({said}). Copy it again, or pass `recipe='none'`."
        ) from error
    return values if isinstance(values, dict) else {}


def _of_yaml(text: str) -> Any:
    """The values of a text; of tuples the entries, of other objects of Python nothing."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def plainly(loader: Any, kind: str, node: Any) -> Any:
        return loader.construct_sequence(node) if kind == "tuple" else None

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", plainly)
    loader = Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _card(folder: Path) -> dict[str, Any]:
    """The entries at the top of a model card."""
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8-sig", errors="replace") if file.is_file() else ""
    parts = text.split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    import yaml

    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:  # of a text for people, which decides nothing by itself
        return {}
    return found if isinstance(found, dict) else {}


def _peft(folder: Path) -> dict[str, Any]:
    """The name of the base in PEFT's config, of the first part that has one."""
    file_name, name = "adapter_config.json", "base_model_name_or_path"
    files = (*folder.glob(file_name), *sorted(folder.glob(f"*/{file_name}")))
    named = ({name: base} for file in files if (base := _parsed(file).get(name)))
    return next(named, {})


# ---------------------------------------------------------------------------------------------
# Deciding options
# ---------------------------------------------------------------------------------------------


def by_hand(
    values: Mapping[str, Any], defaults: Mapping[str, Any], named: Collection[str] = ()
) -> dict[str, Any]:
    """The options that are decided already: those that were named, or are not at their defaults.

    Args:
        values: The options; ``None`` is what nobody decides.
        defaults: Their defaults; options without are decided.
        named: Those that were given, perhaps at their defaults.
    """

    def is_usual(name: str, value: Any) -> bool:
        usual, plainly = defaults.get(name), str | float | int
        return isinstance(usual, plainly) and isinstance(value, plainly) and value == usual

    return {
        name: value
        for name, value in values.items()
        if value is not None and (name in named or not is_usual(name, value))
    }


def by_data(
    data: Any, given: Mapping[str, Any], known: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Decide options by a ``dataset.toml``; other data decide none. As :func:`by_recipe`.

    Raises:
        ValueError: If it is damaged, or training saw something that cannot be expressed.
    """
    options, lines = dict[str, Any](), list[str]()
    for name, value in DatasetConfig(data).settings.items() if is_config(data) else ():
        by = f"by '{Path(data)}'"
        if name not in given and name in known:
            options[name] = value
        elif name not in given:
            lines.append(f"not applied: `{name}={value!r}` {by}")
        elif given[name] != value:
            lines.append(f"`{name}={given[name]!r}` is given, against {value!r} {by}")
    return options, lines


def by_recipe(
    recipe: Path, base: Base, given: Mapping[str, Any], known: Collection[str], data: Any = None
) -> tuple[dict[str, Any], list[str]]:
    """Decide options by the files of a trainer; those that are given stand.

    Args:
        recipe: The adapter's file or folder, or the config of its trainer.
        base: The pipeline.
        given: Options that are decided already; ``training_arguments`` by their names.
        known: The options that there are.
        data: The training images; a ``dataset.toml`` says itself what was made of them.

    Returns:
        The options, ``training_arguments`` with those that are given, and notes for people, a
        line each.

    Raises:
        ValueError: If the files are damaged, of another kind of pipeline, or change the objective
            in a way that no option expresses.
    """
    arguments = dict(given.get(ARGUMENTS) or {})
    flat = {name: value for name, value in given.items() if name != ARGUMENTS}
    flat |= {f"{ARGUMENTS}.{name}": value for name, value in arguments.items()}
    found, lines = settle(read_settings(recipe), base, flat, known, is_config(data))
    inner = {name: found.pop(name) for name in list(found) if "." in name}
    if inner:
        inner = {name.partition(".")[2]: value for name, value in inner.items()}
        found[ARGUMENTS] = {**arguments, **inner}
    return found, lines


def settle(
    found: TrainerSettings,
    base: Base,
    given: Mapping[str, Any],
    known: Collection[str],
    listed: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Decide options by settings, as :func:`by_recipe`; ``training_arguments.…`` stand apart.

    ``listed`` if the images are those of a trainer's file, which says itself what was made of them.

    Raises:
        ValueError: If the trainer changed the objective in a way that no option expresses; or as
            :meth:`TrainerSettings.of`.
    """
    options: dict[str, Any] = {}
    lines, refused = list(found.about_base(base)), list[Setting]()
    if not found.trainer:
        lines.append(f"no settings of a trainer known here are in or beside '{found.source}'")
    for setting in found.of(base):
        option, value = setting.option, setting.value
        entry = f"{setting.entry} of '{found.source.name}'"
        if option == "snr_gamma" and given.get("weighting", "min-snr") != "min-snr":
            continue  # of the weighting that is not taken
        if listed and setting.of_data and setting.refused:
            continue
        if setting.note:
            lines.append(f"{entry}: {setting.note}")
        elif option in given:
            if setting.refused or not _same(option, given[option], value):
                lines.append(f"{_shown(option, given[option])} is given, against {entry}")
        elif setting.refused:
            refused.append(setting)
        elif value == setting.usual or not (value or setting.usual):
            continue  # as it is without the option
        elif option.partition(".")[0] not in known:
            lines.append(f"not applied: {entry} ({option}={value!r}), for which there is no option")
        elif option not in options:
            options[option] = value
            lines.append(f"{_shown(option, value)}, by {entry}")
    if refused:
        shown = ", ".join(_shown(*item) for item in options.items()) or "none"
        said = "; ".join(f"{setting.entry} {setting.refused}" for setting in refused)
        by_hand = list(dict.fromkeys(f"`{setting.option}`" for setting in refused))
        decide = "" if "``" in by_hand else f"{' and '.join(by_hand)} to decide it by hand, or "
        raise ValueError(
            f"'{found.source}' is of a training by {found.trainer} whose objective no options "
            f"express: {said}. Pass {decide}`recipe='none'` to go without; it also says: {shown}."
        )
    return options, lines


def _same(option: str, given: Any, value: Any) -> bool:
    """Compare an option that is given with the value that a trainer left."""
    if option == "timesteps" and value is None:
        return given in ("uniform", "stratified")
    return bool(given == value or (not given and not value))


def _shown(option: str, value: Any) -> str:
    """An option with its value, as messages have it."""
    outer, dot, name = option.partition(".")
    return f"`{outer}` {name}={json.dumps(value)}" if dot else f"`{option}={value!r}`"
