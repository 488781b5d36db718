"""Timing, and results as files.

Machines are noisy, so what is compared is measured in one process, alternating, and reported as
ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "curvlinops-diffusion",
    "curvlinops-for-pytorch",
    "diffusers",
    "kronfluence",
    "numpy",
    "scikit-learn",
    "scipy",
    "torch",
)
# views, and what is done on the host
_WITHOUT_KERNEL = {
    *("view", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select"),
    *("alias", "detach", "as_strided", "_unsafe_view", "unfold", "split", "split_with_sizes"),
    *("unbind", "lift_fresh", "promote_types"),
}
_START = time.perf_counter()


class Launches(TorchDispatchMode):
    """Counts kernel launches of a GPU within the context.

    Attributes:
        called: How often each operation of torch's core was called, by its name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.called: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """The number of operations that need a kernel."""
        return sum(n for name, n in self.called.items() if name not in _WITHOUT_KERNEL)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run a function, and count it."""
        self.called[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def alternating(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, called in turn; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if round_number > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def date() -> str:
    """Now, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> dict[str, Any]:
    """Describe what a result depends on; seeds are constants of the programs or in the result."""
    return {
        "date": date(),
        "seconds_until_then": round(time.perf_counter() - _START),
        "commit": _commit(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version_of(name) for name in PACKAGES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str | None:
    """The repository's, with a mark where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def version_of(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every program has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds")
    parser.add_argument(
        "--quick", action="store_true", help="a small problem, to see that the program runs"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def report(
    options: argparse.Namespace, name: str, description: str | None, result: Mapping[str, Any]
) -> None:
    """Print a result, and write it with its question and the machine's description.

    Args:
        options: What :func:`arguments` parsed.
        name: The name of the result; the device's is appended.
        description: The program's, whose first line is its question.
        result: The result.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    question = (description or "").splitlines()[0]
    text = json.dumps({"machine": machine(), "question": question, **result}, indent=2)
    print(text)
    file = f"{name}_{options.device}.json"
    temporary = options.output / f".{file}"
    temporary.write_text(text + "\n")
    temporary.replace(options.output / file)


def report_passes(
    options: argparse.Namespace,
    name: str,
    description: str | None,
    passes: Mapping[str, Callable[[], object]],
    parameters: int,
    examples: int,
) -> None:
    """Measure passes as in :func:`in_training_passes`, and report them."""
    sizes = {"parameters": parameters, "examples": examples}
    report(options, name, description, sizes | in_training_passes(passes, options))


def in_training_passes(
    functions: Mapping[str, Callable[[], object]], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Measure functions, one of which is named ``'training pass'``, as multiples of that one."""
    seconds = alternating(functions, 1 if options.quick else options.repeats)
    unit = seconds["training pass"]
    return {
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "training_passes": {name: round(value / unit, 3) for name, value in seconds.items()},
    }
