"""Floating-point operations per token and forward pass, 2 per multiply-add.

Only matrix products count: norms, activations, softmax, biases and embedding look-ups are left out, as is usual (PaLM,
arXiv 2204.02311, appendix B).

Shapes: S sequence, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from evomoe.models.blocks import FeedForward
from evomoe.moe.layer import MoELayer

TRAINING_FACTOR = 3
"""FLOPs of a training step over those of its forward pass: the backward pass computes two products for each one."""


def matrix_flops(parameters: Iterable[Tensor]) -> int:
    """One token through each matrix among ``parameters``."""
    return sum(2 * parameter.numel() for parameter in parameters if parameter.ndim == 2)


def attention_flops(d_model: int, context: int) -> int:
    """Scores and mixing over all ``context`` keys, without the projections.

    The half that causality masks is counted, though some fused kernels skip it.
    """
    return 2 * (2 * d_model * context)


def feed_forward_flops(layer: FeedForward | MoELayer, active_experts: float) -> float:
    """A dense feed-forward, or the router and ``active_experts`` experts of an MoE layer.

    A router is counted by its matrices, as linear gates work. While one expert lives, no router runs.
    """
    expert = matrix_flops(layer.experts.expert_parameters(0).values())
    if isinstance(layer, FeedForward):
        return expert
    router = matrix_flops(layer.router.parameters()) if layer.live_experts > 1 else 0
    return active_experts * expert + router
