"""A few examples on which a network is tried out, and what must hold of its output there.

Draws are pure functions of ``(seed, n, r)``, and every average is over single examples. A network
that draws random numbers of its own, or whose output for an example depends on the rest of the
batch, has no such averages; in which of its modules that happens cannot be told from their types.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NoReturn
from warnings import warn

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from curvlinops_diffusion.diffusion.batch import (
    CleanBatch,
    NoisedBatch,
    has_rows,
    leaves,
    mapped,
    named,
)
from curvlinops_diffusion.diffusion.first_call import first_prediction
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.runtime.precision import settled

_EXAMPLES = 4
#: Enough to compare gradients, and to look again in the middle of a pass.
FEW = 2
# Rounding errors may be so much larger in a network's output than in one operation
_AMPLIFIED = 1e5
# among so many draws the lowest and the highest noise level are looked for
_DRAWS = 8


@dataclass(frozen=True)
class Trial:
    """Four examples (or as many as there are) at the lowest and the highest level of some draws.

    Attributes:
        low: Their draw with the lowest noise level of the first example.
        high: The one with the highest; the same if there is only one draw.
        clean: The examples as the data holds them, where these are encoded.
    """

    low: NoisedBatch
    high: NoisedBatch
    clean: tuple[CleanBatch, ...]

    @property
    def mixed(self) -> NoisedBatch:
        """Both in one batch, so that examples and levels are told apart."""
        same = self.low.common_draw == self.high.common_draw
        return self.low if same else NoisedBatch.interleaved([self.low, self.high])

    @property
    def few(self) -> NoisedBatch:
        """The first two examples of these."""
        mixed, examples = self.mixed, len(self.low.indices)
        return mixed.select(range(len(mixed.indices) // examples * min(FEW, examples)))

    @classmethod
    def of(
        cls,
        regression: NoisedRegression,
        batches: Iterable[CleanBatch] | None = None,
        examples: int = _EXAMPLES,
    ) -> Trial:
        """The first examples of a problem, or of some batches, of one shape."""
        parts: list[tuple[NoisedBatch, NoisedBatch]] = []
        cleans: list[CleanBatch] = []
        lowest = highest = 0
        sizes: Any = None
        for clean in regression.clean_batches() if batches is None else batches:
            left = examples - sum(len(one.indices) for one in cleans)
            some = clean.select(range(min(left, len(clean.indices))))
            if not parts:
                draws = range(min(_DRAWS, regression.num_draws))
                levels = [int(regression.draws.levels(some.indices, r)[0]) for r in draws]
                lowest, highest = levels.index(min(levels)), levels.index(max(levels))
            every = islice(regression.noised_batches(some), max(lowest, highest) + 1)
            noised = {r: batch for r, batch in enumerate(every) if r in (lowest, highest)}
            # packed into tokens, latents of a wide and of a high image have one shape
            own = clean.x0.shape[1:], _sizes(noised[lowest])
            if sizes not in (None, own):
                break
            sizes = own
            parts.append((noised[lowest], noised[highest]))
            cleans.append(some)
            if len(some.indices) == left:
                break
        lows, highs = zip(*parts, strict=True)
        encoded = tuple(cleans) if regression.encodes else ()
        return cls(NoisedBatch.joined(lows), NoisedBatch.joined(highs), encoded)


def _sizes(batch: NoisedBatch) -> dict[str, Any]:
    """Sizes of one example and plain values, which batches must share to be joined."""

    def size(entry: Any) -> Any:
        if isinstance(entry, Tensor):
            return entry.shape[1:] if has_rows(entry) else (entry.dtype, entry.item())
        return list if has_rows(entry) else repr(entry)

    condition = {name: size(entry) for name, entry in leaves(batch.condition)}
    return {"": batch.x_t.shape[1:], **condition}


def check_trial(objective: DenoisingObjective, trial: Trial) -> None:
    """Check that the network's output is a function of each example alone.

    Raises:
        ValueError: If what encodes the data is random; if the network changes its buffers or
            parameters, draws random numbers, makes nothing of an entry of the data, two runs of one
            batch differ, or an example alone from the same example among others.
    """
    model, batch, device = objective.model, trial.mixed, objective.device

    def predicted(batch: NoisedBatch) -> tuple[Tensor, list[str]]:
        """The prediction, and the entries of the condition that no function was given."""
        # every run is watched: some functions of torch do something else under a mode
        with _Uses(batch.condition) as uses:
            return first_prediction(objective, batch), sorted(uses.waiting.values())

    @torch.no_grad()
    def check() -> None:
        for clean in trial.clean:
            _check_encoding(objective, clean)
        before, state = _random_states(device), _State(model)
        first_BD, unused = predicted(batch)
        # what is drawn with a small probability may be the same twice
        drew, changed = _random_states(device) != before, set(state.changed())
        if changed - state.caches(changed):
            state.refuse()
        repeats = _equal(objective, first_BD, predicted(batch)[0])
        if changed and not repeats:
            state.refuse()
        if drew or not repeats:
            raise ValueError(
                "The network draws random numbers of its own (seen at example "
                f"{batch.indices[0]}), so that the loss of an example is random in more than "
                f"timestep and noise. {_advice(model)}"
            )
        if unused:
            _check_unused(
                model, batch, unused, lambda other: torch.equal(predicted(other)[0], first_BD)
            )
        alone = [predicted(batch.select([b]))[0] for b in range(len(first_BD))]
        if not _equal(objective, first_BD, torch.cat(alone)):
            raise ValueError(
                "The network's output for an example depends on the rest of its batch (on the "
                "other examples, or on their noise levels): alone, it is another one. "
                f"{_advice(model)}"
            )

    settled(check, device)


def _equal(objective: DenoisingObjective, first_BD: Tensor, other_BD: Tensor) -> bool:
    """Tell whether a prediction is the first but for rounding; so is one that is not finite."""
    if not (first_BD.isfinite().all() and other_BD.isfinite().all()):
        return True  # what names them comes later
    eps = objective.rounding
    allowed = min(eps**0.5, _AMPLIFIED * eps) * first_BD.norm(dim=1)
    return bool(((first_BD - other_BD).norm(dim=1) <= allowed).all())


def _check_unused(
    model: nn.Module,
    batch: NoisedBatch,
    unused: Sequence[str],
    changes_nothing: Callable[[NoisedBatch], bool],
) -> None:
    """Refuse entries of the data that no function of torch takes, and that change nothing.

    What the network has an argument for, it may ignore by its own choice, and of what is the same
    for all examples the effect cannot be seen; these are warned of.
    """

    def rolled(name: str, entry: Any) -> Any:
        return entry.roll(1, 0) if name in unused and has_rows(entry) else entry

    condition = mapped(rolled, named(batch.condition), batch.condition)
    entries, others = dict(leaves(batch.condition)), dict(leaves(condition))
    if not changes_nothing(replace(batch, condition=condition)):
        return
    message = (
        f"The network makes nothing of {unused}, which the data holds beside the images "
        f"({type(model).__name__} ignores it, or is configured to). Leave it out of the "
        "data if training did not use it; else pass what uses it, for instance the network with "
        "encode= or in a module of your own."
    )
    arguments = inspect.signature(model.forward).parameters
    differ = not any(torch.equal(entries[name], others[name]) for name in unused)
    if differ and any(name.split("/")[0] not in arguments for name in unused):
        raise ValueError(message)
    warn(message, stacklevel=2)


def _advice(model: nn.Module) -> str:
    names = [name or type(model).__name__ for name, m in model.named_modules() if m.training]
    if not names:
        return (
            "Every module is in eval mode: pass a network that is a function of (x_t, t, "
            "condition) example by example."
        )
    return (
        f"{len(names)} of its modules are in train mode, the first being '{names[0]}'. Call "
        "model.eval() first."
    )


def _check_encoding(objective: DenoisingObjective, clean: CleanBatch) -> None:
    """Check that examples are encoded the same each time; latents are drawn by the draws.

    Raises:
        ValueError: If they are not, naming what varied.
    """

    def encoded() -> dict[str, Any]:
        found = objective.encode(clean)
        return {"mean": found.mean, "std": found.std, **dict(leaves(found.condition))}

    before, first = _random_states(objective.device), encoded()
    drew, again = _random_states(objective.device) != before, encoded()
    names = sorted(first.keys() | again.keys())
    varied = [name for name in names if not _same_entry(first.get(name), again.get(name))]
    if varied or drew:
        what = ", ".join(f"'{name}'" for name in varied) or "a generator of random numbers"
        raise ValueError(
            "What encodes the data (autoencoder, text encoder, encode=) is random: of the same "
            f"examples twice, {what} varied. Put its modules into eval mode, and return mean and "
            "std of latents, which are drawn for each draw, rather than a sample."
        )


def _same_entry(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and repr(a) == repr(b)
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    rounding = torch.finfo(a.dtype).eps ** 0.5
    return bool((a - b).norm() <= rounding * a.norm()) or not a.isfinite().all()


def _random_states(device: torch.device) -> list[bytes]:
    """The states of the generators that a network may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002  the generator that others draw from
    python = repr((random.getstate(), legacy)).encode()
    return [*(state.numpy().tobytes() for state in states), python]


