"""LocMoE (arXiv 2401.13920): a gate without parameters, and a loss that keeps tokens on their node."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe.routing.contract import Router, RoutingInput, SparseRouting
from evomoe.routing.locality import (
    check_nodes,
    check_pooling,
    grouped_average_pooling,
    local_distribution,
    locality_loss,
    off_node_share,
)
from evomoe.routing.losses import switch_balance
from evomoe.routing.selection import (
    assign_within_capacity,
    check_capacity_factor,
    make_routing,
)


class LocMoE(Router):
    """The best expert of ``softmax(ReLU(GrAP(x)))``, with its probability as weight (section 3.2).

    GrAP, grouped average pooling, scores expert i by the mean of the i-th block of features. It has no parameters: the
    combine weights and the losses teach the layers below it where to send a token.

    The nodes of a cluster are simulated: experts lie on ``num_nodes`` nodes in contiguous blocks, and so do the
    sequences of a batch, as the ranks of a data-parallel run would hold them. A batch of one lies on node 0. In a run
    of several processes each of them simulates all nodes for its own sequences.

    Where the paper is silent, ours: ties that the ReLU makes are broken by the score before it, there is no term
    ``epsilon`` in the score, the local distribution is smoothed, and a full expert serves earlier tokens first.

    Losses:
        balance: ``E * sum_i f_i P_i``, the auxiliary loss of section 3.2; 1 at balance.
        locality: ``KL(D_c || D_l)`` of section 3.2, the mean over the tokens' nodes: how far the mean probabilities
            of a node's tokens are from an even choice among its own experts; 0 where they are equal.

    Metrics:
        off_node: share of the assignments whose expert lives on another node than the token.

    Args:
        d_model: width D of the token states, a multiple of ``num_experts``.
        num_experts: number of experts E.
        num_nodes: number of simulated nodes, at most E.
        smoothing: share of the local distribution that lies on the other nodes' experts, in (0, 1).
        relu: cut the scores at 0, as published.
        capacity_factor: places per expert in training, as a multiple of T / E; None drops nothing. Theorem 1 bounds the
            number of places from below, see ``locality.log_capacity_exact``.
        eval_capacity_factor: the same in evaluation.
    """

    loss_names = ("balance", "locality")
    local: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        num_nodes: int = 2,
        smoothing: float = 0.1,
        relu: bool = True,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
    ) -> None:
        super().__init__(d_model, num_experts)
        check_pooling(d_model, num_experts)
        check_nodes(num_nodes, num_experts, smoothing)
        check_capacity_factor("router capacity_factor", capacity_factor)
        check_capacity_factor("router eval_capacity_factor", eval_capacity_factor)
        self.num_nodes = num_nodes
        self.relu = relu
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.smoothing = smoothing
        self.register_buffer("local", torch.empty(num_nodes, num_experts), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Write the local distribution; there is nothing to draw."""
        self.local.copy_(local_distribution(self.num_experts, self.num_nodes, self.smoothing))

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        """Route ``inputs.hidden (T, D)``."""
        pooled = grouped_average_pooling(inputs.hidden, self.num_experts)  # (T, E)
        probabilities = F.softmax(pooled.relu() if self.relu else pooled, dim=1)
        expert = pooled.argmax(dim=1, keepdim=True)  # (T, 1)
        weight = probabilities.gather(1, expert)

        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        assignments, wanted = assign_within_capacity(inputs, expert, weight, self.num_experts, factor)
        routing = make_routing(inputs, assignments, probabilities, wanted)
        balance = switch_balance(routing.scores, routing.load, routing.num_tokens)
        return replace(
            routing,
            losses={"balance": balance.loss(), "locality": locality_loss(routing.scores, self.local, inputs)},
            balance=balance,
            metrics={"off_node": off_node_share(routing, inputs, self.num_nodes)},
        )
