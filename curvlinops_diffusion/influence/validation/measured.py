"""Measures queries under networks that were trained anew.

Legend: M networks, Q queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator

Weights = nn.Module | Mapping[str, Tensor]


def values_of_networks(
    query: NoisedRegression, networks: Iterable[Weights], *, measurement: Any = "loss"
) -> Tensor:
    """Measure the queries under each of several networks, on the same draws.

    The draws are those of ``query``: fixed by its seed, so that values of different networks differ
    by their weights alone. The network of ``query`` is given each one's weights in turn, and its
    own back at the end.

    Args:
        query: The queries, with objective and draws.
        networks: Networks of the same architecture, or their state dicts; one is used at a time, so
            that a generator may load them one by one.
        measurement: As that of :class:`~curvlinops_diffusion.ExampleGradientLinearOperator`.

    Returns:
        The values, ``[M, Q]``.

    Raises:
        ValueError: If a network is of another architecture, or there is none.

    Examples:
        >>> values = values_of_networks(query, [unet, unet.state_dict()])
        >>> values.shape, bool((values[0] == values[1]).all())
        (torch.Size([2, 2]), True)
    """
    J = ExampleGradientLinearOperator(query, measurement=measurement)
    model, found = query.objective.model, []
    own = {name: value.clone() for name, value in model.state_dict().items()}
    for network in networks:
        state = network.state_dict() if isinstance(network, nn.Module) else network
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
        if wrong:
            raise ValueError(
                "Networks must have the queries' architecture, got one that differs in "
                f"{', '.join(wrong[:5])}{', …' if len(wrong) > 5 else ''}."
            )
        try:
            model.load_state_dict(state)
            found.append(J.values())
        finally:
            model.load_state_dict(own)
    if not found:
        raise ValueError("`networks` is empty. Pass at least one.")
    return torch.stack(found)
