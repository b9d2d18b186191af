"""Expert Choice routing (arXiv 2202.09368): the experts choose their tokens, by probability or by a transport plan.

Shapes: T tokens, D model width, E experts, C capacity, G pools of n tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.routing.contract import Router, RoutingInput, SparseRouting
from evomoe.routing.gate import LinearGate, add_noise, check_noise
from evomoe.routing.pools import Pooled, check_pool, from_pools, real_tokens, to_pools
from evomoe.routing.selection import assign_mask, capacity_per_expert, check_rounding, make_routing
from evomoe.routing.transport import Sinkhorn, SparseTransport, check_combine


class ExpertChoice(Router):
    """Each expert works for the C tokens of a pool that score highest in its column of ``softmax(xW)``.

    ``C = ceil(n * capacity_factor / E)`` for a pool of n real tokens, at least 1 and at most n. So the load is balanced
    without any loss, and a token may get no expert, several, or all. A tie goes to the earlier token.

    What the pool is decides who sees whom:

    - ``batch``: all tokens of the batch, as published for language. A token's experts depend on later tokens.
    - ``sequence``: the tokens of one sequence or image, as published for vision. They depend on later tokens, but not
      on other sequences.
    - ``position``: the tokens that stand at the same position of all sequences, our choice for language models. They
      depend on no later token, but on the other sequences: few sequences a batch make small pools, down to a single
      one, whose token every expert takes.

    The defaults are those for language; :class:`SoftmaxExpertChoice` has those for vision.

    It has no loss. The metric ``uncovered`` is the share of real tokens without any expert.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        capacity_factor: mean number of experts per token (the paper: 2).
        capacity_rounding: of C, ``ceil`` or ``round``.
        capacity_multiple: C is then rounded up to a multiple of it.
        pool: ``batch``, ``sequence`` or ``position``.
        noise: in training, deviation of the Gaussian noise on the logits, times E.
        init: initialisation of the gate, see ``LinearGate``.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        capacity_factor: float = 2.0,
        capacity_rounding: str = "ceil",
        capacity_multiple: int = 1,
        pool: str = "batch",
        noise: float = 0.0,
        init: str = "scaled",
    ) -> None:
        super().__init__(d_model, num_experts)
        if not 0 < capacity_factor < math.inf:
            raise ConfigError(
                f"router capacity_factor={capacity_factor}: expected a finite factor above 0, the mean number of "
                "experts per token; the published one is 2"
            )
        check_rounding(capacity_rounding, capacity_multiple)
        check_pool(pool)
        check_noise(noise)
        self.capacity_factor = capacity_factor
        self.capacity_rounding = capacity_rounding
        self.capacity_multiple = capacity_multiple
        self.pool = pool
        self.noise = noise
        self.causal_in_train = self.causal_in_eval = pool == "position"
        self.gate = LinearGate(d_model, num_experts, init)

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        """Route ``inputs.hidden (T, D)``."""
        logits = self.gate(inputs.hidden)  # (T, E)
        if self.training:
            logits = add_noise(logits, self.noise / self.num_experts)
        probabilities = F.softmax(logits, dim=1)
        pooled = Pooled(
            to_pools(logits, inputs, self.pool),
            to_pools(probabilities, inputs, self.pool),
            real_tokens(inputs, self.pool),
        )
        ranking, weights = self._rank_and_weigh(pooled)
        chosen = from_pools(choose_best(ranking, pooled.valid, self._places(pooled.valid)), self.pool)
        routing = make_routing(inputs, assign_mask(chosen, from_pools(weights, self.pool)), probabilities)
        uncovered = routing.num_tokens - chosen.any(dim=1).sum()
        return replace(routing, metrics={"uncovered": uncovered / routing.num_tokens.clamp(min=1)})

    def _rank_and_weigh(self, pooled: Pooled) -> tuple[Tensor, Tensor]:
        """What the experts order the tokens by, and the combine weights, ``(G, n, E)`` each."""
        return F.log_softmax(pooled.logits, dim=2), pooled.probabilities  # which may underflow, or saturate, to ties

    def _places(self, valid: Tensor) -> Tensor:
        """C of each pool, ``(G, 1)`` int64."""
        real = valid.sum(dim=1, keepdim=True)
        rounding, multiple = self.capacity_rounding, self.capacity_multiple
        places = capacity_per_expert(real, self.num_experts, 1, self.capacity_factor, rounding, multiple)
        return places.long().minimum(real)


def choose_best(ranking: Tensor, valid: Tensor, places: Tensor) -> Tensor:
    """The tokens of highest rank for each expert, ``(G, n, E)`` bool; a tie goes to the earlier token.

    Args:
        ranking: ``(G, n, E)``.
        valid: ``(G, n)`` bool; padding is never chosen.
        places: how many, at most the real tokens of the pool, ``(G, 1)`` int64.
    """
    ranking = ranking.detach().masked_fill(~valid[:, :, None], -math.inf)
    if ranking.numel() == 0:
        return ranking > 0
    best = ranking.topk(max(int(places.max()), 1), dim=1).values  # (G, most, E)
    last = (places - 1).clamp(min=0)[:, :, None].expand(-1, 1, ranking.shape[2])
    bar = best.gather(1, last)  # what the last one chosen has, (G, 1, E)
    above, level = ranking > bar, ranking == bar
    left = places[:, :, None] - above.sum(dim=1, keepdim=True)
    return above | (level & (level.cumsum(dim=1) <= left))


