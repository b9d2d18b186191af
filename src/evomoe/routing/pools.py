"""Which tokens compete with each other: the pools of a batch.

Shapes: T tokens, E experts, G pools, n tokens of a pool.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.routing.contract import RoutingInput

POOLS = ("sequence", "batch", "position")
"""Tokens of a sequence (or image), of the batch, or at the same position of all sequences."""


class Pooled(NamedTuple):
    """The gate's view of all pools.

    Args:
        logits: ``(G, n, E)``, with noise if there is any.
        probabilities: their softmax over the experts, ``(G, n, E)``.
        valid: ``(G, n)`` bool, False at padding.
    """

    logits: Tensor
    probabilities: Tensor
    valid: Tensor


def check_pool(pool: str) -> None:
    """Refuse a pool that does not exist."""
    if pool not in POOLS:
        raise ConfigError(f"router pool={pool!r} is unknown: expected one of {', '.join(POOLS)}")


def to_pools(values: Tensor, inputs: RoutingInput, pool: str) -> Tensor:
    """``(T, ...)`` to ``(G, n, ...)``."""
    if pool == "batch":
        return values[None]
    by_sequence = values.view(inputs.batch, inputs.sequence, *values.shape[1:])
    return by_sequence if pool == "sequence" else by_sequence.transpose(0, 1)


def from_pools(values: Tensor, pool: str) -> Tensor:
    """``(G, n, ...)`` back to ``(T, ...)``."""
    return (values.transpose(0, 1) if pool == "position" else values).flatten(0, 1)


def real_tokens(inputs: RoutingInput, pool: str) -> Tensor:
    """Which tokens of the pools are no padding, ``(G, n)`` bool."""
    valid = inputs.valid
    if valid is None:
        valid = torch.ones(inputs.hidden.shape[0], dtype=torch.bool, device=inputs.hidden.device)
    return to_pools(valid, inputs, pool)
