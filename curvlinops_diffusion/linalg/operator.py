"""Operators on a space of parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from curvlinops_diffusion.linalg.parameters import ParameterSpace
from curvlinops_diffusion.linalg.upstream import (
    LinearOperator,
    PyTorchLinearOperator,
    input_shapes,
    output_shapes,
)


class ParameterSpaceOperator(LinearOperator):
    """A self-adjoint operator on a parameter space."""

    def __init__(self, space: ParameterSpace):
        self.space = space
        shapes = list(space.shapes.values())
        super().__init__(shapes, shapes, like=space)

    @property
    def param_names(self) -> tuple[str, ...]:
        """Names of the parameters that the operator acts on, in order."""
        return tuple(self.space.shapes)


class FlatLinearOperator(LinearOperator):
    """A self-adjoint operator on the space of another, given by what it does to flat columns."""

    def __init__(self, other: PyTorchLinearOperator):
        super().__init__(input_shapes(other), input_shapes(other), like=other)
        #: Names of the parameters, where the other operator knows them.
        self.param_names: tuple[str, ...] | None = getattr(other, "param_names", None)

    @abstractmethod
    def multiply(self, X_PK: Tensor) -> Tensor:
        """Multiply onto flat columns, ``[P, K] -> [P, K]``."""

    def multiply_tensors(self, X: list[Tensor]) -> list[Tensor]:
        """Multiply onto matrices in tensor list format ``[*shape, K]``."""
        shapes = [x.shape for x in X]
        X_PK = torch.cat([x.reshape(-1, x.shape[-1]) for x in X]).to(self.dtype)
        pieces = self.multiply(X_PK).split([shape[:-1].numel() for shape in shapes])
        return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


class IdentityLinearOperator(FlatLinearOperator):
    """The identity on the space that another operator acts on."""

    def multiply(self, X_PK: Tensor) -> Tensor:
        """The columns themselves."""
        return X_PK


def check_same_parameters(
    operators: Mapping[str, PyTorchLinearOperator],
    square: Mapping[str, PyTorchLinearOperator],
) -> None:
    """Check that operators ``[*, P]`` and ``[P, P]`` act on the same parameters, on one device.

    Operators are given by what messages call them. Shapes are compared, and the names of parameters
    where an operator knows them: layers of one shape are many in a network.
    """
    every = {**operators, **square}
    spaces = {name: input_shapes(operator) for name, operator in every.items()}
    spaces |= {f"{name} (out)": output_shapes(operator) for name, operator in square.items()}
    if len({tuple(map(tuple, shapes)) for shapes in spaces.values()}) > 1:
        sizes = ", ".join(
            f"{name}: {len(shapes)} parameters, {sum(z.numel() for z in shapes):,} entries"
            for name, shapes in spaces.items()
        )
        raise ValueError(f"The operators act on different parameters ({sizes}). {_PASS_THE_SAME}")
    known = {name: getattr(operator, "param_names", None) for name, operator in every.items()}
    named = {name: tuple(names) for name, names in known.items() if names is not None}
    if len(set(named.values())) > 1:
        first, *others = named
        other = next(name for name in others if named[name] != named[first])
        pairs = zip(named[first], named[other], strict=True)
        one, two = next((a, b) for a, b in pairs if a != b)
        raise ValueError(
            f"The operators act on different parameters, or on the same in another order: where "
            f"{first} has '{one}', {other} has '{two}'. {_PASS_THE_SAME}"
        )
    devices = {str(o.device) for o in every.values() if hasattr(o, "device")}
    if len(devices) > 1:
        raise ValueError(f"The operators live on {sorted(devices)}. Move them to one device.")


def check_whole(operator: PyTorchLinearOperator, what: str) -> None:
    """Check that an operator is not sharded, where each process does ``what`` on its own."""
    processes = getattr(operator, "processes", None)
    if processes is not None and processes.count > 1:
        raise ValueError(
            f"{what} multiplies each process' own examples, and the blocks of this "
            f"{type(operator).__name__} are shared among {processes.count} processes. Save it, and "
            "load it without sharded=True."
        )


_PASS_THE_SAME = (
    "Pass the same params to each, for instance those of the curvature: "
    "ExampleGradientLinearOperator(regression, EK.param_names)."
)
