"""Smaller forms of whitened gradients: fewer coordinates, fewer bits.

Legend: B gradients, P coordinates, k coordinates kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.runtime.checks import check_count, check_option

# Entries that share a scale
BLOCK = 64


class Precision(str, Enum):
    """Precisions that entries are stored in, see :class:`Compression`."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    NF4 = "nf4"


class Projection(str, Enum):
    """Choices of the coordinates that are kept, see :class:`Compression`."""

    NONE = "none"
    SVD = "svd"
    RANDOM = "random"


@dataclass(frozen=True)
class RandomProjection:
    r"""A sparse random projection, under which inner products are preserved on average.

    Each coordinate goes to one of ``k`` sums, with a random sign (a count sketch)::

        z_j = Σ_{i: h(i) = j} s_i x_i,      E ⟨z, z'⟩ = ⟨x, x'⟩
        Var ⟨z, z'⟩ = (‖x‖² ‖x'‖² + ⟨x, x'⟩² − 2 Σ_i x_i² x'_i²) / k

    which is the variance of a projection by ``k`` dense vectors of signs, for a ``k``-th of the
    work and two vectors of ``P`` numbers in place of a matrix.

    Source: Charikar, Chen & Farach-Colton, 2002; Weinberger et al., 2009 (the variance).

    Attributes:
        size: ``k``.
        seed: The seed of sums and signs.

    Examples:
        >>> rows = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0))
        >>> projected = RandomProjection(size=2_000)(rows)
        >>> projected.shape
        torch.Size([2, 2000])
        >>> bool((projected.norm(dim=1) / rows.norm(dim=1) - 1).abs().max() < 0.1)
        True
    """

    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no number of at least one."""
        check_count("size", self.size)

    def __call__(self, rows_BP: Tensor) -> Tensor:
        """Project, ``[B, P] -> [B, k]``."""
        P = rows_BP.shape[1]
        generator = torch.Generator().manual_seed(self.seed)
        sums_P = torch.randint(self.size, (P,), generator=generator)
        signs_P = 2 * torch.randint(2, (P,), generator=generator) - 1
        sums_P, signs_P = sums_P.to(rows_BP.device), signs_P.to(rows_BP)
        result_Bk = rows_BP.new_zeros(len(rows_BP), self.size)
        return result_Bk.index_add_(1, sums_P, rows_BP * signs_P)


@dataclass(frozen=True)
class Compression:
    """The form in which whitened gradients are stored.

    Attributes:
        precision: ``'float32'``, ``'bfloat16'``, and by ``bitsandbytes``, in blocks of 64 entries,
            ``'int8'`` (dynamic quantisation; Dettmers et al., 2022) or ``'nf4'`` (4-bit
            NormalFloat; Dettmers et al., 2023).
        projection: The coordinates that are kept: ``'none'`` for all, ``'svd'`` for those along the
            leading right singular vectors of a sample of training gradients, or ``'random'`` for a
            seeded :class:`~curvlinops_diffusion.RandomProjection`.
        size: Coordinates kept, with a projection.
        sample: Training examples (evenly spaced) that the projection is chosen from.
        seed: The seed of a random projection.
    """

    precision: str | Precision = Precision.BFLOAT16
    projection: str | Projection = Projection.NONE
    size: int | None = None
    sample: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse unknown options, a missing size, and a missing ``bitsandbytes``."""
        precision = check_option("precision", self.precision, Precision)
        projection = check_option("projection", self.projection, Projection)
        object.__setattr__(self, "precision", precision)
        object.__setattr__(self, "projection", projection)
        check_count("sample", self.sample)
        if projection is Projection.NONE:
            if self.size is not None:
                raise ValueError(
                    f"`size` needs a projection, got {self.size!r} without. Pass projection='svd' "
                    "or 'random', or no size."
                )
        else:
            check_count("size", self.size)
        if precision in (Precision.INT8, Precision.NF4):
            _bitsandbytes()

    def as_dict(self) -> dict[str, Any]:
        """The options as plain values; a seed where there is something random."""
        values = {key: getattr(value, "value", value) for key, value in vars(self).items()}
        if self.projection is not Projection.RANDOM:
            del values["seed"]
        return values

    def fit(self, sample_BP: Tensor) -> dict[str, Tensor]:
        """Choose the coordinates of an ``'svd'`` projection, from a sample of gradients."""
        B, P = sample_BP.shape
        assert self.size is not None
        if self.size > min(B, P):
            raise ValueError(
                f"`size` must be at most {min(B, P)} for a 'svd' projection from {B} gradients of "
                f"{P} entries, got {self.size}. Pass a smaller size or a larger sample."
            )
        # the sample is small beside P: through its Gram matrix
        gram_BB = sample_BP.double() @ sample_BP.double().T
        values, vectors = torch.linalg.eigh(gram_BB)
        values, vectors = values[-self.size :].flip(0), vectors[:, -self.size :].flip(1)
        scale = values.clamp(min=values[0] * 1e-12).rsqrt()
        return {"basis": (sample_BP.T.double() @ (vectors * scale)).to(sample_BP)}

    def project(self, rows_BP: Tensor, projection: dict[str, Tensor]) -> Tensor:
        """Take the coordinates kept, ``[B, P] -> [B, k]``."""
        if self.projection is Projection.RANDOM:
            assert self.size is not None
            return RandomProjection(self.size, self.seed)(rows_BP)
        return rows_BP @ projection["basis"] if "basis" in projection else rows_BP

    def encode(self, rows_Bk: Tensor) -> dict[str, Tensor]:
        """Turn rows into tensors to be stored."""
        match self.precision:
            case Precision.FLOAT32:
                return {"rows": rows_Bk.float()}
            case Precision.BFLOAT16:
                return {"rows": rows_Bk.bfloat16()}
        functional = _bitsandbytes()
        # whole blocks for each row, so that rows do not depend on their neighbours
        rows_Bk = torch.nn.functional.pad(rows_Bk.float(), (0, -rows_Bk.shape[1] % BLOCK))
        B = len(rows_Bk)
        if self.precision is Precision.INT8:
            codes, state = functional.quantize_blockwise(rows_Bk, blocksize=BLOCK)
        else:
            codes, state = functional.quantize_4bit(rows_Bk, blocksize=BLOCK, quant_type="nf4")
        return {"codes": codes.reshape(B, -1), "scales": state.absmax.reshape(B, -1)}

    def bytes_per_row(self, size: int) -> int:
        """Bytes on disk for each row of so many coordinates."""
        if self.precision in (Precision.FLOAT32, Precision.BFLOAT16):
            return (4 if self.precision is Precision.FLOAT32 else 2) * size
        codes, blocks = self._codes_and_blocks(size)
        return codes + 4 * blocks

    def _codes_and_blocks(self, size: int) -> tuple[int, int]:
        """Bytes of codes, and blocks, of a row of so many coordinates."""
        blocks = -(-size // BLOCK)
        return blocks * BLOCK // (1 if self.precision is Precision.INT8 else 2), blocks

    def decode(self, stored: dict[str, Tensor], size: int) -> Tensor:
        """Turn stored tensors into rows ``[B, size]``, float32; refuse those that cannot be."""
        if self.precision not in (Precision.INT8, Precision.NF4):
            return stored["rows"].float()
        functional = _bitsandbytes()
        codes, scales = stored["codes"], stored["scales"].flatten()
        B, (bytes_a_row, blocks) = len(codes), self._codes_and_blocks(size)
        # bitsandbytes reads as many scales as there are blocks, wherever they end
        shapes, types = (codes.shape, scales.shape), (codes.dtype, scales.dtype)
        if shapes != ((B, bytes_a_row), (B * blocks,)) or types != (torch.uint8, torch.float32):
            raise ValueError("codes and scales do not fit together")
        if self.precision is Precision.INT8:
            code = functional.create_dynamic_map().to(codes.device)
            rows = functional.dequantize_blockwise(codes, absmax=scales, code=code, blocksize=BLOCK)
        else:
            state = functional.QuantState(
                absmax=scales,
                shape=torch.Size((B, blocks * BLOCK)),
                code=functional.get_4bit_type("nf4", device=str(codes.device)),
                blocksize=BLOCK,
                quant_type="nf4",
                dtype=torch.float32,
            )
            rows = functional.dequantize_4bit(codes.reshape(-1, 1), state)
        return rows.reshape(B, blocks * BLOCK)[:, :size].float()


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ValueError(
            "precision='int8' and 'nf4' need the package bitsandbytes: pip install "
            "'curvlinops-diffusion[quantisation]'."
        ) from error
    return functional
