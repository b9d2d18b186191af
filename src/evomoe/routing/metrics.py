"""What a routing tells about itself, as 0-dim tensors that need no device synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from evomoe.routing.contract import Routing, SparseRouting


def load_max_violation(tokens_per_expert: Tensor) -> Tensor:
    """MaxVio ``max_i load_i / mean load - 1`` (arXiv 2408.15664): 0 at balance, E / K - 1 at collapse."""
    load = tokens_per_expert.float()
    return (load.max() - load.mean()) / load.mean().clamp(min=1e-9)


def router_entropy(routing: Routing) -> Tensor:
    """Mean entropy of the tokens' scores in nats: log(E) when undecided, 0 when certain."""
    return torch.special.entr(routing.scores).sum() / routing.num_tokens.clamp(min=1)


def dropped_fraction(routing: SparseRouting) -> Tensor:
    """Share of the wanted assignments that a capacity bound refused."""
    wanted = routing.dropped + routing.tokens_per_expert.sum()
    return routing.dropped / wanted.clamp(min=1)


def brief_metrics(routing: Routing) -> dict[str, Tensor]:
    """The scalars that are logged for every MoE layer, the router's own included."""
    brief = {
        "active_experts": routing.active_experts,
        "load_max_violation": load_max_violation(routing.load),
        "router_entropy": router_entropy(routing),
    }
    if isinstance(routing, SparseRouting):
        brief["dropped"] = dropped_fraction(routing)
    return brief | routing.metrics
