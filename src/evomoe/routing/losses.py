"""Auxiliary losses of routers. Without any coefficient, which is the task's."""

from __future__ import annotations

import torch
from torch import Tensor

from evomoe.routing.contract import Balance, RoutingInput
from evomoe.routing.pools import real_tokens, to_pools
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


def sequence_balance(shares: Tensor, top_k: int, inputs: RoutingInput) -> Tensor:
    """The mean over the sequences of ``sum_i f_i P_i`` within each (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20).

    The ``top_k`` highest shares of a token count, whatever else may decide about its experts. The value is 1 if f or P
    is uniform in every sequence. The gradient flows through P only.

    Args:
        shares: scores of the experts divided by their sum, ``(T, E)``, zero rows at padding.
        top_k: experts per token.
        inputs: what was routed.
    """
    best = torch.zeros_like(shares).scatter(1, shares.topk(top_k, dim=1).indices, 1.0)
    real = real_tokens(inputs, "sequence").sum(dim=1)  # (B,)
    load = to_pools(mask_padding(best, inputs.valid), inputs, "sequence").sum(dim=1)  # (B, E)
    price = to_pools(shares, inputs, "sequence").sum(dim=1)
    product = (load * price).sum(dim=1) * (shares.shape[1] / top_k) / real.clamp(min=1).square()
    return product.sum() / (real > 0).sum().clamp(min=1)


def z_loss(logits: Tensor, valid: Tensor | None, num_tokens: Tensor) -> Tensor:
    """Mean squared log-partition of the logits ``(T, E)`` (ST-MoE, arXiv 2202.08906, equation 5)."""
    squared = logits.logsumexp(dim=1, keepdim=True).square()  # (T, 1)
    return mask_padding(squared, valid).sum() / num_tokens.clamp(min=1)


def squared_variation(amounts: Tensor) -> Tensor:
    """Squared coefficient of variation of what each expert gets, ``(E,)``; 0 at balance, E - 1 at collapse.

    V-MoE (arXiv 2106.05974, appendix A) takes it of the sum of the probabilities, *importance*, and of the probability
    to be chosen again if the noise were drawn anew, *load*.
    """
    return amounts.var(unbiased=False) / amounts.mean().square().clamp(min=1e-20)


def chance_of_choice(logits: Tensor, threshold: Tensor, deviation: float) -> Tensor:
    """Probability of each expert to pass the ``threshold (T, 1)`` with new noise on its logit ``(T, E)``."""
    return torch.special.ndtr((logits - threshold) / deviation)
