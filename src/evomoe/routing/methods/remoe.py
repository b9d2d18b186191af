"""ReMoE (arXiv 2412.14711): ReLU gates, whose sparsity an adaptive penalty steers."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.routing.contract import Router, RoutingInput, SparseRouting, StepStatistics
from evomoe.routing.gate import LinearGate
from evomoe.routing.losses import switch_balance
from evomoe.routing.selection import assign_mask, check_top_k, make_routing, mask_padding

LAMBDA_BOUNDS = (1e-10, 1e4)
"""Ours, so that no run of one-sided steps takes lambda out of fp32, or so far that it takes hundreds to come back."""


class ReMoE(Router):
    """Expert i works for a token iff ``R_i = relu(xW)_i`` is above 0, with the weight R_i: continuous, without top-k.

    A token gets 0 to E experts. At first about half of them, as the gate's logits are as often positive as negative:
    the first steps cost E / 2 experts a token. The penalty on R then grows until ``top_k`` experts a token are left on
    average: after each optimizer step its factor lambda is multiplied by ``growth`` if more experts than ``top_k``
    worked for a token, over all layers, micro-batches and processes, and divided by it otherwise. As the gate has no
    bias, fewer than half of the experts can work only where the states have a direction in common, which the norm
    before the layer gives them.

    Losses:
        sparsity: ``lambda * sum_i f_i * mean_t R_ti`` with f_i = E / K times the share of tokens that expert i works
            for, so that overloaded experts are penalised more; lambda is part of it, so its coefficient is 1. The paper
            takes the mean over the layers where a task adds them up, a constant that lambda absorbs. At balance, with m
            experts a token, ``lambda * m / K`` times the mean sum of a token's R.

    Its metrics are ``lambda`` and ``sparsity``, the share of token-expert pairs that do not work.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        top_k: experts per token K that lambda aims at.
        initial_lambda: the first lambda (the paper: 1e-8).
        growth: factor of lambda per optimizer step (the paper: 1.2).
        init: initialisation of the gate, see ``LinearGate``. ``zeros`` is refused: no expert would ever work.
    """

    loss_names = ("sparsity",)
    adapts = True
    l1_factor: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int = 1,
        initial_lambda: float = 1e-8,
        growth: float = 1.2,
        init: str = "scaled",
    ) -> None:
        super().__init__(d_model, num_experts)
        check_top_k(top_k, num_experts)
        least, most = LAMBDA_BOUNDS
        if not least <= initial_lambda <= most:
            raise ConfigError(f"router initial_lambda={initial_lambda}: expected a value in [{least}, {most}]")
        if not 1 < growth < math.inf:
            raise ConfigError(f"router growth={growth}: expected a finite factor above 1, the published one is 1.2")
        if init == "zeros":
            raise ConfigError("router init='zeros' leaves ReLU gates without gradient: expected scaled or small")
        self.top_k = top_k
        self.initial_lambda = initial_lambda
        self.growth = growth
        self.gate = LinearGate(d_model, num_experts, init)
        self.register_buffer("l1_factor", torch.tensor(initial_lambda))

    def reset_parameters(self) -> None:
        """Draw the gate anew, and begin with the first lambda."""
        super().reset_parameters()
        self.l1_factor.fill_(self.initial_lambda)

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        """Route ``inputs.hidden (T, D)``."""
        weights = mask_padding(F.relu(self.gate(inputs.hidden)), inputs.valid)  # (T, E)
        shares = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        routing = make_routing(inputs, assign_mask(weights > 0, weights), shares)
        penalty = switch_balance(weights, routing.load, routing.num_tokens, self.top_k).loss()
        l1_factor = self.l1_factor.clone()  # a step may change it before it is logged
        return replace(
            routing,
            losses={"sparsity": l1_factor * penalty},
            metrics={"lambda": l1_factor, "sparsity": 1 - routing.active_experts / self.num_experts},
        )

    def after_optimizer_step(self, statistics: StepStatistics) -> None:
        """Penalise more if more than K experts worked for a token, else less."""
        too_dense = statistics.active_experts > self.top_k
        self.l1_factor *= torch.where(too_dense, self.growth, 1 / self.growth)
        self.l1_factor.clamp_(*LAMBDA_BOUNDS)