class SoftmaxExpertChoice(ExpertChoice):
    """The expert choice by softmax of *Routers in Vision MoE* (arXiv 2401.15969), image by image and with noise.

    Its defaults are those of the two routers below, so that the three can be compared as they stand.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        capacity_factor: mean number of experts per token.
        capacity_rounding: of C, ``ceil`` or ``round``.
        capacity_multiple: C is then rounded up to a multiple of it.
        pool: ``batch``, ``sequence`` or ``position``.
        noise: in training, deviation of the Gaussian noise on the logits, times E.
        init: initialisation of the gate, see ``LinearGate``.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        capacity_factor: float = 1.0,
        capacity_rounding: str = "round",
        capacity_multiple: int = 1,
        pool: str = "sequence",
        noise: float = 1.0,
        init: str = "scaled",
    ) -> None:
        super().__init__(
            d_model,
            num_experts,
            capacity_factor=capacity_factor,
            capacity_rounding=capacity_rounding,
            capacity_multiple=capacity_multiple,
            pool=pool,
            noise=noise,
            init=init,
        )


class SinkhornExpertChoice(ExpertChoice):
    """Expert Choice by an entropic transport plan (arXiv 2401.15969): the best tokens of each column of the plan.

    The plan evens out how much of each token is asked for before the experts choose, so fewer tokens stay without an
    expert.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        epsilon: weight of the plan's entropy.
        iterations: of Sinkhorn at most.
        tolerance: at which a pool is done earlier, see :class:`~evomoe.routing.transport.Sinkhorn`; 0 for never.
        combine: the weights: ``softmax`` of the logits, as in the released code, or the ``plan``.
        capacity_factor: mean number of experts per token.
        capacity_rounding: of C, ``ceil`` or ``round``.
        capacity_multiple: C is then rounded up to a multiple of it.
        pool: ``batch``, ``sequence`` or ``position``.
        noise: in training, deviation of the Gaussian noise on the logits, times E.
        init: initialisation of the gate, see ``LinearGate``.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        epsilon: float = 1.0,
        iterations: int = 20,
        tolerance: float = 1e-3,
        combine: str = "softmax",
        capacity_factor: float = 1.0,
        capacity_rounding: str = "round",
        capacity_multiple: int = 1,
        pool: str = "sequence",
        noise: float = 1.0,
        init: str = "scaled",
    ) -> None:
        super().__init__(
            d_model,
            num_experts,
            capacity_factor=capacity_factor,
            capacity_rounding=capacity_rounding,
            capacity_multiple=capacity_multiple,
            pool=pool,
            noise=noise,
            init=init,
        )
        check_combine(combine)
        self.sinkhorn = Sinkhorn(epsilon, iterations, tolerance)
        self.combine = combine

    def _rank_and_weigh(self, pooled: Pooled) -> tuple[Tensor, Tensor]:
        log_plan = self.sinkhorn.log_plan(pooled.logits, pooled.valid)
        return log_plan, log_plan.exp() if self.combine == "plan" else pooled.probabilities


class SparsityConstrainedExpertChoice(ExpertChoice):
    """Expert Choice by a transport plan with at most C tokens an expert (arXiv 2209.15466; 2401.15969).

    The benefit of a pair is its softmax probability. The experts choose by the sum of benefit and potential of the
    token: these are the tokens of the plan, and where it has fewer than C, the next in line rather than, as in the
    released code, the first in the batch. There is no noise.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        gamma: weight of the plan's squared norm.
        iterations: of Adam on the semi-dual.
        learning_rate: of Adam.
        combine: the weights: ``softmax`` of the logits, as in the released code, or the ``plan``, whose entries reach
            n / E. Its gradient takes the potentials as constants.
        capacity_factor: mean number of experts per token.
        capacity_rounding: of C, ``ceil`` or ``round``.
        capacity_multiple: C is then rounded up to a multiple of it.
        pool: ``batch``, ``sequence`` or ``position``.
        init: initialisation of the gate, see ``LinearGate``.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        gamma: float = 1.0,
        iterations: int = 20,
        learning_rate: float = 0.01,
        combine: str = "softmax",
        capacity_factor: float = 1.0,
        capacity_rounding: str = "round",
        capacity_multiple: int = 1,
        pool: str = "sequence",
        init: str = "scaled",
    ) -> None:
        super().__init__(
            d_model,
            num_experts,
            capacity_factor=capacity_factor,
            capacity_rounding=capacity_rounding,
            capacity_multiple=capacity_multiple,
            pool=pool,
            init=init,
        )
        check_combine(combine)
        self.transport = SparseTransport(gamma, iterations, learning_rate)
        self.combine = combine

    def _rank_and_weigh(self, pooled: Pooled) -> tuple[Tensor, Tensor]:
        benefit = pooled.probabilities.transpose(1, 2).contiguous()  # (G, E, n)
        places = self._places(pooled.valid)
        potential = self.transport.potentials(benefit, pooled.valid, places)  # (G, n)
        ranking = pooled.probabilities + potential[:, :, None]
        if self.combine == "softmax":
            return ranking, pooled.probabilities
        return ranking, self.transport.plan(benefit, potential, pooled.valid, places).transpose(1, 2)
