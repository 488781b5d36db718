"""Repositories on the Hub: from its cache on this machine, else downloaded, no code and no pickle.

``owner/name`` is a repository, ``owner/name/file`` or ``owner/name:file`` a file in one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from curvlinops_diffusion.loading.folders import SUFFIXES

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:[:/](.+))?")
_TEXTS = ["*.json", "*.txt", "*.model", "*.tiktoken"]
_PATTERNS = {
    "pipeline": [*_TEXTS, "*/*.safetensors"],  # none beside model_index.json, of another form
    # and what trainers leave of their settings
    "adapter": ["*.json", "*.safetensors", "config.yaml", "*hparams.yml", "README.md"],
    "data": [f"*{end}" for end in sorted(SUFFIXES)],
}
_PATTERNS["data"] += ["*.json", "*.jsonl", "*.csv", "*.txt", "*.caption", "*.toml"]
_PATTERNS["data"] += ["*.parquet", "*.arrow", "*.npz"]
# the same weights once more
_VARIANTS = [
    f"*.{name}{end}" for name in ("fp16", "bf16", "non_ema") for end in (".safetensors", "-*")
]


def on_hub(
    text: str,
    kind: Literal["pipeline", "adapter", "data"],
    check: Callable[[Path], None],
    variant: str | None = None,
) -> Path:
    """Find a path on disk, or a repository or file in the Hub's cache or on the Hub.

    What is all there, by ``check``, is not asked for on the network, and nothing is if
    ``HF_HUB_OFFLINE`` is set.

    Raises:
        ValueError: If nothing is on disk and nothing can be downloaded.
    """
    match, path = _ID.fullmatch(text), Path(text)
    # of a folder that is here another file was meant, and no repository is called as files are
    if match is None or Path(path.parts[0]).exists() or match[1].endswith(".safetensors"):
        return path
    # not before it is needed: it takes a while to import
    from huggingface_hub import constants, snapshot_download

    name, file = match[1], match[2]
    others = [p for p in _VARIANTS if variant is None or variant not in p]

    def found(local: bool) -> Path:
        there = snapshot_download(
            name,
            repo_type="dataset" if kind == "data" else "model",
            allow_patterns=[file] if file else _PATTERNS[kind],
            ignore_patterns=others if kind == "pipeline" else None,
            local_files_only=local,
        )
        whole = Path(there) / file if file else Path(there)
        if not whole.exists():
            raise FileNotFoundError(f"it holds no '{file}'")
        return whole

    cached: Path | None = None
    try:
        cached = found(local=True)
        check(cached)
        return cached
    except Exception:  # it is not there, or not all of it
        if cached is not None and constants.HF_HUB_OFFLINE:
            return cached  # what is missing is told by whoever reads it
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"'{text}' does not exist, nor is the repository '{name}' in the Hub's cache "
            f"'{constants.HF_HUB_CACHE}', and HF_HUB_OFFLINE is set, so that none is downloaded. "
            "Pass a path, or download it first."
        )
    try:
        return found(local=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(
            f"'{text}' does not exist, and the repository '{name}' cannot be had from the Hub: "
            f"{reason}. Pass a path, or an id as owner/name or owner/name/file."
        ) from error
