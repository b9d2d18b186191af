"""Routing at random for the shared suite, what it holds, and what must hold of it.

Shapes: T tokens, D model width, E experts, A assignments.
"""

from __future__ import annotations

import torch
from routing.rows import VOCABULARY, Row
from torch import Tensor

from evomoe.routing import Router, Routing, RoutingInput, SoftRouting, SparseRouting


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, of other seeds than the routers' weights: equal ones would make states that a gate favours."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000))


def route(
    router: Router,
    hidden: Tensor,
    *,
    batch: int = 1,
    valid: Tensor | None = None,
    final_rule: bool = False,
    seed: int = 0,
) -> Routing:
    """Route ``hidden (T, D)``; the token ids are a function of the states, so that they change together.

    A token after padding has no previous id, as if it began its sequence.
    """
    torch.manual_seed(seed)
    token_ids = (hidden.float().sum(dim=1) * 1000).long() % VOCABULARY
    words = token_ids if valid is None else token_ids.masked_fill(~valid, -1)
    previous_ids = torch.nn.functional.pad(words.view(batch, -1)[:, :-1], (1, 0), value=-1)
    return router(
        RoutingInput(
            hidden=hidden,
            batch=batch,
            sequence=hidden.shape[0] // batch,
            token_ids=token_ids,
            previous_ids=previous_ids.flatten(),
            valid=valid,
            final_rule=final_rule,
        )
    )


def chosen(routing: Routing) -> Tensor:
    """Which experts work for which token, ``(T, E)`` bool."""
    mask = torch.zeros(routing.to_dense().shape, dtype=torch.bool)
    if isinstance(routing, SoftRouting):
        return (routing.dispatch.sum(dim=3).flatten(0, 1) > 0) & (routing.to_dense() > 0)
    mask[routing.token, routing.expert] = True
    return mask


def by_token(routing: Routing) -> Tensor:
    """What the routing says of each token, ``(T, ...)``."""
    if isinstance(routing, SoftRouting):
        return torch.cat([routing.dispatch, routing.combine], dim=3).flatten(0, 1)
    return routing.to_dense()


def weights_of(routing: Routing) -> Tensor:
    """All that mixes tokens and the experts' outputs, flattened."""
    if isinstance(routing, SoftRouting):
        return torch.cat([routing.dispatch.flatten(), routing.combine.flatten()])
    return routing.weight


def directed(routing: Routing) -> Tensor:
    """The weights, and what experts without computation add, in a random direction; 0-dim."""
    weights = weights_of(routing)
    total = (weights * draw(weights.numel(), seed=1)).sum()
    if isinstance(routing, SparseRouting) and routing.bypass is not None:
        total = total + (routing.bypass * draw(*routing.bypass.shape, seed=2)).sum()
    return total


def assert_same(first: Routing, second: Routing) -> None:
    assert torch.equal(chosen(first), chosen(second))
    torch.testing.assert_close(first.to_dense(), second.to_dense())
    torch.testing.assert_close(first.scores, second.scores)
    torch.testing.assert_close(weights_of(first), weights_of(second))
    assert torch.equal(first.num_tokens, second.num_tokens)
    assert_same_losses(first, second)
    if isinstance(first, SoftRouting):
        return
    assert torch.equal(first.dropped, second.dropped)
    assert (first.bypass is None) == (second.bypass is None)
    if first.bypass is not None:
        torch.testing.assert_close(first.bypass.float(), second.bypass.float(), atol=0.02, rtol=0.02)  # perhaps bf16


def assert_same_losses(first: Routing, second: Routing) -> None:
    assert first.losses.keys() == second.losses.keys()
    for name, loss in first.losses.items():
        torch.testing.assert_close(loss, second.losses[name])


