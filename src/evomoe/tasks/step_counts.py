"""What the routers did in one optimizer step, over all its micro-batches and processes.

Shapes: E experts, E' experts and those without computation.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, distributed

from evomoe.routing import Balance, SparseRouting, StepStatistics
from evomoe.routing.processes import world_size


class StepCounts:
    """Counts of each MoE layer, summed; filled from the routings that forward passes return, never within them.

    So nothing is counted twice where activations are recomputed in the backward pass.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # by layer: rows, tokens, load (E), load of the balance loss (E')
        self._experts: dict[str, int] = {}

    def add(self, layer: str, routing: SparseRouting) -> None:
        """Count one micro-batch of one layer; every process must call it, as the counts are summed over processes."""
        balance_load = routing.load if routing.balance is None else routing.balance.load
        rows = routing.tokens_per_expert.sum()
        counts = torch.cat([rows[None], routing.num_tokens[None], routing.load, balance_load])  # (2 + E + E')
        if world_size() > 1:
            distributed.all_reduce(counts)
        self._sums[layer] = self._sums[layer] + counts if layer in self._sums else counts
        self._experts[layer] = routing.load.numel()

    def spread(self, layer: str, balance: Balance) -> Balance:
        """The prices of ``balance`` for the load of all that was counted."""
        counts = self._sums[layer]
        return replace(balance, load=counts[2 + self._experts[layer] :], tokens=counts[1])

    def statistics(self) -> dict[str, StepStatistics]:
        """What each layer's router is told after the optimizer step."""
        if not self._sums:
            return {}
        rows, tokens = torch.stack([counts[:2] for counts in self._sums.values()]).sum(dim=0)
        active = rows / tokens.clamp(min=1)
        return {
            layer: StepStatistics(counts[2 : 2 + self._experts[layer]], counts[1], active)
            for layer, counts in self._sums.items()
        }

    def clear(self) -> None:
        """Begin the next optimizer step."""
        self._sums.clear()
