"""Soft MoE (arXiv 2308.00951): experts work on mixtures of tokens.

Shapes: G sequences (or images), S tokens of a sequence, T = G S, D model width, E experts, C slots per expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomoe.errors import ConfigError
from evomoe.routing.contract import Router, RoutingInput, SoftRouting
from evomoe.routing.selection import count_tokens

EPSILON = 1e-6
"""Added to squared norms, as in the released code."""


class SoftMoE(Router):
    """Every slot reads all tokens of its sequence, and every token all slots (algorithms 1 and 2).

    ``logits = scale * normalize(x) @ normalize(slots)``; a softmax over the tokens mixes them into slots, and one over
    the slots mixes their outputs into tokens. All is differentiable, no token is dropped, all experts work equally
    much, and nothing needs a loss. The cost follows the number of slots, ``E * C`` per sequence whatever its length:
    ``S * capacity_factor / E`` slots per expert cost what other routers with that factor cost.

    Metrics:
        tokens_per_slot: mean over the slots of the effective number (exponential of the entropy) of tokens mixed.
        slots_per_token: the same for the slots that a token receives.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        slots: per expert, C; the paper finds 1 best, with many experts.
    """

    causal_in_train = False
    causal_in_eval = False

    def __init__(self, d_model: int, num_experts: int, *, slots: int = 1) -> None:
        super().__init__(d_model, num_experts)
        if slots < 1:
            raise ConfigError(f"router slots={slots}: expected 1 or more slots per expert, the published number is 1")
        self.slots_per_expert = slots
        self.slots = nn.Parameter(torch.empty(num_experts * slots, d_model))
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the slots anew; their scale starts at 1."""
        nn.init.normal_(self.slots, std=self.d_model**-0.5)
        nn.init.ones_(self.scale)

    def forward(self, inputs: RoutingInput) -> SoftRouting:
        """Route ``inputs.hidden (T, D)``."""
        with torch.autocast(device_type=inputs.hidden.device.type, enabled=False):
            grouped = inputs.hidden.float().view(inputs.batch, inputs.sequence, self.d_model)
            logits = normalize(grouped) @ (self.scale.float() * normalize(self.slots.float())).t()  # (G, S, E * C)
        if inputs.valid is None:
            dispatch, combine = F.softmax(logits, dim=1), F.softmax(logits, dim=2)
        else:
            valid = inputs.valid.view(inputs.batch, inputs.sequence, 1)
            visible = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
            dispatch, combine = F.softmax(visible, dim=1) * valid, F.softmax(logits, dim=2) * valid
        num_tokens = count_tokens(inputs.valid, inputs.hidden)
        shape = (inputs.batch, inputs.sequence, self.num_experts, self.slots_per_expert)
        return SoftRouting(
            dispatch=dispatch.view(shape),
            combine=combine.view(shape),
            num_tokens=num_tokens,
            metrics={
                "tokens_per_slot": _effective_number(dispatch, dim=1),
                "slots_per_token": _effective_number(combine, dim=2),
            },
        )

    def flops_per_token(self) -> int:
        """Of the logits, of the mixing of tokens into slots, and of slots into tokens."""
        return 3 * 2 * self.slots.numel()


def normalize(vectors: Tensor) -> Tensor:
    """``(..., D)`` to unit norm."""
    return vectors * (vectors.square().sum(dim=-1, keepdim=True) + EPSILON).rsqrt()


@torch.no_grad()
def _effective_number(shares: Tensor, dim: int) -> Tensor:
    """Mean exponential of the entropy along ``dim`` of ``shares (G, S, E * C)``, but of those that are zero, 0-dim."""
    present = shares.sum(dim=dim) > 0
    numbers = torch.special.entr(shares).sum(dim=dim).exp() * present
    return numbers.sum() / present.sum().clamp(min=1)