class _Uses(TorchFunctionMode):
    """Sees which tensors of a condition are given to a function of torch.

    Attributes:
        waiting: The names of the others, by identity.
    """

    def __init__(self, condition: Mapping[str, Any]):
        super().__init__()
        self.waiting = {id(z): name for name, z in leaves(condition) if isinstance(z, Tensor)}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        # not where only its shape, type or device is asked for
        if self.waiting and getattr(func, "__name__", "") != "__get__":
            for z in tree_leaves((args, kwargs)):
                self.waiting.pop(id(z), None)
        return func(*args, **(kwargs or {}))


class _State:
    """Parameters and buffers with their versions, to see what a network changes while it runs.

    Buffers are copied, and tables of embeddings with a ``max_norm``, so that they can be put back.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._versions = {name: (z, z._version) for name, z in self._held().items()}
        self._copies = {name: z.clone() for name, z in model.named_buffers()}
        for prefix, module in model.named_modules():
            if getattr(module, "max_norm", None) is not None:
                own = module.named_parameters(prefix, recurse=False)
                self._copies |= {name: p.clone() for name, p in own}

    def _held(self) -> dict[str, Tensor]:
        return dict([*self._model.named_parameters(), *self._model.named_buffers()])

    def changed(self) -> list[str]:
        """The names of what is another one, or has other entries."""

        def differs(name: str, z: Tensor) -> bool:
            before, version = self._versions.get(name, (None, 0))
            if before is None or (z is before and z._version == version):
                return False
            copy = self._copies.get(name)
            return copy is None or z.shape != copy.shape or not torch.equal(z, copy)

        return [name for name, z in self._held().items() if differs(name, z)]

    def caches(self, changed: set[str]) -> set[str]:
        """Changed buffers that are no part of the state, of modules in eval mode.

        A table that grows with the longest input, or a counter, need not change the output.
        """
        kept = set(self._model.state_dict()) if changed else set()
        owners = {name: self._model.get_submodule(name.rpartition(".")[0]) for name in changed}
        return {name for name in changed - kept if not owners[name].training}

    def refuse(self) -> NoReturn:
        """Put back what can be of what has changed, and raise a ``ValueError`` with the names."""
        changed, held = self.changed(), self._held()
        for name in changed:
            copy = self._copies.get(name)
            if copy is not None and copy.shape == held[name].shape:
                held[name].copy_(copy)
        raise ValueError(
            f"The network changes {changed[:4]} while it runs, so that it is another one for each "
            "batch (running statistics, spectral norms and others do so in training). A buffer "
            f"that only caches must be registered with persistent=False. {_advice(self._model)}"
        )
