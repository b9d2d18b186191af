"""Balance without a loss (arXiv 2408.15664; DeepSeek-V3, 2412.19437): a bias of each expert steers the choice."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.routing.contract import Router, RoutingInput, SparseRouting, StepStatistics
from evomoe.routing.gate import LinearGate
from evomoe.routing.losses import sequence_balance
from evomoe.routing.selection import assign_choices, check_renormalize, check_top_k, make_routing

SCORES = ("sigmoid", "softmax")


class LossFreeBias(Router):
    """The ``top_k`` experts of the highest ``score + bias``, weighted by their scores without the bias.

    After each optimizer step the bias of every expert that worked less than the mean rises by ``update_rate``, and that
    of every expert that worked more falls by as much; the load is that of all micro-batches and processes of the step.
    The bias is no parameter: it is saved, and never changes in evaluation. The choice depends on the batches of the
    past alone, so that it is causal.

    With ``num_groups`` a token's experts come from the ``top_groups`` groups whose two best biased scores have the
    highest sum (the node-limited routing of DeepSeek-V3; a group are the experts of one node).

    The metric ``bias_range`` is the largest bias less the smallest.

    Losses:
        sequence_balance: keeps single sequences from imbalance, see :func:`~evomoe.routing.losses.sequence_balance`; 1
            at balance. DeepSeek-V3 adds 1e-4 of it.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        top_k: experts per token K.
        scores: ``sigmoid`` of ``xW``, or ``softmax``, which the paper found to work but to be more sensitive.
        renormalize: divide a token's chosen weights by their sum, as DeepSeek-V3 does.
        scaling_factor: multiplies the weights (DeepSeek-V3: 2.5).
        num_groups: number of groups of consecutive experts; divides E.
        top_groups: groups that a token's experts may come from.
        update_rate: step of the bias (both papers: 0.001; more oscillates, less is slow). 0 leaves it where it is, as
            DeepSeek-V3 does for the last part of its run.
        init: initialisation of the gate, see ``LinearGate``.
    """

    loss_names = ("sequence_balance",)
    adapts = True
    bias: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int = 2,
        scores: str = "sigmoid",
        renormalize: bool = True,
        scaling_factor: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
        update_rate: float = 1e-3,
        init: str = "scaled",
    ) -> None:
        super().__init__(d_model, num_experts)
        check_top_k(top_k, num_experts)
        if scores not in SCORES:
            raise ConfigError(f"router scores={scores!r} is unknown: expected sigmoid or softmax")
        check_renormalize(renormalize, top_k, num_experts)
        if not 0 < scaling_factor < math.inf:
            raise ConfigError(f"router scaling_factor={scaling_factor}: expected a finite value above 0")
        if not 0 <= update_rate < math.inf:
            raise ConfigError(f"router update_rate={update_rate}: expected a finite value of 0 or above")
        if num_groups < 1 or num_experts % num_groups:
            raise ConfigError(
                f"router num_groups={num_groups}: expected a divisor of the number of experts, {num_experts}"
            )
        size = num_experts // num_groups
        if not (1 <= top_groups <= num_groups and top_k <= top_groups * size):
            raise ConfigError(
                f"router top_groups={top_groups} of {num_groups} groups of {size} experts: expected 1 to {num_groups} "
                f"groups that hold at least top_k={top_k} experts"
            )
        self.top_k = top_k
        self.scores = scores
        self.renormalize = renormalize
        self.scaling_factor = scaling_factor
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.update_rate = update_rate
        self.gate = LinearGate(d_model, num_experts, init)
        self.register_buffer("bias", torch.zeros(num_experts))

    def reset_parameters(self) -> None:
        """Draw the gate anew, and begin without bias."""
        super().reset_parameters()
        self.bias.zero_()

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        """Route ``inputs.hidden (T, D)``."""
        logits = self.gate(inputs.hidden)  # (T, E)
        log_scores = F.logsigmoid(logits) if self.scores == "sigmoid" else F.log_softmax(logits, dim=1)
        scores = log_scores.exp()
        expert = self._admit(scores.detach() + self.bias).topk(self.top_k, dim=1).indices  # (T, K)
        # Shares of sigmoids are a softmax of their logarithms, which is defined where all of them underflow.
        chosen = log_scores.gather(1, expert)
        weight = (F.softmax(chosen, dim=1) if self.renormalize else chosen.exp()) * self.scaling_factor
        assignments = assign_choices(expert, weight, self.num_experts, inputs.valid)
        routing = make_routing(inputs, assignments, F.softmax(log_scores, dim=1))
        return replace(
            routing,
            losses={"sequence_balance": sequence_balance(routing.scores, self.top_k, inputs)},
            metrics={"bias_range": self.bias.max() - self.bias.min()},
        )

    def after_optimizer_step(self, statistics: StepStatistics) -> None:
        """Raise the bias of the experts below the mean load, lower that of those above it."""
        load = statistics.load
        self.bias += self.update_rate * (load.sum() - self.num_experts * load).sign()  # in integers: exact

    def _admit(self, biased: Tensor) -> Tensor:
        """``(T, E)`` with minus infinity at the experts of groups that a token must not use."""
        if self.top_groups == self.num_groups:
            return biased
        grouped = biased.unflatten(1, (self.num_groups, -1))  # (T, groups, E / groups)
        group_score = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(dim=2)
        best = group_score.topk(self.top_groups, dim=1).indices
        closed = torch.ones_like(group_score, dtype=torch.bool).scatter(1, best, False)
        return grouped.masked_fill(closed[:, :, None], -torch.inf).flatten(1)