def assert_contract(row: Row, router: Router, routing: Routing, valid: Tensor) -> None:
    """All that holds for any routing of the router, ``valid (T,)`` being False at padding."""
    assert isinstance(routing, SoftRouting) is row.soft
    assert int(routing.num_tokens) == int(valid.sum())
    assert routing.scores.dtype == torch.float32
    assert routing.scores.shape == (valid.numel(), router.num_experts + row.null_experts)
    assert routing.scores.isfinite().all()
    assert torch.equal(routing.scores[~valid], torch.zeros_like(routing.scores[~valid]))
    if row.probabilities:
        assert (routing.scores >= 0).all()
        torch.testing.assert_close(routing.scores.sum(dim=1), valid.float())

    assert tuple(routing.losses) == router.loss_names == tuple(row.balanced_losses)
    for scalar in (*routing.losses.values(), *routing.metrics.values()):
        assert scalar.shape == ()
        assert scalar.isfinite()
    assert all(loss.dtype == torch.float32 for loss in routing.losses.values())
    assert not any(metric.requires_grad for metric in routing.metrics.values())
    (assert_soft if isinstance(routing, SoftRouting) else assert_sparse)(row, router, routing, valid)


def assert_soft(row: Row, router: Router, routing: SoftRouting, valid: Tensor) -> None:
    groups, size, experts, capacity = routing.dispatch.shape
    assert (groups * size, experts) == (valid.numel(), router.num_experts)
    assert routing.dispatch.shape == routing.combine.shape
    assert routing.rows == groups * experts * capacity
    assert torch.equal(chosen(routing), valid[:, None].expand(-1, experts))
    real = valid.view(groups, size)
    for tensor in (routing.dispatch, routing.combine):
        assert tensor.dtype == torch.float32
        assert (tensor >= 0).all()
        assert torch.equal(tensor[~real], torch.zeros_like(tensor[~real]))
    of_tokens = routing.dispatch.sum(dim=1)  # (G, E, C)
    torch.testing.assert_close(of_tokens, real.any(dim=1).float()[:, None, None].expand_as(of_tokens))
    torch.testing.assert_close(routing.combine.sum(dim=(2, 3)), real.float())


def assert_sparse(row: Row, router: Router, routing: SparseRouting, valid: Tensor) -> None:
    tokens, experts = valid.numel(), router.num_experts
    token, expert, weight = routing.token, routing.expert, routing.weight
    assert token.dtype == torch.int64
    assert routing.tokens_per_expert.dtype == torch.int64
    assert token.shape == expert.shape == weight.shape
    assert routing.tokens_per_expert.shape == (experts,)
    assert int(routing.tokens_per_expert.sum()) == token.numel()
    pairs = expert * tokens + token
    assert (pairs.diff() > 0).all(), "sorted by expert, then by token, and no pair twice"
    assert valid[token].all(), "no padding"
    assert torch.equal(routing.tokens_per_expert, torch.bincount(expert, minlength=experts))

    per_token = chosen(routing).sum(dim=1)
    least, most = row.bounds(experts)
    assert (per_token <= most).all()
    wanted = token.numel() + int(routing.dropped)
    if row.drops:
        assert int(routing.dropped) >= 0
        assert least * int(valid.sum()) <= wanted <= most * int(valid.sum())
    else:
        assert int(routing.dropped) == 0
        assert (per_token[valid] >= least).all()
    torch.testing.assert_close(routing.active_experts, torch.tensor(token.numel() / max(int(valid.sum()), 1)))

    assert weight.dtype == torch.float32
    assert weight.isfinite().all()
    assert (weight >= 0).all()
    assert (routing.to_dense().sum(dim=1) <= row.largest_weight + 1e-5).all()

    dense = routing.to_dense()
    assert torch.equal(dense[token, expert], weight)
    assert int(dense.count_nonzero()) == int(weight.count_nonzero())

    assert (routing.balance is None) == ("balance" not in routing.losses)
    if routing.balance is not None:
        torch.testing.assert_close(routing.balance.loss(), routing.losses["balance"])
    if routing.bypass is not None:
        assert routing.bypass.shape[0] == tokens
        assert torch.equal(routing.bypass[~valid], torch.zeros_like(routing.bypass[~valid]))
