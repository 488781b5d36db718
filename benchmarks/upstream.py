"""``curvlinops``' own operators on our problems, in either of its two interfaces.

Up to version 3.0 parameters are a list and K-FAC's inverse is an operator of its own. On its main
branch parameters are a dict, ``.inverse()`` is a method, and the Monte-Carlo Fisher a GGN with
``mc_samples``. Which of the two is installed is read off its signatures, since the version's number
does not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from inspect import signature
from types import ModuleType
from typing import Any

import curvlinops
import torch
from torch import Tensor, nn

from curvlinops_diffusion import NoisedRegression


def params_are_named(library: ModuleType = curvlinops) -> bool:
    """Whether operators take parameters as a dict."""
    annotation = signature(library.GGNLinearOperator).parameters["params"].annotation
    return "dict" in str(annotation)


def upstream_operator(
    kind: str,
    regression: NoisedRegression,
    names: Collection[str] | None = None,
    *,
    library: ModuleType = curvlinops,
    **options: Any,
) -> Any:
    """An operator of ``curvlinops`` on a regression.

    Args:
        kind: Its class' name, as up to version 3.0.
        regression: The problem.
        names: The parameters' names in the network; ``None`` for all.
        library: ``curvlinops``.
        options: Further arguments.
    """
    own = dict(regression.objective.model.named_parameters())
    chosen = {name: own[name] for name in (own if names is None else names)}
    params: Any = list(chosen.values())
    if params_are_named(library):
        params = {f"model.{name}": value for name, value in chosen.items()}
    if kind == "FisherMCLinearOperator" and not hasattr(library, kind):
        kind, options = "GGNLinearOperator", {"mc_samples": 1} | options
    losses = () if "Jacobian" in kind else (regression.loss_func,)
    return getattr(library, kind)(
        regression.model_func,
        *losses,
        params,
        regression,
        batch_size_fn=regression.batch_size_fn,
        **options,
    )


def upstream_inverse(K: Any, *, library: ModuleType = curvlinops, **options: Any) -> Any:
    """The inverse of ``curvlinops``' K-FAC or EK-FAC, damped by its own options."""
    if not hasattr(library, "KFACInverseLinearOperator"):
        if not takes(K.inverse, "use_exact_damping"):
            options.pop("use_exact_damping", None)  # EK-FAC has no other damping
        return K.inverse(**options)
    return library.KFACInverseLinearOperator(K, **options)


def upstream_trace(operator: Any) -> Tensor:
    """The trace of ``curvlinops``' K-FAC or EK-FAC: a property up to version 3.0, then a method."""
    trace = operator.trace
    result: Tensor = trace() if callable(trace) else trace
    return result


def takes(function: Callable[..., Any], argument: str) -> bool:
    """Whether a function has an argument of this name."""
    return argument in signature(function).parameters


def their_parameters(regression: NoisedRegression) -> list[str]:
    """Names of the parameters of ``Linear`` and ``Conv2d``, which ``curvlinops``' K-FAC knows."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in regression.objective.model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for name, _ in module.named_parameters(recurse=False)
    ]


def fitted_upstream_factors(regression: NoisedRegression) -> Any:
    """``curvlinops``' K-FAC with its factors, once."""
    operator = upstream_operator(
        "KFACLinearOperator",
        regression,
        their_parameters(regression),
        fisher_type="mc",
        num_data=regression.num_samples,
        check_deterministic=False,
    )
    if not params_are_named():
        operator.compute_kronecker_factors()
    return operator


def upstream_passes(
    regression: NoisedRegression, decomposed: bool = True
) -> dict[str, Callable[[], object]]:
    """``curvlinops``' own two passes, the second only if its factors are decomposed.

    Where constructors compute (its main branch), the second cannot be run alone: it is EK-FAC as a
    whole there, and named so.
    """
    settings = {
        "fisher_type": "mc",
        "num_data": regression.num_samples,
        "check_deterministic": False,  # or the constructor computes all of it
    }
    names = their_parameters(regression)
    if params_are_named():

        def whole(kind: str) -> Callable[[], object]:
            return lambda: upstream_operator(kind, regression, names, **settings)

        passes = {"curvlinops K-FAC factors": whole("KFACLinearOperator")}
        return passes | (
            {"curvlinops EK-FAC as a whole": whole("EKFACLinearOperator")} if decomposed else {}
        )
    operator = upstream_operator("EKFACLinearOperator", regression, names, **settings)
    operator.compute_kronecker_factors()
    factors = operator._input_covariances, operator._gradient_covariances
    if decomposed:
        operator._compute_eigenvectors()  # its second pass cannot be run alone otherwise

    def first() -> None:
        operator._input_covariances, operator._gradient_covariances = {}, {}
        operator.compute_kronecker_factors()
        operator._input_covariances, operator._gradient_covariances = factors

    separate: dict[str, Callable[[], object]] = {"curvlinops K-FAC factors": first}
    if decomposed:
        separate["curvlinops EK-FAC eigenvalues"] = operator.compute_eigenvalue_correction
    return separate


def first_product(operator: Any) -> Tensor:
    """A product, after which the operator has computed what it computes once."""
    ones = torch.ones(operator.shape[1], 1, device=operator.device, dtype=operator.dtype)
    product: Tensor = operator @ ones
    return product
