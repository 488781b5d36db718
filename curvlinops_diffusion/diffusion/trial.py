"""A few examples on which a network is tried out, and what must hold of it there.

Draws are pure functions of ``(seed, n, r)``, and every average is over single examples. A network
that draws random numbers of its own, or whose output for an example depends on the rest of the
batch, has no such averages; in which of its modules that happens cannot be told from their types.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from curvlinops_diffusion.diffusion.checks import check_modes
from curvlinops_diffusion.diffusion.first_call import first_prediction
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.runtime.precision import settled

_EXAMPLES = 4
# so many are enough to compare gradients, and to look again in the middle of a pass
_FEW = 2
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
        return mixed.select(range(len(mixed.indices) // examples * min(_FEW, examples)))

    @classmethod
    def of(
        cls,
        regression: NoisedRegression,
        batches: Iterable[CleanBatch] | None = None,
        examples: int = _EXAMPLES,
    ) -> Trial:
        """The first examples of a problem, of one shape, from as many batches as it takes.

        Args:
            regression: Objective, data and draws.
            batches: Where to look for them; ``None`` for all of the data.
            examples: How many to look for.
        """
        parts: list[tuple[NoisedBatch, NoisedBatch]] = []
        cleans: list[CleanBatch] = []
        found = 0
        chosen: tuple[int, int] | None = None
        for clean in regression.clean_batches() if batches is None else batches:
            some = clean.select(range(min(examples - found, len(clean.indices))))
            if chosen is None:
                draws = range(min(_DRAWS, regression.num_draws))
                levels = [int(regression.draws.levels(some.indices, r)[0]) for r in draws]
                chosen = levels.index(min(levels)), levels.index(max(levels))
            draw_of = {}
            for r, batch in enumerate(regression.noised_batches(some)):
                if r in chosen:
                    draw_of[r] = batch
                if r >= max(chosen):
                    break
            low, high = (draw_of[r] for r in chosen)
            if parts and _sizes(parts[0][0]) != _sizes(low):
                break
            parts.append((low, high))
            cleans.append(some)
            found += len(some.indices)
            if found == examples:
                break
        lows, highs = zip(*parts, strict=True)
        encoded = tuple(cleans) if regression.encodes else ()
        return cls(NoisedBatch.joined(lows), NoisedBatch.joined(highs), encoded)


def _sizes(batch: NoisedBatch) -> dict[str, Any]:
    """What must be the same of batches that are joined: sizes of one example, and plain values."""

    def size(entry: Any) -> Any:
        if isinstance(entry, Tensor):
            return entry.shape[1:] if has_rows(entry) else (entry.dtype, entry.item())
        return list if has_rows(entry) else repr(entry)

    condition = {name: size(entry) for name, entry in leaves(batch.condition)}
    return {"": batch.x_t.shape[1:], **condition}


def check_network(regression: NoisedRegression) -> None:
    """Check, once in each mode of its modules, that the network is a function of single examples.

    Raises:
        ValueError: As :func:`check_trial` and :func:`check_modes`.
    """
    check_modes()
    modes = tuple(module.training for module in regression.objective.model.modules())
    if modes not in regression.tried:
        checked_trial(regression)
        regression.tried.add(modes)


def checked_trial(regression: NoisedRegression) -> Trial:
    """A trial of the network, passed.

    Raises:
        ValueError: As :func:`check_trial`.
    """
    trial = Trial.of(regression)
    check_trial(regression.objective, trial)
    return trial


class Retrial:
    """Tries a network out again in the course of a pass: at the batches 3, 7, 15, … it is shown.

    What couples examples, or is random, may do so for some of the data only. The price falls with
    the length of the pass.

    Args:
        regression: Objective, data and draws.
    """

    def __init__(self, regression: NoisedRegression):
        self._regression = regression
        self._shown = 0

    def __call__(self, clean: CleanBatch) -> None:
        """Show it a batch.

        Raises:
            ValueError: As :func:`check_trial`.
        """
        number, self._shown = self._shown, self._shown + 1
        if number >= 3 and number & (number + 1) == 0:
            self._check(Trial.of(self._regression, [clean], _FEW))

    def _check(self, trial: Trial) -> None:
        check_trial(self._regression.objective, trial)


def check_trial(objective: DenoisingObjective, trial: Trial) -> None:
    """Check that the network's output is a function of each example alone.

    Raises:
        ValueError: If what encodes the data is random; if the network changes its buffers or
            parameters, draws random numbers, makes nothing of an entry of the data, two runs of one
            batch differ, or an example alone from the same example among others.
    """
    settled(lambda: _check_trial(objective, trial), objective.device)


def _check_trial(objective: DenoisingObjective, trial: Trial) -> None:
    """The same, in the precision that products have now."""
    batch = trial.mixed
    with torch.no_grad():
        for clean in trial.clean:
            _check_encoding(objective, clean)
        before, state = _random_states(objective.device), _State.of(objective.model)
        first_BD, unused = _predict(objective, batch)
        caches = state.caches(objective.model)
        if set(state.changed(objective.model)) - caches:
            state.refuse(objective.model)
        # what is drawn with a small probability may be the same twice
        drew = _random_states(objective.device) != before
        again_BD, _ = _predict(objective, batch)
        same = _equal(objective, first_BD, again_BD)
        if caches and not same:
            state.refuse(objective.model)
        if drew or not same:
            raise ValueError(
                "The network draws random numbers of its own (seen at example "
                f"{batch.indices[0]}), so that the loss of an example is random in more than "
                f"timestep and noise. {_training(objective.model)}"
            )
        _check_uses(objective, batch, unused, first_BD)
        alone = [_predict(objective, batch.select([b]))[0] for b in range(len(first_BD))]
    if not _equal(objective, first_BD, torch.cat(alone)):
        raise ValueError(
            "The network's output for an example depends on the rest of its batch (on the other "
            "examples, or on their noise levels): alone, it is another one. "
            f"{_training(objective.model)}"
        )


def _check_encoding(objective: DenoisingObjective, clean: CleanBatch) -> None:
    """Check that examples are encoded the same each time; latents are drawn by the draws.

    Raises:
        ValueError: If they are not, naming what varied.
    """
    before = _random_states(objective.device)
    first = _encoded(objective, clean)
    drew = _random_states(objective.device) != before
    again = _encoded(objective, clean)
    varied = sorted(
        name
        for name in first.keys() | again.keys()
        if not _same_entry(first.get(name), again.get(name))
    )
    if varied or drew:
        what = ", ".join(f"'{name}'" for name in varied) or "a generator of random numbers"
        raise ValueError(
            "What encodes the data (autoencoder, text encoder, encode=) is random: of the same "
            f"examples twice, {what} varied. Put its modules into eval mode, and return mean and "
            "std of latents, which are drawn for each draw, rather than a sample."
        )


def _encoded(objective: DenoisingObjective, clean: CleanBatch) -> dict[str, Any]:
    encoded = objective.encode(clean)
    return {"mean": encoded.mean, "std": encoded.std, **dict(leaves(encoded.condition))}


def _same_entry(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and repr(a) == repr(b)
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    rounding = torch.finfo(a.dtype).eps ** 0.5
    return bool((a - b).norm() <= rounding * a.norm()) or not a.isfinite().all()


class _Uses(TorchFunctionMode):
    """Sees which tensors of a condition are given to a function of torch.

    Attributes:
        unused: The names of the others.
    """

    def __init__(self, condition: Mapping[str, Any]):
        super().__init__()
        self._waiting = {id(z): name for name, z in leaves(condition) if isinstance(z, Tensor)}

    @property
    def unused(self) -> list[str]:
        return sorted(self._waiting.values())

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        # not where only its shape, type or device is asked for
        if self._waiting and getattr(func, "__name__", "") != "__get__":
            for z in tree_leaves((args, kwargs)):
                self._waiting.pop(id(z), None)
        return func(*args, **(kwargs or {}))


def _predict(objective: DenoisingObjective, batch: NoisedBatch) -> tuple[Tensor, list[str]]:
    """Run the network, and see which entries of the condition it makes nothing of.

    Every run of a trial is seen likewise: some functions do something else under a mode.

    Raises:
        ValueError: If the network does not run on what the data holds.
    """
    with _Uses(batch.condition) as uses:
        return first_prediction(objective, batch), uses.unused


def _check_uses(
    objective: DenoisingObjective, batch: NoisedBatch, unused: Sequence[str], first_BD: Tensor
) -> None:
    """Check that what no function of torch was seen to take changes the output nevertheless.

    What the network has an argument for, it may ignore by its own choice, and of what is the same
    for all examples the effect cannot be seen; these are warned of.

    Raises:
        ValueError: If it does not, and the network has no argument of that name.
    """
    if not unused:
        return

    def rolled(name: str, entry: Any) -> Any:
        return entry.roll(1, 0) if name in unused and has_rows(entry) else entry

    condition = mapped(rolled, named(batch.condition), batch.condition)
    entries, others = dict(leaves(batch.condition)), dict(leaves(condition))
    same = [name for name in unused if torch.equal(entries[name], others[name])]
    if not torch.equal(_predict(objective, replace(batch, condition=condition))[0], first_BD):
        return
    message = (
        f"The network makes nothing of {unused}, which the data holds beside the images "
        f"({type(objective.model).__name__} ignores it, or is configured to). Leave it out of the "
        "data if training did not use it; else pass what uses it, for instance the network with "
        "encode= or in a module of your own."
    )
    arguments = inspect.signature(objective.model.forward).parameters
    if same or all(name.split("/")[0] in arguments for name in unused):
        warn(message, stacklevel=2)
        return
    raise ValueError(message)


@dataclass(frozen=True)
class _State:
    """What a network may change while it runs.

    Attributes:
        versions: Every parameter and buffer with the number of its changes in place.
        copies: Those that may be put back: buffers, and tables of embeddings with a ``max_norm``.
    """

    versions: dict[str, tuple[Tensor, int]]
    copies: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> _State:
        """That of a network."""
        copies = {name: z.clone() for name, z in model.named_buffers()}
        for prefix, module in model.named_modules():
            if getattr(module, "max_norm", None) is not None:
                own = module.named_parameters(prefix, recurse=False)
                copies |= {name: p.clone() for name, p in own}
        return cls({name: (z, z._version) for name, z in _held(model)}, copies)

    def changed(self, model: nn.Module) -> list[str]:
        """The names of what is another one, or has other entries."""

        def differs(name: str, z: Tensor) -> bool:
            before, version = self.versions.get(name, (None, 0))
            if before is None or (z is before and z._version == version):
                return False
            copy = self.copies.get(name)
            return copy is None or z.shape != copy.shape or not torch.equal(z, copy)

        return [name for name, z in _held(model) if differs(name, z)]

    def caches(self, model: nn.Module) -> set[str]:
        """The changed buffers that are no part of the network's state, of modules in eval mode.

        A table that grows with the longest input, or a counter, need not change the output.
        """
        changed = self.changed(model)
        kept = set(model.state_dict()) if changed else set()
        return {
            name
            for name in changed
            if name not in kept and not model.get_submodule(name.rpartition(".")[0]).training
        }

    def refuse(self, model: nn.Module) -> NoReturn:
        """Put back what can be of what has changed.

        Raises:
            ValueError: Always, with the names.
        """
        changed, held = self.changed(model), dict(_held(model))
        for name in changed:
            copy = self.copies.get(name)
            if copy is not None and copy.shape == held[name].shape:
                held[name].copy_(copy)
        raise ValueError(
            f"The network changes {changed[:4]} while it runs, so that it is another one for each "
            "batch (running statistics, spectral norms and others do so in training). A buffer "
            "that only caches must be registered with persistent=False. "
            f"{_training(model)}"
        )


def _held(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _random_states(device: torch.device) -> list[bytes]:
    """The states of the generators that a network may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002  the generator that others draw from
    python = repr((random.getstate(), legacy)).encode()
    return [*(state.numpy().tobytes() for state in states), python]


def _equal(objective: DenoisingObjective, a_BD: Tensor, b_BD: Tensor) -> bool:
    """Whether predictions are the same but for rounding; so are those that are not finite."""
    if not (a_BD.isfinite().all() and b_BD.isfinite().all()):
        return True  # what names them comes later
    eps = objective.rounding
    allowed = min(eps**0.5, _AMPLIFIED * eps) * a_BD.norm(dim=1)
    return bool(((a_BD - b_BD).norm(dim=1) <= allowed).all())


def _training(model: nn.Module) -> str:
    """What to do about it."""
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
