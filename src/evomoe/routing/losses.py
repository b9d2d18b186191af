"""Auxiliary losses of routers. Without any coefficient, which is the task's."""

from __future__ import annotations

from torch import Tensor

from evomoe.routing.contract import Balance
from evomoe.routing.selection import mask_padding


def switch_balance(probabilities: Tensor, load: Tensor, num_tokens: Tensor, top_k: float = 1) -> Balance:
    """``E * sum_i f_i P_i`` (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

    The value is 1 whenever the load f or the probability P is uniform, for any number of choices per token, as the
    load is divided by ``top_k``. It is no lower bound. The gradient flows through P only.

    Args:
        probabilities: ``(T, E)``, zero rows at padding.
        load: chosen assignments before any capacity bound, ``(E,)``.
        num_tokens: number of real tokens.
        top_k: experts per token, by which the load is divided.
    """
    num_experts = probabilities.shape[1]
    price = probabilities.sum(dim=0) / num_tokens.clamp(min=1) * (num_experts / top_k)
    return Balance(price=price, load=load, tokens=num_tokens)


def z_loss(logits: Tensor, valid: Tensor | None, num_tokens: Tensor) -> Tensor:
    """Mean squared log-partition of the logits ``(T, E)`` (ST-MoE, arXiv 2202.08906, equation 5)."""
    squared = logits.logsumexp(dim=1, keepdim=True).square()  # (T, 1)
    return mask_padding(squared, valid).sum() / num_tokens.clamp(min=1)
