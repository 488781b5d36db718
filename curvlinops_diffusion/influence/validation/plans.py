"""Plans: on which parts of the training data networks are to be trained anew.

Legend: M parts, N training examples, Q queries, k examples removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.runtime.checks import check_count
from curvlinops_diffusion.runtime.digests import digest_of
from curvlinops_diffusion.runtime.files import FileKind, make_folder, write_bytes

PLAN = FileKind(
    "curvlinops_diffusion.plan", "a plan of retraining", "Make it by RetrainingPlan.save."
)
#: The file of a plan's folder that holds all of it.
HEADER = "plan.safetensors"


@dataclass(frozen=True, eq=False)
class RetrainingPlan:
    """Parts of the training data, each of which a network is to be trained on.

    Attributes:
        left_out: The examples that each part leaves out, bool ``[M, N]``.
        parts: A name for each part.
        kind: ``'subsets'``, ``'groups'`` or ``'removals'``.
        info: How it was made, as plain values.

    Examples:
        >>> plan = RetrainingPlan.random_subsets(num_data=10, num_parts=3, seed=0)
        >>> plan.left_out.sum(1)
        tensor([5, 5, 5])
        >>> plan.parts
        ('part_000', 'part_001', 'part_002')
    """

    left_out: Tensor
    parts: tuple[str, ...]
    kind: str
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the parts.

        Raises:
            ValueError: If they have no names of their own, or one leaves out everything.
        """
        if self.left_out.dtype != torch.bool or self.left_out.ndim != 2:
            raise ValueError(
                f"left_out arrived as {self.left_out.dtype} of shape "
                f"{tuple(self.left_out.shape)}. Pass booleans, [parts, training examples]."
            )
        if len(set(self.parts)) != len(self.left_out):
            raise ValueError(
                f"{len(set(self.parts))} names arrived for {len(self.left_out)} parts. Pass one "
                "for each."
            )
        empty = [n for n, out in zip(self.parts, self.left_out, strict=True) if out.all()]
        if empty:
            raise ValueError(f"Parts {empty[:8]} leave out all examples. Leave these parts out.")

    @property
    def digest(self) -> str:
        """A digest of the parts, and of the data that they are parts of, if it is known."""
        data = [self.info.get("names"), self.info.get("digests")]
        return digest_of(self.left_out, self.parts, self.kind, *data)

    @property
    def num_data(self) -> int:
        """The number ``N`` of training examples."""
        return self.left_out.shape[1]

    @classmethod
    def random_subsets(
        cls, num_data: int, num_parts: int = 64, fraction: float = 0.5, seed: int = 0
    ) -> RetrainingPlan:
        """Random subsets of one size, for the linear data-modelling score.

        Args:
            num_data: ``N``.
            num_parts: ``M``.
            fraction: The part of the examples that is trained on.
            seed: Of the subsets: one is a function of it and its number, whatever ``M`` is.

        Raises:
            ValueError: If a subset would be empty, or everything.
        """
        check_count("num_parts", num_parts)
        kept = round(fraction * check_count("num_data", num_data))
        if not 0 < kept < num_data:
            raise ValueError(
                f"fraction={fraction} of {num_data} examples is {kept}. Pass one that keeps some "
                "and leaves out some."
            )
        left_out = torch.ones(num_parts, num_data, dtype=torch.bool)
        generator = torch.Generator()
        for part, out in enumerate(left_out):
            generator.manual_seed(1_000_003 * seed + part)
            out[torch.randperm(num_data, generator=generator)[:kept]] = False
        info = {"fraction": fraction, "seed": seed}
        return cls(left_out, _numbered("part", num_parts), "subsets", info)

    @classmethod
    def leave_one_group_out(
        cls, groups: Tensor | Sequence[int], names: Sequence[str] | None = None
    ) -> RetrainingPlan:
        """Everything but one group, for each group.

        Args:
            groups: The group of each example, integers ``[N]``; negative for none.
            names: The groups' names; ``None`` for their numbers.

        Raises:
            ValueError: If ``groups`` is of another kind.
        """
        groups_N = torch.as_tensor(groups)
        if groups_N.ndim != 1 or groups_N.is_floating_point() or int(groups_N.max()) < 0:
            raise ValueError(
                f"groups arrived as {groups_N.dtype} of shape {tuple(groups_N.shape)}. Pass the "
                "number of each example's group, [N]."
            )
        found = sorted(set(groups_N[groups_N >= 0].tolist()))
        left_out = torch.stack([groups_N == group for group in found])
        labels = [str(group if names is None else names[group]) for group in found]
        # parts are names of files
        parts = tuple(f"without_{label.replace('/', '_')}" for label in labels)
        return cls(left_out, parts, "groups", {"groups": found})

    @classmethod
    def removals(
        cls,
        scores: Tensor,
        sizes: Sequence[int],
        *,
        method: str = "scores",
        num_controls: int = 4,
        seed: int = 0,
    ) -> RetrainingPlan:
        """Without each query's ``k`` most helpful examples; and, as controls, without random ones.

        Args:
            scores: ``[Q, N]``, positive is helpful.
            sizes: The numbers ``k``.
            method: What the scores are called, in the parts' names.
            num_controls: Random removals of each size, which serve all queries.
            seed: Of these.

        Raises:
            ValueError: If a size is not between one and ``N - 1``.
        """
        Q, N = scores.shape
        if method in ("random", "all"):
            raise ValueError(f"method={method!r} is what controls are called. Pass another name.")
        wrong = [k for k in sizes if not 0 < k < N]
        if wrong or not sizes:
            raise ValueError(f"sizes={list(sizes)} arrived. Pass whole numbers from 1 to {N - 1}.")
        order_QN = scores.argsort(1, descending=True)
        parts, rows = ["all"], [torch.zeros(N, dtype=torch.bool)]
        generator = torch.Generator().manual_seed(seed)
        for k in sizes:
            for control in range(num_controls):
                parts.append(f"random_{control}_{k}")
                rows.append(_marked(torch.randperm(N, generator=generator)[:k], N))
            for q in range(Q):
                parts.append(f"{method}_{q}_{k}")
                rows.append(_marked(order_QN[q, :k].cpu(), N))
        info = {"method": method, "sizes": list(sizes), "queries": Q, "controls": num_controls}
        return cls(torch.stack(rows), tuple(parts), "removals", info | {"seed": seed})

    def save(self, folder: str | PathLike[str], names: Sequence[str] | None = None) -> None:
        """Write the plan, and for each part a text file ``PART.txt`` with what is trained on.

        Args:
            folder: Where to; made if there is none.
            names: The names of the training examples, which the files then list, a line each;
                ``None`` to list their numbers.

        Raises:
            ValueError: If names and examples do not fit, or the folder cannot be written to.
        """
        if names is not None and len(names) != self.num_data:
            raise ValueError(f"{len(names)} names arrived for {self.num_data} training examples.")
        folder = Path(folder)
        make_folder(folder)
        for part, out in zip(self.parts, self.left_out, strict=True):
            kept = (~out).nonzero().flatten().tolist()
            lines = [str(n) if names is None else names[n] for n in kept]
            write_bytes(folder / f"{part}.txt", "".join(f"{x}\n" for x in lines).encode())
        header: dict[str, Any] = {"parts": list(self.parts), "kind": self.kind, "info": self.info}
        header["names"] = None if names is None else list(names)
        PLAN.write(folder / HEADER, {"left_out": self.left_out}, header)

    @classmethod
    def open(cls, folder: str | PathLike[str]) -> RetrainingPlan:
        """Read a plan from its folder.

        Raises:
            ValueError: If there is none, or it is damaged.
        """
        path = Path(folder) / HEADER
        header, tensors = PLAN.read(path)
        try:
            info = dict(header["info"]) | {"names": header["names"]}
            return cls(tensors["left_out"], tuple(header["parts"]), str(header["kind"]), info)
        except (KeyError, TypeError, ValueError) as error:
            raise PLAN.damaged(path, f"{type(error).__name__}: {error}") from error


def _marked(indices: Tensor, num_data: int) -> Tensor:
    marked = torch.zeros(num_data, dtype=torch.bool)
    marked[indices] = True
    return marked


def _numbered(name: str, count: int) -> tuple[str, ...]:
    digits = max(3, len(str(count - 1)))
    return tuple(f"{name}_{number:0{digits}}" for number in range(count))
