"""What do fits and scores cost on a GPU? Tests, times and memory, in eight minutes.

``python -m benchmarks.gpu`` runs the tests that a GPU changes, then the passes of networks of four
sizes, ours and those of ``curvlinops`` and ``kronfluence``, and writes the result after every
measurement: what was measured stays when the program is killed. The unit is a *pure* training pass:
forward and full backward over batches that lie on the device already. What fails is noted in place
of a time.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from benchmarks.kronfluence_passes import kronfluence_passes
from benchmarks.measure import arguments, report, synchronize
from benchmarks.models import tiny_conditional_unet
from benchmarks.problems import NETWORKS
from benchmarks.scoring import papers_loop
from benchmarks.upstream import upstream_passes
from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
)
from curvlinops_diffusion.curvature.kronecker_factors import eigenvalue_moments, kronecker_factors
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.layers import covered_parameters
from curvlinops_diffusion.layers.observation import Observer, observed, one_vector
from curvlinops_diffusion.linalg.factors import Eigendecomposition

#: The tests of what a GPU changes.
TESTS = ("tests/test_cuda.py", "tests/test_ladder.py", "tests/runtime/test_modes.py")
POSITIONS = 64
DRAWS = 8
RANK = 16


def stable_diffusion(quick: bool) -> nn.Module:
    """A UNet of the size of Stable Diffusion 1.5's (860 M), random weights."""
    if quick:
        return tiny_conditional_unet()
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


@dataclass(frozen=True)
class Case:
    """A network with data.

    Attributes:
        name: What it is called.
        build: Makes the network, or a quick one.
        images: How many there are.
        batch: How many the network sees at once.
        autocast: The precision of the network's products; ``None`` for its own.
        lora: Whether adapters alone are covered.
        peers: Whether other libraries are measured as well.
        rows: Whether gradients of single images are.
    """

    name: str
    build: Callable[[bool], nn.Module]
    images: int
    batch: int
    autocast: torch.dtype | None = None
    lora: bool = False
    peers: bool = False
    rows: bool = True

    def regression(self, options: argparse.Namespace) -> NoisedRegression:
        """A denoising problem with random weights and images, one draw each."""
        torch.manual_seed(0)
        with torch.device(options.device) if not options.quick else nullcontext():
            network = self.build(options.quick)
        if self.lora:
            projections = ["to_q", "to_k", "to_v", "to_out.0"]
            inject_adapter_in_model(LoraConfig(r=RANK, target_modules=projections), network)
        network = network.eval().to(options.device)
        config: Any = network.config
        count, batch = (4, 2) if options.quick else (self.images, self.batch)
        data: dict[str, Any] = {
            "x0": torch.randn(count, config.in_channels, config.sample_size, config.sample_size)
        }
        if "num_embeds_ada_norm" in config:
            data["class_labels"] = torch.arange(count) % 3
        if isinstance(network, UNet2DConditionModel):
            data["encoder_hidden_states"] = torch.randn(count, 7, config.cross_attention_dim)
        objective = DenoisingObjective(network, DDPMScheduler(), autocast=self.autocast)
        return NoisedRegression(objective, data, num_draws=1, batch_size=batch)

    def params(self, regression: NoisedRegression) -> list[str] | None:
        """The covered parameters' names."""
        if not self.lora:
            return None
        named = regression.objective.model.named_parameters()
        return [name for name, _ in named if "lora_" in name]


BF16 = torch.bfloat16
CASES = (
    Case("UNet 2.8 M", NETWORKS["unet"], 512, 128, peers=True),
    Case("DiT", NETWORKS["dit"], 512, 128, peers=True),
    Case("DiT, bf16", NETWORKS["dit"], 512, 128, BF16),
    Case("CIFAR UNet 36 M", NETWORKS["cifar"], 512, 128),
    Case("CIFAR UNet 36 M, bf16", NETWORKS["cifar"], 512, 128, BF16, peers=True),
    Case("UNet 860 M, LoRA, bf16", stable_diffusion, 32, 16, BF16, lora=True),
    Case("UNet 860 M, bf16", stable_diffusion, 16, 16, BF16, rows=False),
)


@dataclass
class Findings:
    """Measurements, written after each.

    Attributes:
        options: The program's.
        tests: How the tests ended.
        passes: A row for each network and pass.
        began: When the program did.
    """

    options: argparse.Namespace
    tests: str = "not run"
    passes: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        """Whether the time is."""
        return time.monotonic() - self.began > 60 * self.options.minutes

    def write(self) -> None:
        """Write all of it."""
        report(self.options, "gpu", __doc__, {"tests": self.tests, "passes": self.passes})


