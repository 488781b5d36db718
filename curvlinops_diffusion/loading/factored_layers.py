"""Layers whose weight training changed by other factors than two matrices: LoHa, LoKr, DoRA.

With a layer's weight ``W`` and ``s = alpha / rank``, training ran the layer with the weight

=========  ==================================================================================
matrices   ``W + s · up · down``, perhaps with a core between the two
LoHa       ``W + s · (w1_a · w1_b) ⊙ (w2_a · w2_b)``, perhaps with a core in each product
LoKr       ``W + s · w1 ⊗ w2``, each perhaps a product, the second perhaps with a core
=========  ==================================================================================

With DoRA each row or column of this is divided by its norm, which no derivative goes through, and
multiplied by a magnitude that was trained.

Matrices and Kronecker products are run factor by factor, ``(w1 ⊗ w2) x`` as ``w2`` on each of the
pieces of ``x`` and ``w1`` across them: linear layers and convolutions like any other, which K-FAC
knows. Elementwise products are multiplied out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

MAGNITUDE = "lora_magnitude_vector"
# the factors of a product in the order in which they are run; of a Kronecker product's two
_MATRICES = ("lora_A", "lora_mid", "lora_B")
_FIRST = ("lokr_w1", "lokr_w1_b", "lokr_w1_a")
_SECOND = ("lokr_w2", "lokr_w2_b", "lokr_t2", "lokr_w2_a")
_HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2")
_OF_ALL = (*_MATRICES, *_FIRST, *_SECOND, *_HADAMARD)
# those with as many rows as the product has rank, where there is one
_OF_RANK = ("lora_A", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")


class FactoredLayer(nn.Module, BaseTunerLayer):
    """A linear layer or convolution, with what one adapter adds to its weight.

    Args:
        base_layer: The layer, perhaps adapted already.
        adapter: The adapter's name.
        factors: All factors of a product by name, shaped as in files.
        alpha: The factor of the product, in units of one over its rank if it has one; ``None`` for
            no other factor than 1.

    Raises:
        ValueError: If they are no factors of a change of this layer's weight.
    """

    adapter_layer_names = (*_OF_ALL, MAGNITUDE)
    other_param_names = ("scaling",)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter: str,
        factors: Mapping[str, Tensor],
        alpha: float | None = None,
    ):
        super().__init__()
        self.base_layer = base_layer
        self.adapter = adapter
        self.merged_adapters: list[str] = []
        layer = self._layer
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise ValueError(f"belongs to a {type(layer).__name__}")
        if getattr(layer, "groups", 1) != 1 or not layer.weight.is_floating_point():
            raise ValueError("belongs to a layer that is quantised, or a convolution in groups")
        rank = next((len(factors[name]) for name in _OF_RANK if name in factors), None)
        self.scaling = {adapter: 1.0 if alpha is None else alpha / (rank or 1)}
        # the dimension of the weight that magnitudes are along: of columns they are a single row
        self.along = int(MAGNITUDE in factors and len(factors[MAGNITUDE]) == 1)
        shapes = ", ".join(f"{name} {tuple(z.shape)}" for name, z in factors.items())
        try:
            own = _modules(layer, factors)
            for name in self.adapter_layer_names:
                held = nn.ModuleDict if isinstance(own.get(name), nn.Module) else nn.ParameterDict
                setattr(self, name, held({adapter: own[name]} if name in own else {}))
            shape, magnitude = self.added_weight().shape, self._of(MAGNITUDE)
            fits = shape == layer.weight.shape
            fits &= magnitude is None or magnitude.numel() == shape[self.along]
        except (RuntimeError, IndexError):  # nor of any other layer
            fits = False
        if not fits:
            there = "×".join(map(str, layer.weight.shape))
            raise ValueError(f"has factors {shapes}, which make no weight of {there}")
        BaseTunerLayer.set_adapter(self, [adapter])

    @property
    def _layer(self) -> Any:
        return BaseTunerLayer.get_base_layer(self)

    def _of(self, name: str) -> Any:
        held = getattr(self, name)
        return held[self.adapter] if self.adapter in held else None  # noqa: SIM401 - no dictionary

    def _steps(self, names: Sequence[str]) -> list[Any]:
        return [step for step in map(self._of, names) if step is not None]

    def added_weight(self) -> Tensor:
        """Multiply out what is added to the weight, before DoRA."""
        scale, kernel = self.scaling[self.adapter], self._layer.weight.shape[2:]
        if self._of("hada_w1_a") is not None:
            pairs = _HADAMARD[:3], _HADAMARD[3:]
            one, two = (_multiplied([self._of(n) for n in names], kernel) for names in pairs)
            return scale * one * two
        if self._of("lora_A") is not None:
            return scale * _composed(self._steps(_MATRICES))
        one, two = (_composed(self._steps(names)) for names in (_FIRST, _SECOND))
        return scale * torch.einsum("ab,cd...->acbd...", one, two).flatten(0, 1).flatten(1, 2)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer with what the adapter adds."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        active: Any = self.active_adapters
        if self.disable_adapters or self.adapter not in active:
            return result
        layer, magnitude = self._layer, self._of(MAGNITUDE)
        # the precision that factors have, which may be more than the layer's
        z = x.to(next(p.dtype for name in _OF_ALL for p in getattr(self, name).parameters()))
        if magnitude is None:
            return (result + self._added(z)).to(result.dtype)
        with torch.no_grad():
            weight = layer.weight.to(z.dtype) + self.added_weight()
            norm = weight.transpose(0, self.along).flatten(1).norm(dim=1)
        factor = (magnitude.flatten() / norm).view(-1, *[1] * (weight.ndim - 2))  # of channels
        if self.along == 1:
            more = _run(layer, (x * (factor - 1)).to(x.dtype)) + self._added(z * factor)
        else:
            more = _run(layer, x) * (factor - 1) + self._added(z) * factor
        return (result + more).to(result.dtype)

    def _added(self, x: Tensor) -> Tensor:
        """Compute the addition to the output, before DoRA."""
        if self._of("hada_w1_a") is not None:
            return _run(self._layer, x, self.added_weight())
        scale = self.scaling[self.adapter]
        if self._of("lora_A") is not None:
            return scale * _ran(self._steps(_MATRICES), x)
        first, second = self._steps(_FIRST), self._steps(_SECOND)
        width = second[0].weight.shape[1]
        if self._layer.weight.ndim == 2:
            pieces = _ran(second, x.unflatten(-1, (-1, width)))
            return scale * _ran(first, pieces.mT).mT.flatten(-2)
        # pieces of an example follow each other along the first axis, as frames do
        pieces = _ran(second, x.unflatten(1, (-1, width)).flatten(0, 1)).unflatten(0, (len(x), -1))
        return scale * _ran(first, pieces.movedim(1, -1)).movedim(-1, 1).flatten(1, 2)


def _modules(layer: Any, factors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The factors as layers that are run, or as parameters where they are multiplied out."""
    kernel = layer.weight.shape[2:]
    # one factor of a convolution goes over positions: the core, else the first that is run
    over = next((n for n in ("lora_mid", "lokr_t2", *_MATRICES, *_SECOND) if n in factors), None)
    found: dict[str, Any] = {}
    for name, z in factors.items():
        z = z.to(layer.weight.device, torch.promote_types(layer.weight.dtype, torch.float32))
        if name in (*_HADAMARD, MAGNITUDE):
            found[name] = nn.Parameter(z.clone())
            continue
        if name == "lokr_w2_a" and "lokr_t2" in factors:
            z = z.T  # as it lies beside a core
        sides = () if name in _FIRST else kernel if name == over else [1] * len(kernel)
        found[name] = _unbiased(z.reshape(len(z), -1, *sides), layer if name == over else None)
    return found


