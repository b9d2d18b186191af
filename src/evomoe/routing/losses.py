"""Auxiliary losses of routers. Each returns a 0-dim fp32 tensor, without any coefficient."""

from __future__ import annotations

from torch import Tensor

from evomoe.routing.selection import mask_padding


def balance_loss(probabilities: Tensor, tokens_per_expert: Tensor, num_tokens: Tensor, top_k: float = 1) -> Tensor:
    """``E * sum_i f_i P_i`` (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

    The value is 1 whenever the load f or the probability P is uniform, for any number of choices per token, as the
    load is divided by ``top_k``. It is no lower bound. The gradient flows through P only.

    Args:
        probabilities: ``(T, E)``, zero rows at padding.
        tokens_per_expert: chosen assignments before any capacity bound, ``(E,)``.
        num_tokens: number of real tokens.
        top_k: experts per token, by which the load is divided.
    """
    num_experts = probabilities.shape[1]
    count = num_tokens.clamp(min=1)
    load = tokens_per_expert.detach() / (count * top_k)  # (E,)
    return num_experts * (load * (probabilities.sum(dim=0) / count)).sum()


def z_loss(logits: Tensor, valid: Tensor | None, num_tokens: Tensor) -> Tensor:
    """Mean squared log-partition of the logits ``(T, E)`` (ST-MoE, arXiv 2202.08906, equation 5)."""
    squared = logits.logsumexp(dim=1, keepdim=True).square()  # (T, 1)
    return mask_padding(squared, valid).sum() / num_tokens.clamp(min=1)