def passes_of(case: Case, regression: NoisedRegression) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The passes of a network: the unit first, and what is made on the way let go of."""
    objective = regression.objective
    coverage = covered_parameters(objective.model, case.params(regression))
    batches = list(regression.batches())
    covered = list(coverage.params.values())

    def training() -> None:
        with torch.enable_grad():
            for batch in batches:
                loss = batch.loss(objective.predict(batch)).sum()
                torch.autograd.grad(loss, covered, allow_unused=True)

    def floor() -> None:
        with observed(objective, coverage.layers, Observer()) as network:
            for batch in batches:
                network.run(batch, one_vector(batch.loss_gradient))

    yield "training pass", training
    yield "floor", floor
    yield "making the batches", lambda: [None for _ in regression.batches()]
    for name, most in (("K-FAC factors", None), ("K-FAC factors, sampled positions", POSITIONS)):
        plan = BlockPlan.of(coverage, KFACOptions(max_positions=most))
        yield name, lambda plan=plan: kronecker_factors(regression, plan)
    yield "EK-FAC eigenvalues", _eigenvalues(regression, BlockPlan.of(coverage, KFACOptions()))
    if case.rows:
        several = regression.with_draws(DRAWS)
        J = ExampleGradientLinearOperator(several, list(coverage.params))
        yield f"gradient rows, each of {DRAWS} draws", lambda: [None for _ in J.row_batches()]
    if case.lora:
        names = case.params(regression)
        yield "EK-FAC", lambda: DiffusionEKFACLinearOperator(regression, names)
    if case.peers:
        # its eigendecompositions are not implemented in bfloat16
        yield from upstream_passes(regression, decomposed=case.autocast is None).items()
        if find_spec("kronfluence"):
            batch_size = regression.batch_size or len(batches[0].indices)
            yield from kronfluence_passes(regression, batch_size).items()


def _eigenvalues(regression: NoisedRegression, plan: BlockPlan) -> Callable[[], Any]:
    """EK-FAC's second pass in random bases, on whose entries its time does not depend."""
    like = {"dtype": regression.objective.working_dtype, "device": regression.device}

    def random_basis(shape: Sequence[int]) -> Eigendecomposition:
        # of a diagonal factor, [I], the basis is the identity
        vectors = None if len(shape) == 1 else torch.randn(*shape, **like)
        return Eigendecomposition(torch.zeros(*shape[: max(1, len(shape) - 1)], **like), vectors)

    def run() -> Any:
        inputs = {part.key: random_basis(part.input_shape) for part in plan.with_inputs.values()}
        outputs = {part.output_key: random_basis(part.output_shape) for part in plan.parts}
        return eigenvalue_moments(regression, plan, inputs, outputs)

    return run


def measured(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Seconds of a first and of later runs, the peak of memory, and what stays alive by cycles."""
    cuda = torch.cuda.is_available()
    seconds = []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    for _ in range(1 + repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - start)
    found = {"first": seconds[0], "seconds": median(seconds[1:])}
    if cuda:
        found["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        found["kept_gb"] = (torch.cuda.memory_allocated() - before) / 1e9
    return found


def busy(run: Callable[[], Any]) -> float | None:
    """The share of a run's time in which kernels run; ``None`` without a GPU."""
    if not torch.cuda.is_available():
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        run()
        synchronize()
        seconds = time.perf_counter() - start
    microseconds = sum(event.self_device_time_total for event in profile.key_averages())
    return microseconds * 1e-6 / seconds


def measure_case(case: Case, findings: Findings) -> None:
    """All passes of a network."""
    options, unit = findings.options, None
    regression = case.regression(options)
    for name, run in passes_of(case, regression):
        if findings.over:
            return
        row: dict[str, Any] = {"network": case.name, "pass": name}
        try:
            found = measured(run, 1 if options.quick else options.repeats)
            unit = found["seconds"] if unit is None else unit
            row |= {key: round(value, 4) for key, value in found.items()}
            passes = DRAWS if name.startswith("gradient rows") else 1
            row["training_passes"] = round(found["seconds"] / unit / passes, 3)
            share = busy(run) if name.startswith("K-FAC") else None
            row["busy"] = None if share is None else round(share, 2)
        except (RuntimeError, ValueError) as error:  # out of memory, above all
            row["failed"] = str(error).splitlines()[0][:200]
        findings.passes.append(row)
        findings.write()
        del run
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure_scores(findings: Findings) -> None:
    """A gradient of many draws beside the paper's loop, on the UNet of 2.8 million parameters."""
    options = findings.options
    regression = CASES[0].regression(options)
    objective = regression.objective
    count, draws = (2, 4) if options.quick else (8, 250)
    config: Any = objective.model.config
    x0 = torch.randn(count, config.in_channels, config.sample_size, config.sample_size)
    P = sum(p.numel() for p in objective.model.parameters())
    queries_PQ = torch.randn(P, 8, device=objective.device)
    J = ExampleGradientLinearOperator(NoisedRegression(objective, x0, draws, batch_size=125))
    ours = measured(lambda: [rows @ queries_PQ for _, rows in J.row_batches()], options.repeats)
    images = x0.to(objective.device)
    theirs = measured(lambda: papers_loop(objective, images, queries_PQ, draws), options.repeats)
    for name, found in ((f"scores, {draws} draws", ours), ("the paper's loop", theirs)):
        row: dict[str, Any] = {"network": CASES[0].name, "pass": name}
        row |= {key: round(value, 4) for key, value in found.items()}
        row["training_passes"] = None
        findings.passes.append(row)
    findings.write()


def run_tests(findings: Findings) -> None:
    """The tests of what a GPU changes."""
    command = [sys.executable, "-m", "pytest", "-q", *TESTS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        findings.tests = (done.stdout.strip().splitlines() or ["no output"])[-1]
        if done.returncode:
            failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
            findings.tests += "; " + "; ".join(failed)
    except subprocess.TimeoutExpired:
        findings.tests = "not over after four minutes"
    findings.write()


def main() -> None:
    """Run the program."""
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=7.5, help="begin nothing after these")
    parser.add_argument("--no-tests", action="store_true", help="times and memory alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    findings = Findings(options)
    if not (options.no_tests or options.quick):
        run_tests(findings)
    measure_scores(findings)
    for case in CASES:
        if not findings.over:
            measure_case(case, findings)
    findings.write()


if __name__ == "__main__":
    main()
