"""Slow, obvious twins: dense matrices in plain loops, from nothing but the regression's batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, unfold

from curvlinops_diffusion import NoisedRegression


def to_dense(operator: Any) -> Tensor:
    """The operator's matrix."""
    return operator @ torch.eye(operator.shape[1], dtype=operator.dtype, device=operator.device)


def params_of(model: nn.Module, names: Sequence[str] | None = None) -> list[Tensor]:
    own = dict(model.named_parameters())
    return [own[name] for name in (own if names is None else names)]


def flat_gradient(output: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The gradient of a scalar in the parameters, flattened."""
    grads = torch.autograd.grad(output, params, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(params, grads, strict=True)
        ]
    )


def singles(regression: NoisedRegression) -> Iterator[tuple[int, Any, int]]:
    """Every (example, draw) as (index, batch that holds it, position in the batch)."""
    for batch in regression.batches():
        for position, index in enumerate(batch.indices):
            yield index, batch, position


def entry_weights(batch: Any) -> Tensor:
    """Weights ``[B, D]`` of the squared errors, without those of the examples."""
    return torch.ones_like(batch.target_BD) if batch.mask_BD is None else batch.mask_BD


def dense_ggn(regression: NoisedRegression, params: Sequence[Tensor]) -> Tensor:
    """``1/(NR) Σ 2 w r JᵀJ``, the Jacobian row by row."""
    P = sum(p.numel() for p in params)
    total, count = torch.zeros(P, P, dtype=torch.float64, device=params[0].device), 0
    with sdpa_kernel(SDPBackend.MATH):
        for batch in regression.batches():
            prediction = regression.objective.predict(batch)
            for b, row in enumerate(prediction):
                J = torch.stack([flat_gradient(entry, params) for entry in row])
                total += 2 * batch.weight_B[b] * J.T @ (entry_weights(batch)[b].unsqueeze(1) * J)
                count += 1
    return total / count


def ggn_rows(regression: NoisedRegression, params: Sequence[Tensor]) -> Tensor:
    """``R`` with ``G = Rᵀ R``, shape ``[N R D, P]``: for networks whose ``G`` is large."""
    rows = []
    with sdpa_kernel(SDPBackend.MATH):
        for batch in regression.batches():
            prediction = regression.objective.predict(batch)
            for b, row in enumerate(prediction):
                J = torch.stack([flat_gradient(entry, params) for entry in row])
                rows.append((2 * batch.weight_B[b] / regression.num_samples).sqrt() * J)
    return torch.cat(rows)


def dense_loss_ggn(regression: NoisedRegression, params: Sequence[Tensor]) -> Tensor:
    """``1/(NR) Σ ∇ℓ_t ∇ℓ_tᵀ``, the empirical Fisher."""
    P = sum(p.numel() for p in params)
    total, count = torch.zeros(P, P, dtype=torch.float64, device=params[0].device), 0
    for batch in regression.batches():
        prediction = regression.objective.predict(batch)
        for b in range(len(prediction)):
            squares = entry_weights(batch)[b] * (prediction[b] - batch.target_BD[b]) ** 2
            g = flat_gradient(batch.weight_B[b] * squares.sum(), params)
            total += torch.outer(g, g)
            count += 1
    return total / count


def example_gradients(
    regression: NoisedRegression,
    params: Sequence[Tensor],
    value: Callable[[Any, Tensor, int], Tensor] | None = None,
) -> Tensor:
    """Gradients ``[N, P]`` of each example's value (the loss by default), averaged over draws."""
    P = sum(p.numel() for p in params)
    rows = torch.zeros(regression.num_data, P, dtype=torch.float64)
    for batch in regression.batches():
        prediction = regression.objective.predict(batch)
        for b, n in enumerate(batch.indices):
            if value is None:
                squares = entry_weights(batch)[b] * (prediction[b] - batch.target_BD[b]) ** 2
                scalar = batch.weight_B[b] * squares.sum()
            else:
                scalar = value(batch, prediction, b)
            rows[n] += flat_gradient(scalar, params).double() / regression.num_draws
    return rows


def scores(J_query: Tensor, G: Tensor, damping: float, J_train: Tensor) -> Tensor:
    """``1/N J_query (G + λI)⁻¹ J_trainᵀ``."""
    damped = G + damping * torch.eye(len(G), dtype=G.dtype)
    return J_query @ torch.linalg.solve(damped, J_train.T) / len(J_train)


def block_of(matrix: Tensor, model: nn.Module, all_names: Sequence[str], names: Sequence[str]):
    """The diagonal block of some parameters within a matrix over ``all_names``."""
    own, index, start = dict(model.named_parameters()), {}, 0
    for name in all_names:
        size = own[name].numel()
        index[name] = torch.arange(start, start + size)
        start += size
    chosen = torch.cat([index[name] for name in names])
    return matrix[chosen][:, chosen]


def dense_block(placed: Any, model: nn.Module) -> Tensor:
    """The matrix of a block, on its parameters flattened one after the other."""
    own = dict(model.named_parameters())
    shapes = [own[name].shape for name in placed.params]
    identity = torch.eye(sum(s.numel() for s in shapes), dtype=placed.block.trace().dtype)
    pieces = identity.split([s.numel() for s in shapes])
    given = {
        name: piece.reshape(*shape, -1)
        for name, shape, piece in zip(placed.params, shapes, pieces, strict=True)
    }
    product = placed.multiply(given)
    return torch.cat([product[name].reshape(-1, len(identity)) for name in placed.params])


# ---------------------------------------------------------------------------------------------
# K-FAC and EK-FAC
# ---------------------------------------------------------------------------------------------


def shared_inputs(module: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as ``[N, S, I]``."""
    if isinstance(module, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1])
    assert isinstance(module, nn.Conv2d)
    left, right, top, bottom = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = pad(x, (left, right, top, bottom), mode=mode)
    return unfold(x, module.kernel_size, module.dilation, 0, module.stride).mT


def shared_gradients(module: nn.Module, g: Tensor) -> Tensor:
    """The gradient in a layer's output as ``[N, S, O]``."""
    if isinstance(module, nn.Linear):
        return g.reshape(len(g), -1, g.shape[-1])
    return g.flatten(2).mT


def pulled_back(
    regression: NoisedRegression,
    module: nn.Module,
    vectors: Callable[[Any, Tensor], list[Tensor]],
    raw: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """For every example, draw and loss vector, the layer's ``(a [S, I], b [S, O])``.

    The positions of all calls of the layer that the prediction depends on are laid side by side. If
    ``raw``, what the layer's only call saw: its input, and the gradient in its output.
    """
    for batch in regression.batches():
        seen: list[tuple[Tensor, Tensor]] = []
        handle = module.register_forward_hook(
            lambda m, args, out, seen=seen: seen.append((args[0].detach(), out))
        )
        prediction = regression.objective.predict(batch)
        handle.remove()
        seen = [(x, out) for x, out in seen if out.requires_grad]
        outputs = [out for _, out in seen]
        for v in vectors(batch, prediction.detach()):
            grads = torch.autograd.grad(
                prediction, outputs, v, retain_graph=True, allow_unused=True
            )
            if raw:
                yield from zip(seen[0][0], grads[0], strict=True)
                continue
            pairs = [(x, g) for (x, _), g in zip(seen, grads, strict=True) if g is not None]
            if not pairs:
                continue
            a = torch.cat([shared_inputs(module, x) for x, _ in pairs], 1)
            b = torch.cat([shared_gradients(module, g) for _, g in pairs], 1)
            yield from zip(a, b, strict=True)


def type2_vectors(batch: Any, prediction: Tensor) -> list[Tensor]:
    """Every column of the square root of the loss' Hessian."""
    D = prediction.shape[1]
    root = (2 * batch.weight_B.unsqueeze(1) * entry_weights(batch)).sqrt()
    return [root * torch.eye(D, dtype=prediction.dtype)[d] for d in range(D)]


def empirical_vectors(batch: Any, prediction: Tensor) -> list[Tensor]:
    """The loss' gradient in the prediction."""
    errors = entry_weights(batch) * (prediction - batch.target_BD)
    return [2 * batch.weight_B.unsqueeze(1) * errors]


def kronecker_factors(
    regression: NoisedRegression,
    module: nn.Module,
    vectors: Callable[[Any, Tensor], list[Tensor]],
    approx: str,
    with_bias: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(A, B)`` by plain loops over examples, draws and loss vectors."""
    A: Any = 0
    B: Any = 0
    D = next(iter(regression.batches())).target_BD.shape[1]
    per_draw = len(vectors(next(iter(regression.batches())), torch.zeros(2, D).double()[:1]))
    for a, b in pulled_back(regression, module, vectors):
        if with_bias:
            a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
        if approx == "expand":
            A = A + a.T @ a / len(a) / per_draw
            B = B + b.T @ b
        else:
            A = A + torch.outer(a.mean(0), a.mean(0)) / per_draw
            B = B + torch.outer(b.sum(0), b.sum(0))
    return A / regression.num_samples, B / regression.num_samples


def layer_ggn(
    regression: NoisedRegression,
    module: nn.Module,
    vectors: Callable[[Any, Tensor], list[Tensor]],
    part: str,
) -> Tensor:
    """The layer's exact block: second moment of ``vec(Σ_s b_s a_sᵀ)``, row-major."""
    total: Any = 0
    for a, b in pulled_back(regression, module, vectors):
        ones = torch.ones(len(a), 1, dtype=a.dtype)
        a = {"weight": a, "bias": ones, "joint": torch.cat([a, ones], 1)}[part]
        g = (b.T @ a).flatten()
        total = total + torch.outer(g, g)
    return total / regression.num_samples


def ekfac_block(A: Tensor, B: Tensor, exact: Tensor) -> Tensor:
    """The exact block's diagonal in the eigenbasis of the Kronecker factors."""
    U = torch.kron(torch.linalg.eigh(B).eigenvectors, torch.linalg.eigh(A).eigenvectors)
    return U @ torch.diag(torch.diag(U.T @ exact @ U)) @ U.T
