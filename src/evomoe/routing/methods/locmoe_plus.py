"""LocMoE+, or Expert-Token Resonance (arXiv 2406.00023): tokens choose experts, then experts choose among them."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe.routing.contract import Router, RoutingInput, SparseRouting
from evomoe.routing.locality import (
    check_nodes,
    check_pooling,
    cosine_affinity,
    local_distribution,
    locality_loss,
    log_capacity_exponential,
    off_node_share,
)
from evomoe.routing.losses import switch_balance
from evomoe.routing.selection import (
    assign_choices,
    capacity_per_expert,
    check_capacity_factor,
    check_top_k,
    count_tokens,
    make_routing,
    mask_padding,
    within_capacity,
)


class LocMoEPlus(Router):
    """Token choice by cosine affinity, then expert choice among the tokens that came.

    1. ``delta_ti = cos(x_t, omega_i)`` with the fixed rows omega of LocMoE: no parameters.
    2. Token t chooses the ``top_k`` experts of largest affinity (equation 5).
    3. Expert i keeps the C of these tokens whose affinity is largest (equation 6; its operator reads Bottom-C, the text
       around it says what is done here). Earlier tokens win ties.
    4. C is estimated anew from each batch: ``(1 / E) exp(D delta_max^2 / (2 - delta_max^2))`` with delta_max the
       largest affinity of a real token, rounded up. It is computed as a logarithm, and clamped to between 1 and
       ``capacity_factor * T * top_k / E``.

    Step 3 compares a token with later ones and with those of other sequences: in training a language model that uses
    this router sees the future, and must allow it. In evaluation every token gets the experts that it chose, so that
    nothing leaks.

    Where the paper is silent, ours: an expert's tokens are pooled over the whole batch, the weight is the softmax of
    the affinities over the experts, step 3 is left out in evaluation, and C has an upper bound. Without it the estimate
    runs away: for D = 4096 and E = 8 it is 21 tokens at delta_max = 0.05, and 64,000 at 0.08.

    Losses:
        balance: ``E * sum_i f_i P_i`` with the load of step 2 divided by ``top_k``; 1 at balance.
        locality: ``KL(D_c || D_l)``, see :class:`~evomoe.routing.methods.locmoe.LocMoE`.

    Metrics:
        off_node: share of the assignments whose expert lives on another node than the token.
        capacity: places C per expert, whether or not step 3 is done.

    Args:
        d_model: width D of the token states, a multiple of ``num_experts``.
        num_experts: number of experts E.
        top_k: experts that a token chooses; the experiments of the paper use 1.
        num_nodes: number of simulated nodes, at most E.
        smoothing: share of the local distribution that lies on the other nodes' experts, in (0, 1).
        capacity_factor: upper bound of C as a multiple of T * top_k / E; None for T.
        select_in_eval: let the experts choose in evaluation too, which leaks there as in training.
    """

    loss_names = ("balance", "locality")
    causal_in_train = False
    local: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int = 1,
        num_nodes: int = 2,
        smoothing: float = 0.1,
        capacity_factor: float | None = 1.25,
        select_in_eval: bool = False,
    ) -> None:
        super().__init__(d_model, num_experts)
        check_pooling(d_model, num_experts)
        check_top_k(top_k, num_experts)
        check_nodes(num_nodes, num_experts, smoothing)
        check_capacity_factor("router capacity_factor", capacity_factor)
        self.top_k = top_k
        self.num_nodes = num_nodes
        self.capacity_factor = capacity_factor
        self.select_in_eval = select_in_eval
        self.causal_in_eval = not select_in_eval
        self.smoothing = smoothing
        self.register_buffer("local", torch.empty(num_nodes, num_experts), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Write the local distribution; there is nothing to draw."""
        self.local.copy_(local_distribution(self.num_experts, self.num_nodes, self.smoothing))

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        """Route ``inputs.hidden (T, D)``."""
        delta = cosine_affinity(inputs.hidden, self.num_experts)  # (T, E)
        probabilities = F.softmax(delta, dim=1)
        affinity, expert = delta.topk(self.top_k, dim=1)  # (T, K)
        weight = probabilities.gather(1, expert)

        assignments = assign_choices(expert, weight, self.num_experts, inputs.valid)
        wanted = None
        capacity = self._capacity(delta.detach(), inputs)
        if self.training or self.select_in_eval:
            wanted = assignments[2]
            keep = keep_closest(expert, affinity, capacity, inputs.valid)
            assignments = assign_choices(expert, weight, self.num_experts, keep)
        routing = make_routing(inputs, assignments, probabilities, wanted)
        balance = switch_balance(routing.scores, routing.load, routing.num_tokens, self.top_k)
        return replace(
            routing,
            losses={"balance": balance.loss(), "locality": locality_loss(routing.scores, self.local, inputs)},
            balance=balance,
            metrics={"off_node": off_node_share(routing, inputs, self.num_nodes), "capacity": capacity},
        )

    def _capacity(self, delta: Tensor, inputs: RoutingInput) -> Tensor:
        """Places per expert by the largest affinity, within the bounds, a 0-dim tensor."""
        num_tokens = count_tokens(inputs.valid, inputs.hidden)
        precise = torch.float32 if num_tokens.device.type == "mps" else torch.float64  # Apple GPUs have no other
        most = num_tokens.to(precise).clamp(min=1)
        if self.capacity_factor is not None:
            bound = capacity_per_expert(num_tokens, self.num_experts, self.top_k, self.capacity_factor)
            most = torch.minimum(bound, most)
        real = mask_padding(delta, inputs.valid)
        largest = real.max().clamp(min=0).to(precise) if real.numel() else most.new_zeros(())
        wanted = log_capacity_exponential(self.num_experts, self.d_model, largest)
        return torch.minimum(wanted, most.log()).exp().ceil().clamp(min=1).minimum(most)


def keep_closest(expert: Tensor, affinity: Tensor, capacity: Tensor | int, valid: Tensor | None) -> Tensor:
    """Which choices are among the ``capacity`` of largest affinity at their expert, ``(T, K)`` bool.

    Args:
        expert: chosen experts ``(T, K)``.
        affinity: of these choices, ``(T, K)``.
        capacity: places per expert.
        valid: ``(T,)`` bool; padding takes no place and is never kept.
    """
    order = affinity.flatten().argsort(descending=True, stable=True)  # (T * K,)
    sorted_valid = None if valid is None else valid[torch.div(order, expert.shape[1], rounding_mode="floor")]
    served = within_capacity(expert.flatten()[order, None], capacity, sorted_valid)
    keep = torch.empty_like(served)
    keep[order] = served
    return keep.view(expert.shape)
