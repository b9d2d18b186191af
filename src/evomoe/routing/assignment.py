"""Exactly balanced assignment: every expert gets equally many tokens, and the sum of their scores is the largest.

A transportation problem: T tokens to E experts of ``floor(T / E)`` or ``ceil(T / E)`` places. It is solved exactly, in
two steps that suit T >> E:

1. Prices that nearly balance the load, by annealed Sinkhorn iterations over the whole score matrix. Every token then
   takes the expert of the highest score minus price. Such a choice is optimal for the load that it happens to have.
2. Successive shortest paths over the experts: while an expert has too many tokens, the cheapest chain of moves that
   ends at one with too few is carried out, for all tokens at once that lose the same by it. Every step keeps the choice
   optimal for its load, and so the last one is optimal for the balanced load (Ahuja, Magnanti and Orlin, *Network
   Flows*, section 9.7).

The published solver, an auction (Bertsekas), is within a tolerance of the optimum and needs E to divide T.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

LEVELS = 8
SWEEPS = 4


@torch.no_grad()
def balanced_assignment(scores: Tensor) -> Tensor:
    """Assign each token to one expert, with equal load and the largest sum of scores.

    Args:
        scores: ``(T, E)``; NaN and infinite scores count as the smallest or largest finite ones.

    Returns:
        The expert of each token, ``(T,)`` int64, on the device of ``scores``. Every expert has ``floor(T / E)`` or
        ``ceil(T / E)`` tokens.
    """
    tokens, num_experts = scores.shape
    if tokens == 0 or num_experts == 1:
        return torch.zeros(tokens, dtype=torch.int64, device=scores.device)
    finite = scores.isfinite()
    if not bool(finite.all()):
        known = scores[finite] if bool(finite.any()) else scores.new_zeros(1)
        scores = scores.nan_to_num(nan=float(known.min()), posinf=float(known.max()), neginf=float(known.min()))
    prices = _balancing_prices(scores.float())
    # In the precision of the repair, in which a choice that rounding made worse than another would be a gain for ever.
    precise = scores.cpu().double()
    greedy = (precise - prices.cpu().double()).argmax(dim=1)
    exact = _Repair(precise.numpy(), greedy.numpy()).run()
    return torch.from_numpy(exact).to(scores.device)


def _balancing_prices(scores: Tensor) -> Tensor:
    """Prices ``(E,)`` at which about equally many tokens prefer each expert."""
    tokens, num_experts = scores.shape
    prices = torch.zeros(num_experts, device=scores.device)
    spread = float(scores.std(dim=1).mean())
    if not spread > 0:
        return prices
    for level in range(LEVELS):
        temperature = spread * 0.5**level
        for _ in range(SWEEPS):
            demand = torch.softmax((scores - prices) / temperature, dim=1).sum(dim=0)
            prices += temperature * (demand * (num_experts / tokens)).clamp(min=1e-6).log()
    return prices


class _Repair:
    """Moves tokens between experts until the load is balanced.

    The graph has a node for each expert and one more, the reserve. An expert owes ``floor(T / E)`` tokens to itself and
    may pass one more on to the reserve, which takes ``T mod E`` of them: so the solver chooses which experts get the
    larger load.

    Args:
        scores: ``(T, E)`` fp64.
        expert: a choice that is optimal for its load, ``(T,)``.
    """

    def __init__(self, scores: np.ndarray, expert: np.ndarray) -> None:
        tokens, self.num_experts = scores.shape
        self.scores = scores
        self.expert = expert.copy()
        self.reserve = self.num_experts
        self.tolerance = 1e-12 * (1 + np.abs(scores).max())  # the last bits of a sum of scores
        nodes = self.num_experts + 1
        self.cost = np.full((nodes, nodes), np.inf)  # what the cheapest move from one node to another loses
        self.mover = np.zeros((nodes, nodes), dtype=np.int64)  # the token of that move
        floor, larger = divmod(tokens, self.num_experts)
        self.excess = np.bincount(expert, minlength=nodes) - floor
        self.excess[self.reserve] = -larger
        if larger:
            self.cost[: self.num_experts, self.reserve] = 0
        for node in range(self.num_experts):
            self._price_moves(node)

    def run(self) -> np.ndarray:
        """The balanced choice, ``(T,)``."""
        while (self.excess > 0).any():
            path = self._cheapest_path()
            units = 1
            if self.reserve in path:
                for start, end in itertools.pairwise(path):
                    self._move(start, end)
            else:
                units = self._move_alike(path)
            self.excess[path[0]] -= units
            self.excess[path[-1]] += units
            for node in path:
                if node != self.reserve:
                    self._price_moves(node)
        return self.expert

    def _cheapest_path(self) -> list[int]:
        """From any node with too many tokens to any with too few, by Bellman and Ford."""
        distance = np.where(self.excess > 0, 0.0, np.inf)
        before = np.full(distance.size, -1)
        for _ in range(distance.size):  # a path has no more moves
            through = distance[:, None] + self.cost  # (E + 1, E + 1)
            best = through.argmin(axis=0)
            shorter = through[best, np.arange(distance.size)]
            improved = shorter < distance - self.tolerance
            if not improved.any():
                break
            distance = np.where(improved, shorter, distance)
            before = np.where(improved, best, before)
        node = int(np.where(self.excess < 0, distance, np.inf).argmin())
        path = [node]
        while before[node] >= 0:
            node = int(before[node])
            path.append(node)
        return path[::-1]

    def _move(self, start: int, end: int) -> None:
        if self.reserve in (start, end):
            # One unit to the reserve, or back from it: the way exists in one direction at a time.
            self.cost[start, end], self.cost[end, start] = np.inf, 0
        else:
            self.expert[self.mover[start, end]] = end

    def _move_alike(self, path: list[int]) -> int:
        """Move tokens along a path of experts, as many at once as lose the same; returns how many."""
        units = int(min(self.excess[path[0]], -self.excess[path[-1]]))
        movers = []
        for start, end in itertools.pairwise(path):
            own = np.flatnonzero(self.expert == start)
            loss = self.scores[own, start] - self.scores[own, end]
            movers.append(own[loss == self.cost[start, end]])
            units = min(units, movers[-1].size)
        for tokens, end in zip(movers, path[1:], strict=True):
            self.expert[tokens[:units]] = end
        return units

    def _price_moves(self, node: int) -> None:
        own = np.flatnonzero(self.expert == node)
        if own.size == 0:
            self.cost[node, : self.num_experts] = np.inf
            return
        loss = self.scores[own, node][:, None] - self.scores[own]  # (tokens of the node, E)
        cheapest = loss.argmin(axis=0)
        self.mover[node, : self.num_experts] = own[cheapest]
        self.cost[node, : self.num_experts] = loss[cheapest, np.arange(self.num_experts)]
        self.cost[node, node] = np.inf
