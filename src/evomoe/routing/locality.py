"""What LocMoE (arXiv 2401.13920) and LocMoE+ (arXiv 2406.00023) share: the gate, simulated nodes, capacity bounds.

Shapes: T tokens, D model width, E experts, N nodes, B sequences.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from scipy import special
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.routing.contract import RoutingInput, SparseRouting

Number = TypeVar("Number", float, Tensor)


# The gate


def grouped_average_pooling(hidden: Tensor, num_experts: int) -> Tensor:
    """GrAP: the mean of the i-th of E contiguous blocks of features, fp32 ``(T, E)``.

    It is a dense gate with the fixed rows ``omega_i``, E / D on block i and 0 elsewhere (LocMoE, section 3.2): they are
    orthogonal, of norm ``sqrt(E / D)``, and cost D additions for a token.

    Args:
        hidden: ``(T, D)``, D a multiple of E.
        num_experts: number of experts E.
    """
    return hidden.float().unflatten(1, (num_experts, -1)).mean(dim=2)


def cosine_affinity(hidden: Tensor, num_experts: int) -> Tensor:
    """``cos(x_t, omega_i)`` in [-1, 1], fp32 ``(T, E)`` (LocMoE+, the affinity score); 0 for a token of zeros.

    Args:
        hidden: ``(T, D)``, D a multiple of E.
        num_experts: number of experts E.
    """
    pooled = grouped_average_pooling(hidden, num_experts) * math.sqrt(hidden.shape[1] / num_experts)
    return pooled / hidden.float().norm(dim=1, keepdim=True).clamp(min=1e-12)


def check_pooling(d_model: int, num_experts: int) -> None:
    """Refuse a width that cannot be cut into one block for each expert."""
    if d_model % num_experts:
        raise ConfigError(
            f"d_model={d_model} with {num_experts} experts: grouped average pooling needs one block of features for "
            "each expert; choose a d_model that is a multiple of num_experts"
        )


# Simulated nodes


def check_nodes(num_nodes: int, num_experts: int, smoothing: float) -> None:
    """Refuse nodes without an expert, for which nothing is local, and a smoothing without a finite divergence."""
    if not 1 <= num_nodes <= num_experts:
        raise ConfigError(
            f"router num_nodes={num_nodes} with {num_experts} experts: expected 1 to {num_experts}, so that every node "
            "holds an expert"
        )
    if not 0 < smoothing < 1:
        raise ConfigError(f"router smoothing={smoothing}: expected a share in (0, 1), at 0 the loss is infinite")


def node_of(number: int, num_nodes: int, device: torch.device | None = None) -> Tensor:
    """Node of each of ``number`` experts or sequences, which lie on the nodes in contiguous blocks, ``(number,)``.

    The blocks are equal where ``num_nodes`` divides ``number``, else they differ by one. Fewer sequences than nodes
    leave nodes without tokens; one sequence lies on node 0.
    """
    return torch.arange(number, device=device) * num_nodes // number


def local_distribution(num_experts: int, num_nodes: int, smoothing: float) -> Tensor:
    """``D_l``: where the tokens of each node go if they stay, fp32 ``(N, E)``.

    A share ``1 - smoothing`` goes evenly to the node's own experts, the rest evenly to the others: without it the
    divergence is infinite for any token that leaves. With one node all experts are local, and D_l is uniform.
    """
    local = node_of(num_experts, num_nodes) == torch.arange(num_nodes)[:, None]  # (N, E)
    of_local = local / local.sum(dim=1, keepdim=True)
    if num_nodes == 1:
        return of_local
    return (1 - smoothing) * of_local + smoothing * ~local / (~local).sum(dim=1, keepdim=True)


def locality_loss(probabilities: Tensor, local: Tensor, inputs: RoutingInput) -> Tensor:
    """``sum_g T_g / T * KL(D_c^g || D_l^g)`` over the nodes g, a 0-dim tensor (LocMoE, section 3.2, the locality loss).

    ``D_c^g`` is the mean probability of the ``T_g`` real tokens on node g, through which the gradient flows. The
    sequences of the batch lie on the nodes in contiguous blocks: what the ranks of a data-parallel run would hold.

    Args:
        probabilities: ``(T, E)``, zero rows at padding.
        local: ``D_l``, ``(N, E)``.
        inputs: what was routed.
    """
    shape, num_nodes = (inputs.batch, inputs.sequence), local.shape[0]
    nodes = torch.arange(num_nodes, device=local.device)
    on_node = node_of(inputs.batch, num_nodes, local.device)[:, None] == nodes  # (B, N)
    real = torch.ones_like(probabilities[:, 0]) if inputs.valid is None else inputs.valid
    tokens = (on_node * real.view(shape).sum(dim=1, keepdim=True)).sum(dim=0)  # (N,)
    of_sequence = probabilities.view(*shape, probabilities.shape[1]).sum(dim=1)  # (B, E)
    mass = (on_node[:, :, None] * of_sequence[:, None]).sum(dim=0)  # (N, E)
    current = mass / tokens.clamp(min=1)[:, None]
    # The clamp keeps the gradient finite at an expert that no token considers.
    divergence = (current * (current.clamp(min=torch.finfo(current.dtype).tiny).log() - local.log())).sum(dim=1)
    return (tokens * divergence).sum() / tokens.sum().clamp(min=1)


def off_node_share(routing: SparseRouting, inputs: RoutingInput, num_nodes: int) -> Tensor:
    """Share of the assignments whose expert lives on another node than the token, a 0-dim tensor."""
    device = routing.token.device
    node_of_expert = node_of(routing.tokens_per_expert.numel(), num_nodes, device)
    node_of_sequence = node_of(inputs.batch, num_nodes, device)
    away = node_of_expert[routing.expert] != node_of_sequence[routing.token // inputs.sequence]
    return away.sum() / max(away.numel(), 1)


# Capacity bounds (LocMoE, lemma 3 and theorem 1)


def log_cap_probability(d_model: int, delta: float) -> float:
    """``log p_delta``, the chance that a random direction has ``|cos| >= delta`` with a given one (lemma 3).

    ``p_delta = 1 - I_{delta^2}(1/2, (d - 1)/2)`` for directions uniform on the sphere in R^d, with the regularised
    incomplete beta function I. Both caps are counted, as in the paper; tokens are routed by one of them. The logarithm
    is ``-inf`` where the chance itself underflows.

    Args:
        d_model: dimension d >= 2.
        delta: cosine in (0, 1).
    """
    probability = special.betainc((d_model - 1) / 2, 0.5, 1 - delta**2)
    return math.log(probability) if probability > 0 else -math.inf


def log_capacity_exact(num_experts: int, d_model: int, delta: float) -> float:
    """``log(1 / (E p_delta))``: tokens among which an expert finds one that it discriminates (theorem 1)."""
    return -math.log(num_experts) - log_cap_probability(d_model, delta)


def log_capacity_erfc(num_experts: int, d_model: int, delta: float) -> float:
    """``log(1 / (E erfc(sqrt(delta^2 d / (2 - delta^2)))))``: the same for large d; above the exact one for small d."""
    z = math.sqrt(delta**2 * d_model / (2 - delta**2))
    return float(-math.log(num_experts) + z**2 - math.log(special.erfcx(z)))


def log_capacity_exponential(num_experts: int, d_model: int, delta: Number) -> Number:
    """``log((1 / E) exp(delta^2 d / (2 - delta^2)))``: below both for d >= 3; LocMoE+ estimates it in training."""
    return delta**2 * d_model / (2 - delta**2) - math.log(num_experts)
