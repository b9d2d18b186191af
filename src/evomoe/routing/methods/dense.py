"""Dense mixture: every expert works for every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from evomoe.routing.contract import Router, RoutingInput, SparseRouting
from evomoe.routing.gate import LinearGate
from evomoe.routing.selection import assign_mask, make_routing


class DenseMoE(Router):
    """All experts, weighted by ``softmax(xW)``: the upper end of the sparsity axis, and an ablation of EvoMoE.

    It has no auxiliary loss: the load is uniform by construction.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        init: initialisation of the gate, see ``LinearGate``.
    """

    def __init__(self, d_model: int, num_experts: int, *, init: str = "scaled") -> None:
        super().__init__(d_model, num_experts)
        self.gate = LinearGate(d_model, num_experts, init)

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        """Route ``inputs.hidden (T, D)``."""
        scores = F.softmax(self.gate(inputs.hidden), dim=1)  # (T, E)
        everyone = torch.ones_like(scores, dtype=torch.bool)
        if inputs.valid is not None:
            everyone &= inputs.valid[:, None]
        return make_routing(inputs, assign_mask(everyone, scores), scores)
