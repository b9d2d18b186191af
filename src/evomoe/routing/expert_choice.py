"""Expert Choice routing (arXiv 2202.09368): the experts choose their tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.routing.contract import Router, RoutingInput, SparseRouting
from evomoe.routing.gate import LinearGate
from evomoe.routing.selection import assign_mask, capacity_per_expert, make_routing

POOLS = ("sequence", "batch", "position")


class ExpertChoice(Router):
    """Each expert works for the C tokens of a pool that score highest in its column of ``softmax(xW)``.

    ``C = ceil(n * capacity_factor / E)`` for a pool of n real tokens, at least 1 and at most n. So the load is balanced
    without any loss, and a token may get no expert, several, or all. A tie goes to the earlier token.

    What the pool is decides who sees whom:

    - ``batch``: all tokens of the batch, as published. A token's experts depend on later tokens.
    - ``sequence``: the tokens of one sequence. They depend on later tokens, but not on other sequences.
    - ``position``: the tokens that stand at the same position of all sequences, our choice for language models. They
      depend on no later token, but on the other sequences: few sequences a batch make small pools, down to a single
      one, whose token every expert takes.

    It has no loss. The metric ``uncovered`` is the share of real tokens without any expert.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        capacity_factor: mean number of experts per token (the paper: 2).
        pool: ``batch``, ``sequence`` or ``position``.
        init: initialisation of the gate, see ``LinearGate``.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        capacity_factor: float = 2.0,
        pool: str = "batch",
        init: str = "scaled",
    ) -> None:
        super().__init__(d_model, num_experts)
        if not 0 < capacity_factor < math.inf:
            raise ConfigError(
                f"router capacity_factor={capacity_factor}: expected a finite factor above 0, the mean number of "
                "experts per token; the published one is 2"
            )
        if pool not in POOLS:
            raise ConfigError(f"router pool={pool!r} is unknown: expected one of {', '.join(POOLS)}")
        self.capacity_factor = capacity_factor
        self.pool = pool
        self.causal_in_train = self.causal_in_eval = pool == "position"
        self.gate = LinearGate(d_model, num_experts, init)

    def reset_parameters(self) -> None:
        """Draw the gate anew."""
        self.gate.reset_parameters()

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        """Route ``inputs.hidden (T, D)``."""
        probabilities = F.softmax(self.gate(inputs.hidden), dim=1)  # (T, E)
        valid = torch.ones_like(probabilities[:, 0], dtype=torch.bool) if inputs.valid is None else inputs.valid
        chosen = self._from_pools(self._choose(self._to_pools(probabilities, inputs), self._to_pools(valid, inputs)))
        routing = make_routing(inputs, assign_mask(chosen, probabilities), probabilities)
        uncovered = routing.num_tokens - chosen.any(dim=1).sum()
        return replace(routing, metrics={"uncovered": uncovered / routing.num_tokens.clamp(min=1)})

    def _choose(self, scores: Tensor, valid: Tensor) -> Tensor:
        """The C best tokens of each expert in each of G pools: ``(G, n, E)``, and ``valid (G, n)``, to bool."""
        real = valid.sum(dim=1, keepdim=True)  # (G, 1)
        capacity = capacity_per_expert(real, self.num_experts, 1, self.capacity_factor).minimum(real)
        # A score is at least 0, so padding queues last, where no place is left.
        queue = scores.masked_fill(~valid[:, :, None], -1).argsort(dim=1, descending=True, stable=True)
        served = torch.arange(scores.shape[1], device=scores.device) < capacity  # (G, n), by place in the queue
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        return chosen.scatter(1, queue, served[:, :, None].expand_as(queue))

    def _to_pools(self, values: Tensor, inputs: RoutingInput) -> Tensor:
        """``(T, ...)`` to ``(G, n, ...)``."""
        if self.pool == "batch":
            return values[None]
        by_sequence = values.view(inputs.batch, inputs.sequence, *values.shape[1:])
        return by_sequence if self.pool == "sequence" else by_sequence.transpose(0, 1)

    def _from_pools(self, chosen: Tensor) -> Tensor:
        """``(G, n, E)`` back to ``(T, E)``."""
        return (chosen.transpose(0, 1) if self.pool == "position" else chosen).flatten(0, 1)
