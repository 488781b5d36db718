"""Plans of retraining: the parts of the training data on which networks are trained anew.

Legend: M parts, N training examples, Q queries, k examples removed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

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
# of the files of a part's networks
_ENDINGS = re.compile(r"(_seed[0-9]+|\.safetensors)$")
_UNFIT = re.compile(r"[/\\\x00-\x1f]")


@dataclass(frozen=True)
class Removal:
    """A part that leaves out some examples, as its name says.

    The method that chose them, or :attr:`CONTROL`; the number of the query, or of the control; how
    many there are. Ending in two numbers, no method's parts are another's.
    """

    #: The part that leaves out nothing
    NOTHING: ClassVar[str] = "all"
    #: In place of a method's name
    CONTROL: ClassVar[str] = "random"

    chosen_by: str
    number: int
    size: int

    @property
    def part(self) -> str:
        """The part's name."""
        return f"{self.chosen_by}_{self.number}_{self.size}"

    @classmethod
    def parsed(cls, part: str) -> Removal | None:
        """Read a part's name; ``None`` if it is of something else."""
        found = re.fullmatch(r"(.*)_(0|[1-9][0-9]*)_([1-9][0-9]*)", part, re.DOTALL)
        return None if found is None else cls(found[1], int(found[2]), int(found[3]))


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
        """Refuse parts without names of their own, or that leave out everything."""
        if self.left_out.dtype != torch.bool or self.left_out.ndim != 2:
            raise ValueError(
                "`left_out` must be booleans, [parts, training examples], got "
                f"{self.left_out.dtype} of shape {list(self.left_out.shape)}."
            )
        if len(set(self.parts)) != len(self.left_out):
            raise ValueError(
                f"`parts` must name each of {len(self.left_out)} parts, got "
                f"{len(set(self.parts))} names."
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
            num_parts: The number of parts, ``M``.
            fraction: The part of the examples that is trained on.
            seed: The seed of the parts, each of which is a function of it and its own number.

        Raises:
            ValueError: If a subset would be empty, or everything.
        """
        check_count("num_parts", num_parts)
        kept = round(fraction * check_count("num_data", num_data))
        if not 0 < kept < num_data:
            raise ValueError(
                f"`fraction` must keep some of {num_data} examples and leave out some, got "
                f"{fraction}."
            )
        left_out = torch.ones(num_parts, num_data, dtype=torch.bool)
        generator = torch.Generator()
        for part, out in enumerate(left_out):
            generator.manual_seed(1_000_003 * seed + part)
            out[torch.randperm(num_data, generator=generator)[:kept]] = False
        digits = max(3, len(str(num_parts - 1)))
        parts = tuple(f"part_{number:0{digits}}" for number in range(num_parts))
        return cls(left_out, parts, "subsets", {"fraction": fraction, "seed": seed})

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
        of_numbers = groups_N.ndim == 1 and not groups_N.is_floating_point()
        if not of_numbers or not (groups_N >= 0).any():
            raise ValueError(
                "`groups` must have the number of each example's group, [N], got "
                f"{groups_N.dtype} of shape {list(groups_N.shape)}."
            )
        found = sorted(set(groups_N[groups_N >= 0].tolist()))
        left_out = torch.stack([groups_N == group for group in found])
        if names is not None and len(names) <= found[-1]:
            raise ValueError(
                f"`names` must have one for each group up to number {found[-1]}, got {len(names)}."
            )
        parts: list[str] = []
        taken: set[str] = set()
        for group in found:
            part = f"without_{_UNFIT.sub('_', str(group if names is None else names[group]))}"
            while part.casefold() in taken or _ENDINGS.search(part):
                part = f"{part}_group{group}"
            taken.add(part.casefold())
            parts.append(part)
        return cls(left_out, tuple(parts), "groups", {"groups": found})

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
        """Everything but each query's ``k`` most helpful examples; as controls, but random ones.

        Args:
            scores: ``[Q, N]``, positive is helpful: those of a measurement of which higher is
                better (a log-likelihood) with the other sign.
            sizes: The numbers ``k``.
            method: The scores' name, for the parts' names.
            num_controls: Random removals of each size, which serve all queries.
            seed: Of these.

        Raises:
            ValueError: If scores are not finite, a size is not between one and ``N - 1`` or given
                twice, or the method is called as controls are.
        """
        if scores.ndim != 2:
            raise ValueError(f"`scores` must be [queries, examples], got {list(scores.shape)}.")
        undefined = (~scores.isfinite()).nonzero()
        if len(undefined):
            q, n = undefined[0].tolist()
            raise ValueError(
                f"`scores` must be finite to be ordered, got {len(undefined)} entries that are "
                f"not, the first of query {q} and example {n} ({float(scores[q, n])}). Compute "
                "these scores again, or leave out their queries."
            )
        Q, N = scores.shape
        # in any case of letters: some file systems take these for one name
        if method.lower() in (Removal.CONTROL, Removal.NOTHING):
            raise ValueError(f"method={method!r} is the controls' name. Pass another.")
        # NumPy's integers become plain ones, which a plan's file can hold
        whole = [int(k) for k in sizes if isinstance(k, Integral) and not isinstance(k, bool)]
        allowed = [k for k in dict.fromkeys(whole) if 0 < k < N]
        if not allowed or len(allowed) < len(sizes):
            raise ValueError(
                f"`sizes` must be whole numbers from 1 to {N - 1}, each once, got {list(sizes)}."
            )
        order_QN = scores.argsort(1, descending=True).cpu()
        removed = {Removal.NOTHING: torch.zeros(0, dtype=torch.long)}
        generator = torch.Generator().manual_seed(int(seed))
        for k in allowed:
            for control in range(num_controls):
                part = Removal(Removal.CONTROL, control, k).part
                removed[part] = torch.randperm(N, generator=generator)[:k]
            removed |= {Removal(method, q, k).part: order_QN[q, :k] for q in range(Q)}
        info = {"method": method, "sizes": allowed, "queries": Q, "controls": int(num_controls)}
        left_out = torch.zeros(len(removed), N, dtype=torch.bool)
        for out, chosen in zip(left_out, removed.values(), strict=True):
            out[chosen] = True
        return cls(left_out, tuple(removed), "removals", info | {"seed": int(seed)})

    def save(self, folder: str | PathLike[str], names: Sequence[str] | None = None) -> None:
        """Write the plan, and for each part a text file ``PART.txt`` with what is trained on.

        Args:
            folder: Where to; made if there is none.
            names: The names of the training examples, which the files then list, a line each;
                ``None`` to list their numbers.

        Raises:
            ValueError: If names and examples do not fit, two parts or endings of networks' names
                would share a file, or the folder cannot be written to.
        """
        unfit = [p for p in self.parts if not p.strip(".") or "/" in p or _ENDINGS.search(p)]
        if unfit:
            raise ValueError(
                f"Parts {unfit[:4]} cannot be files' names, which have no slash, and to which "
                "networks add _seed0 or .safetensors. Pass other names."
            )
        first: dict[str, str] = {}
        for part in self.parts:
            other = first.setdefault(part.casefold(), part)
            if other != part:
                raise ValueError(
                    f"Parts '{other}' and '{part}' are one file where names have no case. Pass "
                    "names that differ by more."
                )
        if names is not None and len(names) != self.num_data:
            raise ValueError(
                f"`names` must have one for each of {self.num_data} training examples, got "
                f"{len(names)}."
            )
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
