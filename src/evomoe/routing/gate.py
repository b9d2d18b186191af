"""The linear gate that most routers share: token states to expert logits, always in fp32."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomoe.errors import ConfigError


class Gate(nn.Module, ABC):
    """Token states to the logits of the experts, in fp32 under any autocast."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters from the global random generator."""

    @abstractmethod
    def forward(self, hidden: Tensor) -> Tensor:
        """``(T, D)`` of any floating type to fp32 logits ``(T, E)``."""


class LinearGate(Gate):
    """``logits = hidden @ weight.T`` without bias, in fp32 under any autocast.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        init: ``"scaled"`` draws the weight with standard deviation D^-0.5 (logits of unit variance for normalised
            states), ``"small"`` with (0.1 / D)^0.5, Switch Transformer's scale; ``"zeros"`` starts from equal scores,
            for gates that weigh all experts or add noise: where the best few are chosen, ties send every token to the
            same ones; ``"orthogonal"`` draws orthogonal rows of norm 0.1, the centroids of BASE layers.
    """

    def __init__(self, d_model: int, num_experts: int, init: str = "scaled") -> None:
        super().__init__()
        scales = {"scaled": 1.0, "small": 0.1**0.5, "zeros": 0.0}
        if init not in (*scales, "orthogonal"):
            raise ConfigError(f"gate init={init!r} is unknown: expected one of {', '.join(scales)}, orthogonal")
        self.std = None if init == "orthogonal" else scales[init] * d_model**-0.5
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from the global random generator."""
        if self.std is None:
            nn.init.orthogonal_(self.weight, gain=0.1)
        else:
            nn.init.normal_(self.weight, std=self.std)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(T, D)`` of any floating type to fp32 logits ``(T, E)``."""
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float())


def add_noise(logits: Tensor, deviation: float) -> Tensor:
    """``logits`` and Gaussian noise, drawn from the global random generator unless the deviation is 0."""
    return logits + deviation * torch.randn_like(logits) if deviation > 0 else logits


def check_noise(noise: float) -> None:
    """Refuse a deviation that is none."""
    if not 0 <= noise < math.inf:
        raise ConfigError(f"router noise={noise}: expected 0 for none, or a finite value above it; V-MoE's is 1")
