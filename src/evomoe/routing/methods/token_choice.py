"""The token choice of vision: by noisy softmax (V-MoE) and by an entropic transport plan.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from evomoe.routing.contract import RoutingInput, SparseRouting
from evomoe.routing.gate import add_noise, check_noise
from evomoe.routing.losses import chance_of_choice, squared_variation
from evomoe.routing.methods.topk import TopK
from evomoe.routing.pools import Pooled, check_pool, from_pools, real_tokens, to_pools
from evomoe.routing.selection import assign_within_capacity, check_rounding, make_routing, mask_padding
from evomoe.routing.transport import Sinkhorn, check_combine


class SoftmaxTokenChoice(TopK):
    """V-MoE's router (arXiv 2106.05974; 2401.15969): the K best experts of ``softmax(xW + noise)``, not renormalised.

    Losses:
        importance: squared variation over the experts of their sum of probabilities, without noise; 0 at balance.
        load: the same of the probability that a token chooses them, were the noise drawn anew against the K-th best
            noisy logit; 0 at balance. Evaluation takes the K-th best logit without noise. A router without noise has
            the variation of its load, which teaches nothing.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        top_k: experts per token K.
        capacity_factor: places per expert in training, as a multiple of n * K / E; None drops nothing.
        eval_capacity_factor: the same in evaluation.
        capacity_multiple: places are rounded up to a multiple of it.
        priority: who is served first under a capacity: ``"choice"`` (all first choices, as published), ``"best"``
            (Batch Priority Routing), or ``"token"`` (causal), see ``TopK``.
        pool: whose n tokens share the places: ``batch`` (as published), ``sequence`` or ``position``.
        noise: in training, deviation of the Gaussian noise on the logits, times E.
        init: initialisation of the gate, see ``LinearGate``.
    """

    loss_names: tuple[str, ...] = ("importance", "load")

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int = 1,
        capacity_factor: float | None = 1.05,
        eval_capacity_factor: float | None = 1.05,
        capacity_multiple: int = 1,
        priority: str = "choice",
        pool: str = "batch",
        noise: float = 1.0,
        init: str = "scaled",
    ) -> None:
        super().__init__(
            d_model,
            num_experts,
            top_k=top_k,
            renormalize=False,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            priority=priority,
            init=init,
        )
        check_rounding("ceil", capacity_multiple)
        check_pool(pool)
        check_noise(noise)
        self.capacity_multiple = capacity_multiple
        self.pool = pool
        self.noise = noise
        if pool == "position":
            self.causal_in_train = self.causal_in_eval = True

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        """Route ``inputs.hidden (T, D)``."""
        logits = self.gate(inputs.hidden)  # (T, E)
        noisy = add_noise(logits, self.noise / self.num_experts) if self.training else logits
        pooled = Pooled(
            to_pools(noisy, inputs, self.pool),
            to_pools(F.softmax(noisy, dim=1), inputs, self.pool),
            real_tokens(inputs, self.pool),
        )
        ranking, weights = (from_pools(values, self.pool) for values in self._rank_and_weigh(pooled))
        expert = ranking.topk(self.top_k, dim=1).indices  # (T, K)
        weight = weights.gather(1, expert)
        assignments, wanted = assign_within_capacity(
            inputs,
            expert,
            weight,
            self.num_experts,
            self.capacity_factor if self.training else self.eval_capacity_factor,
            self.priority,
            self.pool,
            self.capacity_multiple,
            confidence=weight[:, 0],
        )
        routing = make_routing(inputs, assignments, F.softmax(logits, dim=1), wanted)
        return (
            replace(routing, losses=self._losses(routing, logits, noisy, inputs.valid)) if self.loss_names else routing
        )

    def _rank_and_weigh(self, pooled: Pooled) -> tuple[Tensor, Tensor]:
        """What a token orders the experts by, and the combine weights, ``(G, n, E)`` each."""
        return pooled.logits, pooled.probabilities  # probabilities may underflow to ties

    def _losses(self, routing: SparseRouting, logits: Tensor, noisy: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        if self.noise > 0:
            threshold = noisy.topk(self.top_k, dim=1).values[:, -1:]
            chance = chance_of_choice(logits, threshold, self.noise / self.num_experts)
            load = mask_padding(chance, valid).sum(dim=0)
        else:
            load = routing.load.float()
        return {"importance": squared_variation(routing.scores.sum(dim=0)), "load": squared_variation(load)}


class SinkhornTokenChoice(SoftmaxTokenChoice):
    """Token choice by an entropic transport plan (arXiv 2401.15969): the K best experts of each row of the plan.

    The plan evens the load out, so there is no loss; as the best entry of each row need not, a capacity is left. A
    token's experts depend on all tokens of the pool, in evaluation too.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        epsilon: weight of the plan's entropy.
        iterations: of Sinkhorn at most.
        tolerance: at which a pool is done earlier, see :class:`~evomoe.routing.transport.Sinkhorn`; 0 for never.
        combine: the weights: ``softmax`` of the logits, as in the released code, or the ``plan``.
        top_k: experts per token K.
        capacity_factor: places per expert in training, as a multiple of n * K / E; None drops nothing.
        eval_capacity_factor: the same in evaluation.
        capacity_multiple: places are rounded up to a multiple of it.
        priority: who is served first under a capacity, see ``SoftmaxTokenChoice``.
        pool: whose n tokens share plan and places: ``batch``, ``sequence`` or ``position`` (causal).
        noise: in training, deviation of the Gaussian noise on the logits, times E.
        init: initialisation of the gate, see ``LinearGate``.
    """

    loss_names = ()

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        epsilon: float = 1.0,
        iterations: int = 20,
        tolerance: float = 1e-3,
        combine: str = "softmax",
        top_k: int = 1,
        capacity_factor: float | None = 1.05,
        eval_capacity_factor: float | None = 1.05,
        capacity_multiple: int = 1,
        priority: str = "choice",
        pool: str = "batch",
        noise: float = 1.0,
        init: str = "scaled",
    ) -> None:
        super().__init__(
            d_model,
            num_experts,
            top_k=top_k,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            capacity_multiple=capacity_multiple,
            priority=priority,
            pool=pool,
            noise=noise,
            init=init,
        )
        check_combine(combine)
        self.sinkhorn = Sinkhorn(epsilon, iterations, tolerance)
        self.combine = combine
        self.causal_in_train = self.causal_in_eval = pool == "position"

    def _rank_and_weigh(self, pooled: Pooled) -> tuple[Tensor, Tensor]:
        log_plan = self.sinkhorn.log_plan(pooled.logits, pooled.valid)
        return log_plan, log_plan.exp() if self.combine == "plan" else pooled.probabilities
