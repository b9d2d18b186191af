"""From scores to sorted assignments: the index work that every sparse router shares.

Shapes: T tokens, E experts, K experts per token, A assignments.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.routing.contract import RoutingInput, SparseRouting
from evomoe.routing.pools import from_pools, real_tokens

PRIORITIES = ("token", "choice", "best")
ROUNDINGS = ("ceil", "round")

Assignments = tuple[Tensor, Tensor, Tensor]
"""``token (A,)``, ``weight (A,)``, ``tokens_per_expert (E,)``: the first three fields of a ``SparseRouting``."""


def assign_mask(mask: Tensor, weights: Tensor) -> Assignments:
    """Assignments of an arbitrary active set.

    Args:
        mask: ``(T, E)`` bool, True where the expert works for the token.
        weights: ``(T, E)`` combine weights; only the chosen ones are read, and only they receive a gradient.
    """
    expert, token = mask.t().nonzero(as_tuple=True)  # (A,) each, sorted by expert, then token
    return token, weights[token, expert], mask.sum(dim=0)


def assign_choices(expert: Tensor, weight: Tensor, num_experts: int, keep: Tensor | None = None) -> Assignments:
    """Assignments of a fixed number of choices per token.

    Args:
        expert: chosen experts ``(T, K)``, distinct within a row.
        weight: combine weights ``(T, K)``.
        num_experts: number of experts E.
        keep: ``(T, K)``, or ``(T,)`` for all choices of a token alike: False for what does not count (padding,
            capacity); None keeps all.
    """
    top_k = expert.shape[1]
    flat_expert, flat_weight = expert.flatten(), weight.flatten()  # token-major: (T * K,)
    if keep is None:
        order = torch.argsort(flat_expert, stable=True)
    else:
        keep = keep if keep.ndim == 2 else keep[:, None].expand_as(expert)
        kept = keep.flatten().nonzero(as_tuple=True)[0]
        order = kept[torch.argsort(flat_expert[kept], stable=True)]
    bounds = torch.searchsorted(flat_expert[order], torch.arange(num_experts + 1, device=expert.device))
    token = order if top_k == 1 else torch.div(order, top_k, rounding_mode="floor")
    return token, flat_weight[order], bounds.diff()


def true_experts(assignments: Assignments, num_experts: int) -> Assignments:
    """Those of the first ``num_experts`` experts, where the ones behind them compute nothing."""
    token, weight, load = assignments
    rows = int(load[:num_experts].sum())
    return token[:rows], weight[:rows], load[:num_experts]


def within_capacity(
    expert: Tensor,
    capacity: Tensor | int,
    valid: Tensor | None,
    priority: str = "token",
    confidence: Tensor | None = None,
) -> Tensor:
    """Which choices find a free place, ``(T, K)`` bool.

    Args:
        expert: chosen experts ``(T, K)``.
        capacity: places per expert, or for each token those of the experts that it may choose ``(T,)``.
        valid: ``(T,)`` bool; padding takes no place and is never kept.
        priority: ``"token"`` serves all choices of an earlier token first (causal); ``"choice"`` serves all first
            choices before any second choice (GShard): a later token can then evict an earlier one's second choice;
            ``"best"`` does so after sorting the tokens by ``confidence`` (V-MoE's Batch Priority Routing).
        confidence: of each token in its first choice ``(T,)``, for ``"best"``.
    """
    if priority == "best":
        assert confidence is not None
        best = torch.argsort(confidence, descending=True, stable=True)
        limit = capacity[best] if isinstance(capacity, Tensor) and capacity.ndim == 1 else capacity
        kept = torch.empty_like(expert, dtype=torch.bool)
        kept[best] = within_capacity(expert[best], limit, None if valid is None else valid[best], "choice")
        return kept
    queue = expert if priority == "token" else expert.t()
    flat = queue.flatten()
    if valid is not None:
        waiting = valid[:, None].expand_as(expert)
        waiting = (waiting if priority == "token" else waiting.t()).flatten()
        flat = torch.where(waiting, flat, -1)  # padding queues before expert 0, where it takes nobody's place
    order = torch.argsort(flat, stable=True)
    ranked = flat[order]
    place = torch.arange(flat.numel(), device=flat.device) - torch.searchsorted(ranked, ranked)
    if isinstance(capacity, Tensor) and capacity.ndim == 1:
        limits = capacity[:, None].expand_as(expert)
        capacity = (limits if priority == "token" else limits.t()).flatten()[order]
    served = torch.empty_like(flat, dtype=torch.bool)
    served[order] = (place < capacity) & (ranked >= 0)
    served = served.view(queue.shape)
    return served if priority == "token" else served.t()


def assign_within_capacity(
    inputs: RoutingInput,
    expert: Tensor,
    weight: Tensor,
    num_experts: int,
    factor: float | None,
    priority: str = "token",
    pool: str = "batch",
    multiple: int = 1,
    confidence: Tensor | None = None,
) -> tuple[Assignments, Tensor | None]:
    """Assignments under a capacity of ``factor * n * K / E`` places per expert, and the load before it, ``(E,)``.

    Without a factor nothing is dropped, and the load before it is None. The tokens of each ``pool`` have n places for
    themselves. See :func:`assign_choices`, :func:`within_capacity` and :func:`capacity_per_expert` for the others.
    """
    assignments = assign_choices(expert, weight, num_experts, inputs.valid)
    if factor is None:
        return assignments, None
    real = real_tokens(inputs, pool)  # (G, n)
    capacity = capacity_per_expert(real.sum(dim=1), num_experts, expert.shape[1], factor, multiple=multiple)  # (G,)
    pool_of = from_pools(torch.arange(len(real), device=expert.device)[:, None].expand_as(real), pool)  # (T,)
    queue = expert + num_experts * pool_of[:, None]  # each pool has experts of its own
    keep = within_capacity(queue, capacity[pool_of], inputs.valid, priority, confidence)
    return assign_choices(expert, weight, num_experts, keep), assignments[2]


def capacity_per_expert(
    num_tokens: Tensor,
    num_experts: int | Fraction,
    top_k: int,
    factor: float,
    rounding: str = "ceil",
    multiple: int = 1,
) -> Tensor:
    """Places per expert: ``T * K / E * factor`` over real tokens, rounded to an integer of at least 1.

    Args:
        num_tokens: real tokens T of each pool, of any shape, which the result has too.
        num_experts: number of experts E; a fraction where experts are meant to have unequal loads.
        top_k: experts per token K.
        factor: of the capacity.
        rounding: ``"ceil"``, or ``"round"`` to the nearest, halves to the even one.
        multiple: then rounded up to a multiple of it.
    """
    # In whole numbers: 100 * 1.1 / 10 is 11 places, and not every device has double precision.
    per_token = Fraction(factor).limit_denominator(10**6) * top_k / num_experts
    places, parts = num_tokens * per_token.numerator, per_token.denominator
    if rounding == "ceil":
        whole = -(-places // parts)
    else:
        whole = (2 * places + parts) // (2 * parts)
        whole = whole - ((2 * places + parts) % (2 * parts) == 0) * (whole % 2)
    return -(-whole.clamp(min=1) // multiple) * multiple


def make_routing(
    inputs: RoutingInput, assignments: Assignments, scores: Tensor, wanted_per_expert: Tensor | None = None
) -> SparseRouting:
    """A routing of these assignments, its losses and metrics still to be added by ``dataclasses.replace``.

    Args:
        inputs: what was routed.
        assignments: of real tokens only.
        scores: ``(T, E)``; rows of padding become zero.
        wanted_per_expert: assignments before a capacity bound, ``(E,)``; None without a bound.
    """
    token, weight, tokens_per_expert = assignments
    num_tokens = count_tokens(inputs.valid, inputs.hidden)
    dropped = num_tokens.new_zeros(()) if wanted_per_expert is None else wanted_per_expert.sum() - token.numel()
    return SparseRouting(
        token=token,
        weight=weight,
        tokens_per_expert=tokens_per_expert,
        scores=mask_padding(scores, inputs.valid),
        num_tokens=num_tokens,
        dropped=dropped,
        wanted_per_expert=wanted_per_expert,
    )


def count_tokens(valid: Tensor | None, hidden: Tensor) -> Tensor:
    """Number of real tokens as a 0-dim int64 tensor."""
    if valid is None:
        return torch.full((), hidden.shape[0], device=hidden.device)  # unlike torch.tensor, without waiting for a GPU
    return valid.sum()


def mask_padding(scores: Tensor, valid: Tensor | None) -> Tensor:
    """``scores (T, E)`` with zero rows at padding."""
    return scores if valid is None else scores * valid[:, None]


def check_top_k(top_k: int, num_experts: int, name: str = "top_k") -> None:
    """Refuse a number of experts per token that cannot be had."""
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"router {name}={top_k}: expected 1 to {num_experts}, the number of experts")


def check_renormalize(renormalize: bool, top_k: int, num_experts: int) -> None:
    """Refuse weights that are 1 whatever the gate says."""
    if renormalize and top_k == 1 and num_experts > 1:
        raise ConfigError(
            "router renormalize=true with top_k=1 leaves the gate without gradient: set renormalize=false"
        )


def check_capacity_factor(name: str, factor: float | None) -> None:
    """Refuse a capacity factor that leaves no place."""
    if factor is not None and not (factor > 0 and math.isfinite(factor)):
        raise ConfigError(f"{name}={factor}: expected a finite factor above 0, or null for dropless routing")


def check_priority(priority: str) -> None:
    """Refuse an order of service that does not exist."""
    if priority not in PRIORITIES:
        raise ConfigError(f"router priority={priority!r} is unknown: expected one of {', '.join(PRIORITIES)}")


def check_rounding(rounding: str, multiple: int) -> None:
    """Refuse a rule of rounding that does not exist."""
    if rounding not in ROUNDINGS:
        raise ConfigError(f"router capacity_rounding={rounding!r} is unknown: expected ceil or round")
    if multiple < 1:
        raise ConfigError(f"router capacity_multiple={multiple}: expected 1 or more; V-MoE rounds up to multiples of 4")
