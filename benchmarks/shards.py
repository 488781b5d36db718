"""What do factors and networks take that are shared among processes?

EK-FAC of a UNet of 2.8 million parameters, by one, two and four processes on gloo: each with all
blocks and a part of the images; or each with the blocks of some layers and all images, or a part of
every batch, and what layers see is sent; with the whole network, or a part of it. Peak resident
memory of the largest process (with PyTorch, the network and a training pass), what it keeps of the
blocks, bytes that it sends (counted, as a ring would), and CPU-seconds of all processes together:
there are two cores, on which four processes take turns.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.factor_pass import reference_passes
from benchmarks.measure import arguments, report
from benchmarks.problems import regression_of, unet
from curvlinops_diffusion import DiffusionEKFACLinearOperator, PassOptions
from curvlinops_diffusion.runtime.sharded_networks import divide

COUNTS = (1, 2, 4)
# what each process has of the blocks, and what else is divided
WORK: dict[str, dict[str, Any]] = {
    "training pass": {},
    "whole": {},
    "sharded, all images": {"sharded": True, "max_memory": 2**40},
    "sharded, batches divided": {"sharded": True},
    "whole, network divided": {"network": True},
    "sharded, batches and network divided": {"network": True, "sharded": True},
}


# bytes that a process of n sends in a ring, in units of (n − 1) / n of the larger side's
_TIMES = {
    "allreduce_": 2.0,
    "allgather_": 1.0,
    "_allgather_base_": 1.0,
    "_reduce_scatter_base_": 1.0,
    "reduce_scatter_": 1.0,
    "broadcast_": 1.0,
    "gather_": 1.0,
}


class SentBytes(TorchDispatchMode):
    """Sees every collective of ``torch.distributed`` within the context.

    Attributes:
        total: Bytes that this process has sent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run a function, and count what it sends."""
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            sizes = [z.nbytes for z in tree_leaves(args[0]) if isinstance(z, Tensor)]
            if name.startswith(("_reduce_scatter", "reduce_scatter", "gather")):
                sizes = [z.nbytes for z in tree_leaves(args[1]) if isinstance(z, Tensor)]
            n = distributed.get_world_size()
            if name in _TIMES:
                self.total += _TIMES[name] * sum(sizes) * (n - 1) / n
        return func(*args, **(kwargs or {}))


@contextmanager
def group() -> Iterator[bool]:
    """The processes that torchrun started, if there are several."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        distributed.init_process_group("gloo")
    yield several
    if several:
        distributed.destroy_process_group()


def measured(work: str, quick: bool, device: str, counting: bool) -> dict[str, float]:
    """Do the work in this process: its peak in MiB, that of the blocks, and CPU-seconds.

    Or what it sends: seeing it keeps tensors alive for longer.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = unet(quick, size=8 if quick else 16)
    with group() as several:
        divided = several and "network" in WORK[work]
        if divided:
            divide(network, torch.device(device))
        start = time.process_time()
        regression = regression_of(network, device, 4 if quick else 32, 2 if quick else 8)
        if not divided:
            reference_passes(regression)["training pass"]()
        kept = 0
        sent = SentBytes()
        with sent if counting else nullcontext():
            if work != "training pass":
                chosen = {k: z for k, z in WORK[work].items() if k != "network" and several}
                passes = PassOptions(distributed=several, **chosen)
                kept = DiffusionEKFACLinearOperator(regression, passes=passes).nbytes
        seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    megabytes = {"peak": peak, "kept": kept / 2**20, "sent": sent.total / 2**20}
    return {**megabytes, "seconds": seconds}


def run(work: str, count: int, options: Any, *more: str) -> list[dict[str, float]]:
    """The measurements of each process."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [sys.executable, *(launch if count > 1 else []), "-m", "benchmarks.shards"]
    command += ["--only", work, "--device", options.device] + ["--quick"] * options.quick
    command += more
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # processes may print on one line
    return [json.loads(found) for found in re.findall(r"\{[^{}]*\}", output)]


def main() -> None:
    """Run the program."""
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=WORK, help="do one thing, and print what it took")
    parser.add_argument("--counting", action="store_true", help="count what is sent")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.only:
        found = measured(options.only, options.quick, options.device, options.counting)
        print(json.dumps(found), flush=True)
        return
    several = [(work, n) for n in COUNTS[1:] for work in list(WORK)[1:]]
    settings = [("training pass", 1), ("whole", 1), *several]
    rows = []
    for work, count in settings:
        found = run(work, count, options)
        row = {"blocks": work, "processes": count}
        row["peak_mebibytes"] = round(max(one["peak"] for one in found))
        row["mebibytes_of_blocks"] = round(max(one["kept"] for one in found))
        sending = run(work, count, options, "--counting") if count > 1 else found
        row["mebibytes_sent"] = round(max(one["sent"] for one in sending))
        row["cpu_seconds"] = round(sum(one["seconds"] for one in found), 1)
        rows.append(row)
    report(options, "shards", __doc__, {"runs": rows})


if __name__ == "__main__":
    main()
