"""Optimal transport between tokens and experts: entropic (Sinkhorn) and sparsity-constrained plans.

A pool of n real tokens with one unit of mass each is carried to E experts that take n / E each. All pools are solved at
once, and no pool depends on another.

Shapes: G pools, n tokens of a pool, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe.errors import ConfigError

NOTHING = -1e30
"""Stands for minus infinity: its exponential is 0, and its difference to itself no NaN."""

COMBINES = ("softmax", "plan")
ADAM_BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Sinkhorn:
    """Entropic transport: maximises ``<plan, logits> + epsilon * entropy(plan)`` by iterations on logarithms.

    Args:
        epsilon: weight of the entropy.
        iterations: at most.
        tolerance: a pool is done when none of its prices moves by more than ``epsilon`` times this; the relative error
            of an expert's load is then about as large.
    """

    epsilon: float = 1.0
    iterations: int = 20
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive("epsilon", self.epsilon, "1")
        _check_iterations(self.iterations)
        if not self.tolerance >= 0:
            raise ConfigError(f"router tolerance={self.tolerance}: expected 0 (all iterations) or more, such as 0.001")

    def log_plan(self, logits: Tensor, valid: Tensor) -> Tensor:
        """Logarithm of ``softmax((logits + prices) / epsilon)`` over the experts, whose prices even their load out.

        So each token's row sums to 1 exactly, and each expert's column to n / E as far as the iterations got. The
        gradient is that of the softmax: the prices count as constants.

        Args:
            logits: ``(G, n, E)`` fp32.
            valid: ``(G, n)`` bool, False at padding, whose rows of the plan mean nothing.

        Returns:
            ``(G, n, E)``.
        """
        scaled = logits / self.epsilon
        return F.log_softmax(scaled + self._prices(scaled, valid), dim=2)

    @torch.no_grad()
    def _prices(self, scaled: Tensor, valid: Tensor) -> Tensor:
        groups, _, num_experts = scaled.shape
        share = valid.sum(dim=1).clamp(min=1).div(num_experts).log()[:, None, None]  # of each expert, (G, 1, 1)
        mass = torch.where(valid, 0.0, NOTHING)[:, :, None]  # logarithm of each token's, (G, n, 1)
        prices = scaled.new_zeros(groups, 1, num_experts)
        moving = valid.any(dim=1)[:, None, None]
        for _ in range(self.iterations):
            rows = mass - (scaled + prices).logsumexp(dim=2, keepdim=True)  # (G, n, 1)
            fresh = share - (scaled + rows).logsumexp(dim=1, keepdim=True)  # (G, 1, E)
            change = (fresh - prices).abs().amax(dim=2, keepdim=True)
            prices = torch.where(moving, fresh, prices)
            moving = moving & (change > self.tolerance)
            # A GPU would have to be waited for to know it, and the prices that are done stay as they are.
            if prices.device.type == "cpu" and not moving.any():
                break
        return prices


@dataclass(frozen=True)
class SparseTransport:
    """Sparsity-constrained transport (Liu et al., arXiv 2209.15466): each expert takes from at most k tokens.

    Its plan minimises ``-<plan, benefit> + gamma / 2 * |plan|^2`` under the marginals and that constraint. The
    potentials of the tokens climb the semi-dual (equation 8), whose gradient is what each token lacks,
    ``1 - sum_e plan[e]``, from zero by Adam, as in the authors' code.

    Args:
        gamma: weight of the squared norm of the plan.
        iterations: of Adam.
        learning_rate: of Adam.
    """

    gamma: float = 1.0
    iterations: int = 20
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        _check_positive("gamma", self.gamma, "1")
        _check_iterations(self.iterations)
        _check_positive("learning_rate", self.learning_rate, "0.01")

    def plan(self, benefit: Tensor, potential: Tensor, valid: Tensor, places: Tensor) -> Tensor:
        """The plan that belongs to the tokens' potentials, ``(G, E, n)``, differentiable in both.

        Each expert's mass is n / E exactly, for any potential. Each token's is 1 only at the optimum, and where that
        has no tie at the k-th place: the constraint makes the problem non-convex.

        Args:
            benefit: of giving a token to an expert, ``(G, E, n)``.
            potential: of the tokens, ``(G, n)``.
            valid: ``(G, n)`` bool, False at padding, which receives nothing.
            places: k of each pool, ``(G, 1)`` int64.
        """
        return self._plan(benefit, potential, valid, places, _largest(places))

    def _plan(self, benefit: Tensor, potential: Tensor, valid: Tensor, places: Tensor, most: int) -> Tensor:
        if valid.numel() == 0:
            return torch.zeros_like(benefit)
        mass = valid.sum(dim=1).clamp(min=1)[:, None, None] / benefit.shape[1]  # of an expert, (G, 1, 1)
        scores = (benefit + potential[:, None]) / (self.gamma * mass)
        scores = scores.masked_fill(~valid[:, None], NOTHING)
        return mass * project_sparse_simplex(scores, places[:, :, None], most)

    @torch.no_grad()
    def potentials(self, benefit: Tensor, valid: Tensor, places: Tensor) -> Tensor:
        """The potentials of the tokens, ``(G, n)``; for the arguments see :meth:`plan`."""
        potential = benefit.new_zeros(valid.shape)
        first, second = torch.zeros_like(potential), torch.zeros_like(potential)
        beta, beta_squared = ADAM_BETAS
        most = _largest(places)
        for step in range(1, self.iterations + 1):
            lack = (1 - self._plan(benefit, potential, valid, places, most).sum(dim=1)) * valid  # (G, n)
            first = torch.lerp(lack, first, beta)
            second = torch.lerp(lack.square(), second, beta_squared)
            deviation = (second / (1 - beta_squared**step)).sqrt() + ADAM_EPSILON
            potential = potential + self.learning_rate / (1 - beta**step) * first / deviation
        return potential


def project_sparse_simplex(values: Tensor, places: Tensor, most: int | None = None) -> Tensor:
    """The nearest point of the simplex with at most k entries above 0, in the last dimension.

    It keeps the k largest entries and projects them on their simplex (arXiv 2209.15466, section 3).

    Args:
        values: ``(..., n)``.
        places: k, an int64 tensor that broadcasts to ``(..., 1)``; for 0, where there is no such point, all is finite.
        most: the largest k, at least 1, for callers that know it; None reads it, and waits for a GPU.

    Returns:
        ``(..., n)``, differentiable: on the entries above 0, the identity minus their mean.
    """
    most = _largest(places) if most is None else most
    best, index = values.topk(most, dim=-1)  # falling
    rank = torch.arange(1, most + 1, device=values.device)
    best = best.masked_fill(rank > places, NOTHING)
    threshold = (best.cumsum(dim=-1) - 1) / rank  # that of the entries up to each rank
    support = (best > threshold).sum(dim=-1, keepdim=True).clamp(min=1)
    kept = (best - threshold.gather(-1, support - 1)).clamp(min=0)
    return torch.zeros_like(values).scatter(-1, index, kept)


def _largest(places: Tensor) -> int:
    return max(int(places.max()), 1) if places.numel() else 1


def check_combine(combine: str) -> None:
    """Refuse combine weights that do not exist."""
    if combine not in COMBINES:
        raise ConfigError(f"router combine={combine!r} is unknown: expected softmax or plan")


def _check_positive(name: str, value: float, published: str) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"router {name}={value}: expected a finite value above 0, the published one is {published}")


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ConfigError(f"router iterations={iterations}: expected 1 or more, the published number is 20")
