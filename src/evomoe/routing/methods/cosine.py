"""The cosine router of X-MoE (arXiv 2204.09179): tokens and experts meet on a low-dimensional hypersphere."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomoe.errors import ConfigError
from evomoe.routing.gate import Gate
from evomoe.routing.methods.topk import TopK

LEAST_TEMPERATURE = 0.01
LEAST_NORM = 1e-6


class CosineGate(Gate):
    """``logits = cos(Px, e) / temperature`` with a learned projection P, expert vectors e and temperature.

    Neither the length of the token state nor that of an expert's vector matters, so no logit exceeds
    ``1 / temperature``, and a state of zeros has logits of zero.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        projection_dim: dimension R of the hypersphere.
        temperature: initial temperature, which is learned in log space and held at 0.01 or above. A bound that lets
            no gradient through would never let go, so the gradient of what lies beyond it counts as well.
    """

    def __init__(self, d_model: int, num_experts: int, projection_dim: int, temperature: float) -> None:
        super().__init__()
        self.initial_scale = -math.log(temperature)
        self.projection = nn.Parameter(torch.empty(projection_dim, d_model))
        self.experts = nn.Parameter(torch.empty(num_experts, projection_dim))
        self.log_scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw projection and expert vectors, the latter of norm 1 or so, and forget what temperature was learned."""
        nn.init.normal_(self.projection, std=self.projection.shape[1] ** -0.5)
        nn.init.normal_(self.experts, std=self.experts.shape[1] ** -0.5)
        nn.init.constant_(self.log_scale, self.initial_scale)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(T, D)`` of any floating type to fp32 logits ``(T, E)``."""
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            projected = F.linear(hidden.float(), self.projection.float())  # (T, R)
            # The usual floor of 1e-12 would multiply the gradient of a state of zeros by 1e12.
            tokens = F.normalize(projected, dim=1, eps=LEAST_NORM)
            experts = F.normalize(self.experts.float(), dim=1, eps=LEAST_NORM)
            log_scale = self.log_scale.float()
            log_scale = log_scale - (log_scale + math.log(LEAST_TEMPERATURE)).clamp(min=0).detach()
            scale = log_scale.exp()
            return F.linear(tokens, experts) * scale


class CosineRouter(TopK):
    """The best experts of ``softmax(cos(Px, e) / temperature)``: ``TopK`` with a :class:`CosineGate`.

    The dot product of ``xW`` pulls the tokens of an expert towards its row of W; directions in a space of few
    dimensions leave the other dimensions of the states alone. The paper's projection has E / 2 dimensions. Its initial
    temperature is not known to us; 0.5 and the bound of 0.01 are those of the gate in Microsoft's Tutel, whose
    projection has a bias, while ours has none, so that a state's length never matters.

    Losses:
        balance: ``E * sum_i f_i P_i`` with the load f divided by ``top_k``; 1 at balance.
        z: mean squared log-partition of the logits; ``log(E)^2`` for logits of zero.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        top_k: experts per token K.
        renormalize: divide a token's chosen weights by their sum, before any capacity bound.
        capacity_factor: places per expert in training, as a multiple of T * K / E; None drops nothing.
        eval_capacity_factor: the same in evaluation.
        projection_dim: dimension of the hypersphere; None for E / 2, rounded up.
        temperature: initial temperature.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int = 1,
        renormalize: bool = False,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        projection_dim: int | None = None,
        temperature: float = 0.5,
    ) -> None:
        projection_dim = (num_experts + 1) // 2 if projection_dim is None else projection_dim
        if projection_dim < 1:
            raise ConfigError(f"router projection_dim={projection_dim}: expected at least 1, or null for E / 2")
        if not LEAST_TEMPERATURE <= temperature < math.inf:
            raise ConfigError(
                f"router temperature={temperature}: expected a finite value of {LEAST_TEMPERATURE} or above"
            )
        super().__init__(
            d_model,
            num_experts,
            top_k=top_k,
            renormalize=renormalize,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            gate=CosineGate(d_model, num_experts, projection_dim, temperature),
        )