def _unbiased(weight: Tensor, like: Any = None) -> nn.Module:
    """A layer of a weight, with strides and padding of another convolution."""
    O, I, *kernel = weight.shape
    made: Any
    if kernel:
        cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
        names = () if like is None else ("stride", "padding", "dilation", "padding_mode")
        options = {name: getattr(like, name) for name in names}
        made = cls(I, O, tuple(kernel), bias=False, device="meta", **options)  # type: ignore
    else:
        made = nn.Linear(I, O, bias=False, device="meta")
    made.weight = nn.Parameter(weight.clone())
    return made


def _ran(steps: Sequence[Any], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _composed(steps: Sequence[Any]) -> Tensor:
    """The weight of layers that are run one after the other, of which one has a kernel."""
    weight: Tensor = steps[0].weight
    for step in steps[1:]:
        weight = torch.einsum("oi...,ij...->oj...", step.weight, weight)
    return weight


def _multiplied(factors: Sequence[Any], kernel: Sequence[int]) -> Tensor:
    """One of the two products of LoHa as a weight."""
    a, b, core = factors
    if core is not None:
        return torch.einsum("ij...,io,jp->op...", core, a, b)
    product: Tensor = a.flatten(1) @ b.flatten(1)
    return product.unflatten(1, (-1, *kernel))


def _run(layer: Any, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Run a layer without its bias, perhaps with another weight."""
    weight = layer.weight if weight is None else weight
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight)
    result: Tensor = layer._conv_forward(x, weight, None)
    return result


def outputs_of(factors: Mapping[str, Tensor]) -> int:
    """Count the rows of the weight that factors make."""
    if "lora_B" in factors:
        return len(factors["lora_B"])
    if "hada_w1_a" in factors:
        return factors["hada_w1_a"].shape["hada_t1" in factors]
    one, two = (factors.get(f"lokr_w{n}") for n in (1, 2))
    rows = len(factors["lokr_w1_a"] if one is None else one)
    return rows * (factors["lokr_w2_a"].shape["lokr_t2" in factors] if two is None else len(two))


def of_rows(factors: Mapping[str, Tensor], rows: Tensor, outputs: int) -> dict[str, Tensor]:
    """Take the factors of some rows of a weight: of one of several layers trained as one.

    Raises:
        ValueError: If these rows are no product of such factors.
    """
    found = dict(factors)
    magnitudes = found.get(MAGNITUDE)
    if magnitudes is not None and len(magnitudes) != outputs:
        raise ValueError("has magnitudes of columns, and its rows belong to several layers")
    for name in ("lora_B", MAGNITUDE, "hada_w1_a", "hada_w2_a"):
        if name in found:
            core = name.startswith("hada") and f"hada_t{name[6]}" in found
            found[name] = found[name][:, rows] if core else found[name][rows]
    first = next((name for name in ("lokr_w1", "lokr_w1_a") if name in found), None)
    if first is not None:
        size = outputs // len(found[first])  # rows of the second factor
        own = rows[::size] // size
        if not torch.equal((own[:, None] * size + torch.arange(size)).flatten(), rows):
            raise ValueError("cannot be divided among the several layers that its rows belong to")
        found[first] = found[first][own]
    return found
