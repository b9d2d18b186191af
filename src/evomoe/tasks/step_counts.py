"""What the routers did in one optimizer step, over all its micro-batches and processes.

Shapes: E experts, E' experts and those without computation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed

from evomoe.routing import Balance, SparseRouting, StepStatistics
from evomoe.routing.processes import world_size


@dataclass
class _LayerCounts:
    load: Tensor  # (E,)
    rows: Tensor  # ()
    tokens: Tensor  # ()
    balance_load: Tensor  # (E')


class StepCounts:
    """Counts of each MoE layer, summed; filled from the routings that forward passes return, never within them.

    So nothing is counted twice where activations are recomputed in the backward pass.
    """

    def __init__(self) -> None:
        self._layers: dict[str, _LayerCounts] = {}

    def add(self, layer: str, routing: SparseRouting) -> None:
        """Count one micro-batch of one layer; every process must call it, as the counts are summed over processes."""
        balance_load = routing.load if routing.balance is None else routing.balance.load
        rows = routing.tokens_per_expert.sum()
        parts = [routing.load, rows[None], routing.num_tokens[None], balance_load]
        counts = torch.cat(parts)  # (E + 2 + E')
        if world_size() > 1:
            distributed.all_reduce(counts)
        load, rows, tokens, balance_load = counts.split([part.numel() for part in parts])
        before = self._layers.get(layer)
        if before is None:
            self._layers[layer] = _LayerCounts(load, rows[0], tokens[0], balance_load)
        else:
            self._layers[layer] = _LayerCounts(
                before.load + load,
                before.rows + rows[0],
                before.tokens + tokens[0],
                before.balance_load + balance_load,
            )

    def spread(self, layer: str, balance: Balance) -> Balance:
        """The prices of ``balance`` for the load of all that was counted."""
        counts = self._layers[layer]
        return replace(balance, load=counts.balance_load, tokens=counts.tokens)

    def statistics(self) -> dict[str, StepStatistics]:
        """What each layer's router is told after the optimizer step."""
        rows = sum((counts.rows for counts in self._layers.values()), torch.tensor(0))
        tokens = sum((counts.tokens for counts in self._layers.values()), torch.tensor(0))
        active = rows / tokens.clamp(min=1)
        return {layer: StepStatistics(counts.load, counts.tokens, active) for layer, counts in self._layers.items()}

    def clear(self) -> None:
        """Begin the next optimizer step."""
        self._layers.clear()
