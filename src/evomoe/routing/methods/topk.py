"""Top-k token choice: the Switch, GShard, ST-MoE and Mixtral family in one router."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from evomoe.errors import ConfigError
from evomoe.routing.contract import Router, RoutingInput, SparseRouting
from evomoe.routing.gate import Gate, LinearGate
from evomoe.routing.losses import switch_balance, z_loss
from evomoe.routing.selection import (
    assign_within_capacity,
    check_capacity_factor,
    check_priority,
    check_renormalize,
    check_top_k,
    make_routing,
)


class TopK(Router):
    """The ``top_k`` best experts of ``softmax(xW)``.

    Mixtral: ``renormalize=True``, dropless. GShard (arXiv 2006.16668) has 2 T / E places, ``top_k=2, capacity_factor=1,
    priority="choice"``; its loss counts only first choices, where ours counts all, as Mixtral and DeepSeek do, and it
    drops second choices of small weight at random, which ours does not. ST-MoE (arXiv 2202.08906) writes its factors
    of 1.25 in training and 2 in evaluation without K: ``capacity_factor=0.625, eval_capacity_factor=1``, and the
    z-loss.

    Losses:
        balance: ``E * sum_i f_i P_i`` with the load f divided by ``top_k``; 1 at balance.
        z: mean squared log-partition of the logits; ``log(E)^2`` for logits of zero.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        top_k: experts per token K.
        renormalize: divide a token's chosen weights by their sum, before any capacity bound.
        capacity_factor: places per expert in training, as a multiple of T * K / E; None drops nothing.
        eval_capacity_factor: the same in evaluation.
        priority: who is served first under a capacity: ``"token"`` (earlier tokens, causal), ``"choice"`` (all first
            choices) or ``"best"`` (all first choices, those of high probability before others). A causal model refuses
            ``"best"``, and ``"choice"`` where ``top_k`` is above 1: a later token could evict an earlier one. With one
            choice a token ``"choice"`` is the order of ``"token"``.
        jitter: in training the gate sees the token state times U[1 - jitter, 1 + jitter].
        init: initialisation of the linear gate, see ``LinearGate``.
        gate: another gate in its place.
    """

    loss_names: tuple[str, ...] = ("balance", "z")

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int = 2,
        renormalize: bool = True,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        priority: str = "token",
        jitter: float = 0.0,
        init: str = "scaled",
        gate: Gate | None = None,
    ) -> None:
        super().__init__(d_model, num_experts)
        check_top_k(top_k, num_experts)
        check_capacity_factor("router capacity_factor", capacity_factor)
        check_capacity_factor("router eval_capacity_factor", eval_capacity_factor)
        check_priority(priority)
        check_renormalize(renormalize, top_k, num_experts)
        self.top_k = top_k
        self.renormalize = renormalize
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.priority = priority
        if not 0 <= jitter < 1:
            raise ConfigError(f"router jitter={jitter}: expected a value in [0, 1), the published one is 0.01")
        self.jitter = jitter
        in_order = priority == "token" or (priority == "choice" and top_k == 1)
        self.causal_in_train = capacity_factor is None or in_order
        self.causal_in_eval = eval_capacity_factor is None or in_order
        self.gate = LinearGate(d_model, num_experts, init) if gate is None else gate

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        """Route ``inputs.hidden (T, D)``."""
        hidden = inputs.hidden
        if self.training and self.jitter > 0:
            hidden = hidden.float()
            hidden = hidden * torch.empty_like(hidden).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = self.gate(hidden)  # (T, E)
        probabilities = F.softmax(logits, dim=1)
        expert = logits.topk(self.top_k, dim=1).indices  # (T, K); probabilities may underflow to ties
        chosen = weight = probabilities.gather(1, expert)
        if self.renormalize:
            weight = weight / weight.sum(dim=1, keepdim=True)

        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        assignments, wanted = assign_within_capacity(
            inputs, expert, weight, self.num_experts, factor, self.priority, confidence=chosen[:, 0]
        )
        routing = make_routing(inputs, assignments, probabilities, wanted)
        balance = switch_balance(routing.scores, routing.load, routing.num_tokens, self.top_k)
        return replace(
            routing,
            losses={"balance": balance.loss(), "z": z_loss(logits, inputs.valid, routing.num_tokens)},
            balance=balance,
        )
