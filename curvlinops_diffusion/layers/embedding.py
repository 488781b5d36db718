"""Embeddings: linear layers whose inputs are one-hot, so that the input factor is diagonal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from curvlinops_diffusion.layers.kind import SharingKind
from curvlinops_diffusion.layers.moments import LatestProduct, Moment, SummedMoment


class EmbeddingKind(SharingKind):
    """``nn.Embedding``: token ``k`` has the input ``e_k``; the padding token has none.

    ``A`` is diagonal, the tokens' frequencies, and is kept as the vector ``[I]``. That of
    ``kfac_approx='reduce'`` would not be diagonal for several tokens an example; ``'expand'``'s is
    taken in its place.
    """

    transposed = True
    joint = False
    one_hot = True

    def unsupported(self, module: nn.Module) -> str:
        """Some options change the weight, or what its gradient means."""
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return "an embedding with max_norm changes its weight in the forward pass"
        return "an embedding with scale_grad_by_freq" * module.scale_grad_by_freq

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """One token for each example, or several."""
        return x.ndim >= 1

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """One-hot vectors; only for few tokens and small vocabularies."""
        assert isinstance(module, nn.Embedding)
        tokens = x.reshape(len(x), -1)
        one_hot = nn.functional.one_hot(tokens, module.num_embeddings).to(module.weight.dtype)
        return one_hot * _counts(module, tokens).unsqueeze(2)

    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """Tokens are positions."""
        return g.reshape(len(g), -1, g.shape[-1])

    def positions(self, module: nn.Module, x: Tensor) -> int:
        """The number of tokens."""
        return x[0].numel()

    def input_norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """One-hot vectors have norm one."""
        return torch.tensor(float(x.numel()), device=x.device).sqrt()

    def input_moment(self, module: nn.Module, latest: LatestProduct) -> Moment:
        """Count each token: the diagonal of the second moment, in float64."""
        embedding = module
        assert isinstance(embedding, nn.Embedding)

        def frequencies(x: Tensor) -> Tensor:
            tokens = x.flatten()
            weights = _counts(embedding, tokens).double()
            counts = weights.new_zeros(embedding.num_embeddings)
            return counts.index_add_(0, tokens, weights)  # a GPU need not be waited for

        return SummedMoment(frequencies)

    def weight_gradients(self, module: nn.Module, x: Tensor, g: Tensor, sums: int) -> Tensor:
        """Each token's gradients, added up."""
        assert isinstance(module, nn.Embedding)
        tokens, rows = self._sums_by_token(module, x, g, sums)
        result = rows.new_zeros(sums * module.num_embeddings, rows.shape[1])
        result[tokens] = rows
        return result.unflatten(0, (sums, -1)).mT

    def squares(
        self,
        module: nn.Module,
        xs: Sequence[Tensor],
        gs: Sequence[Tensor],
        sums: int,
        U_A: Tensor | None,
        U_B: Tensor | None,
        extended: bool,
    ) -> Tensor:
        """Only the rows of tokens that occur are rotated."""
        assert isinstance(module, nn.Embedding)
        assert not extended
        x = torch.cat([x.reshape(sums, -1) for x in xs], 1)
        g = torch.cat([g.reshape(sums, -1, g.shape[-1]) for g in gs], 1)
        tokens, rows = self._sums_by_token(module, x, g, sums)
        rows = rows if U_B is None else rows @ U_B
        squares = rows.new_zeros(module.num_embeddings, rows.shape[1])
        squares.index_add_(0, tokens % module.num_embeddings, rows.square())
        return squares.T

    def _sums_by_token(
        self, module: nn.Embedding, x: Tensor, g: Tensor, sums: int
    ) -> tuple[Tensor, Tensor]:
        """The tokens that occur in each sum, as ``sum V + token``, and their summed gradients."""
        tokens = x.reshape(sums, -1)
        flat = tokens + torch.arange(sums, device=x.device).unsqueeze(1) * module.num_embeddings
        found, position = flat.unique(return_inverse=True)
        g = g.reshape(sums, tokens.shape[1], -1) * _counts(module, tokens).to(g).unsqueeze(2)
        rows = g.new_zeros(len(found), g.shape[2])
        return found, rows.index_add_(0, position.flatten(), g.flatten(0, 1))


def _counts(module: nn.Embedding, tokens: Tensor) -> Tensor:
    """Zero for the padding token, which has no gradient; one for the others."""
    if module.padding_idx is None:
        return torch.ones_like(tokens)
    return (tokens != module.padding_idx).to(tokens)
