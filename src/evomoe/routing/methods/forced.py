"""A router of known load, to time the layer around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from evomoe.routing.contract import Router, RoutingInput, SparseRouting
from evomoe.routing.gate import LinearGate
from evomoe.routing.selection import assign_choices, check_top_k, make_routing


class ForcedBalance(Router):
    """Sends token t to the experts ``t * K, ..., t * K + K - 1`` modulo E, whatever its state: a benchmark's router.

    The gate is computed and weights the outputs (its softmax at the forced experts), so that the layer costs what a
    learned router's layer costs; only the load is known: exactly balanced where E divides T * K.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        top_k: experts per token K.
    """

    def __init__(self, d_model: int, num_experts: int, *, top_k: int = 1) -> None:
        super().__init__(d_model, num_experts)
        check_top_k(top_k, num_experts)
        self.top_k = top_k
        self.gate = LinearGate(d_model, num_experts)

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        """Route ``inputs.hidden (T, D)``."""
        scores = F.softmax(self.gate(inputs.hidden), dim=1)  # (T, E)
        tokens = scores.shape[0]
        expert = torch.arange(tokens * self.top_k, device=scores.device).view(tokens, self.top_k) % self.num_experts
        assignments = assign_choices(expert, scores.gather(1, expert), self.num_experts, inputs.valid)
        return make_routing(inputs, assignments, scores)
