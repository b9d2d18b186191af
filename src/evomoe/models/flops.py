"""Floating-point operations per token and forward pass, 2 per multiply-add.

Only matrix products count: norms, activations, softmax, biases and embedding look-ups are left out, as is usual (PaLM,
arXiv 2204.02311, appendix B).

Shapes: S sequence, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from evomoe.moe.experts import Experts
from evomoe.moe.layer import MoELayer

TRAINING_FACTOR = 3
"""FLOPs of a training step over those of its forward pass: the backward pass computes two products for each one."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one forward pass of a batch does.

    Args:
        tokens: real tokens, without padding, whether or not there is a loss for each; in a translation those of the
            target alone. A number, or a 0-dim tensor.
        forward_flops: of its matrix products, padding's too, with the rows that the experts really computed. What
            activation checkpointing computes a second time is not charged: it buys memory, and belongs to no method.
    """

    tokens: int | Tensor
    forward_flops: float

    @property
    def training_flops(self) -> float:
        """FLOPs of the training step."""
        return TRAINING_FACTOR * self.forward_flops


def matrix_flops(parameters: Iterable[Tensor]) -> int:
    """One token through each matrix among ``parameters``."""
    return sum(2 * parameter.numel() for parameter in parameters if parameter.ndim == 2)


def attention_flops(d_model: int, context: int) -> int:
    """Scores and mixing over all ``context`` keys, without the projections.

    The half that causality masks is counted, though some fused kernels skip it.
    """
    return 2 * (2 * d_model * context)


def expert_flops(experts: Experts) -> int:
    """One expert, or the dense feed-forward that is built as one."""
    return matrix_flops(experts.expert_parameters(0).values())


def layer_flops(layer: MoELayer, active_experts: float) -> float:
    """An MoE layer of which ``active_experts`` routed experts work for a token; no router runs before the spawn."""
    router = layer.router.flops_per_token() if layer.routes else 0
    shared = 0 if layer.shared is None else expert_flops(layer.shared)
    return router + shared + active_experts * expert_flops(layer.experts)
