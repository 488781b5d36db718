"""What determines a result, so that files of another one are not mistaken for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.digests import fingerprint
from curvlinops_diffusion.encoding import leaves
from curvlinops_diffusion.regression import NoisedRegression


def identity_of(regression: NoisedRegression, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Weights, data, draws and settings, as plain values.

    Args:
        regression: Objective, data and draws.
        settings: What else the result depends on.
    """
    own = {
        "model": fingerprint(regression.objective.model),
        "data": regression.once("data", data_identity),
        "regression": regression.description,
        **settings,
    }
    plain: dict[str, Any] = json.loads(json.dumps(own))  # as it comes back from a file
    return plain


def data_identity(regression: NoisedRegression) -> dict[str, Any]:
    """A digest of the examples with their conditions, and the batches that they come in.

    From one iteration over the data. Sums over other batches of the same examples round
    differently, and cannot be continued.
    """
    digest, sizes = sha256(), []
    for clean in regression.clean_batches():
        sizes.append(len(clean.indices))
        entries = [("x0", clean.x0), *leaves(clean.condition)]
        for position in range(sizes[-1]):
            for name, value in entries:
                digest.update(name.encode())
                one = value[position] if _has_rows(value) else value
                if isinstance(one, Tensor):
                    raw = one.detach().cpu().contiguous()
                    digest.update(f"{raw.dtype}{tuple(raw.shape)}".encode())
                    digest.update(raw.flatten().view(torch.uint8).numpy().tobytes())
                else:
                    digest.update(repr(one).encode())
    batches = sizes[0] if len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0] else sizes
    return {"digest": digest.hexdigest(), "batch_size": batches}


def _has_rows(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two identities differ, as ``name (value there, value here)``."""
    found = []
    for key in sorted({*there, *here}):
        a, b = there.get(key), here.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            short = [str(v)[:12] + "…" if len(str(v)) > 24 else str(v) for v in (a, b)]
            found.append(f"{prefix}{key} ({short[0]} there, {short[1]} here)")
    return found
