from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomoe.routing import LocMoE, LocMoEPlus, RoutingInput
from evomoe.routing.locality import cosine_affinity
from evomoe.routing.methods.locmoe_plus import keep_closest


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def states(affinities: list[list[float]]) -> Tensor:
    """Token states of norm 1, two features a block, with these cosines; what is missing to the norm is in the last
    block, orthogonal to its row."""
    cosines = torch.tensor(affinities)
    hidden = (cosines / math.sqrt(2)).repeat_interleave(2, dim=1)
    missing = (1 - cosines.square().sum(dim=1)).sqrt() / math.sqrt(2)
    hidden[:, -2] += missing
    hidden[:, -1] -= missing
    return hidden


def routed(router: LocMoEPlus, hidden: Tensor, batch: int = 1, valid: Tensor | None = None):
    return router(RoutingInput(hidden=hidden, batch=batch, sequence=hidden.shape[0] // batch, valid=valid))


FIVE_TOKENS = [[0.5, 0.1, 0.0], [0.3, 0.2, 0.0], [0.6, 0.0, -0.7], [0.1, 0.4, 0.3], [0.4, -0.2, 0.2]]


def test_hand_typed_choice_in_training_and_evaluation():
    hidden = states(FIVE_TOKENS)
    torch.testing.assert_close(cosine_affinity(hidden, 3), torch.tensor(FIVE_TOKENS))
    router = LocMoEPlus(6, 3, num_nodes=1, capacity_factor=1.2)
    # exp(6 * .36 / 1.64) / 3 = 1.24: two places, the bound being 1.2 * 5 / 3. Four tokens come to expert 0.
    weights = torch.tensor(FIVE_TOKENS).softmax(dim=1)
    expected = torch.zeros(5, 3)
    for token, expert in ((0, 0), (2, 0), (3, 1)):
        expected[token, expert] = weights[token, expert]
    routing = routed(router, hidden)
    torch.testing.assert_close(routing.to_dense(), expected)
    assert routing.load.tolist() == [4, 1, 0]
    assert int(routing.dropped) == 2
    assert routing.metrics["capacity"].item() == 2
    for token in (1, 4):
        expected[token, 0] = weights[token, 0]
    evaluated = routed(router.eval(), hidden)
    torch.testing.assert_close(evaluated.to_dense(), expected)
    assert int(evaluated.dropped) == 0
    assert evaluated.metrics["capacity"].item() == 2


def test_a_later_token_takes_the_place_of_an_earlier_one_in_training_alone():
    weak, strong = [0.3, 0.0, 0.0, 0.0], [0.6, 0.0, 0.0, 0.0]
    router = LocMoEPlus(8, 4, capacity_factor=0.5)
    alone = states([weak, [0.0, 0.5, 0.0, 0.0]])
    followed = states([weak, strong])
    assert 0 in routed(router, alone).token.tolist()
    assert routed(router, followed).token.tolist() == [1]
    assert not router.causal_in_train
    assert router.causal_in_eval
    assert routed(router.eval(), followed).token.tolist() == [0, 1]
    selecting = LocMoEPlus(8, 4, capacity_factor=0.5, select_in_eval=True)
    assert not selecting.causal_in_eval
    assert routed(selecting.eval(), followed).token.tolist() == [1]


def test_one_choice_without_a_binding_capacity_is_locmoe():
    hidden = draw(60, 16)
    inputs = RoutingInput(hidden=hidden, batch=3, sequence=20)
    plus, plain = LocMoEPlus(16, 4).eval()(inputs), LocMoE(16, 4)(inputs)
    assert torch.equal(plus.token, plain.token)
    assert torch.equal(plus.tokens_per_expert, plain.tokens_per_expert)
    assert torch.equal(plus.metrics["off_node"], plain.metrics["off_node"])


@settings(max_examples=50, deadline=None)
@given(
    top_k=st.integers(1, 4),
    capacity=st.integers(1, 8),
    seed=st.integers(0, 100),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_experts_keep_the_closest_of_the_tokens_that_came(top_k, capacity, seed, share):
    delta = draw(20, 4, seed=seed).round(decimals=1)  # with ties
    valid = torch.rand(20, generator=torch.Generator().manual_seed(seed)) < share
    affinity, expert = delta.topk(top_k, dim=1)
    keep = keep_closest(expert, affinity, capacity, valid)
    for i in range(4):
        came = [t for t in range(20) if valid[t] and i in expert[t].tolist()]
        closest = sorted(came, key=lambda t, i=i: (-delta[t, i].item(), t))[:capacity]
        kept = [t for t in range(20) if keep[t, expert[t] == i].any()]
        assert kept == sorted(closest)


@pytest.mark.parametrize(
    ("largest", "factor", "expected"),
    [
        (0.3, None, 6),  # exp(64 * .09 / 1.91) / 4 = 5.1
        (0.3, 0.5, 5),  # half of 40 / 4
        (0.1, None, 1),  # exp(.32) / 4 = 0.3
        (0.4, None, 40),  # exp(5.57) / 4 = 65.3, and 40 tokens
        (1.0, None, 40),
        (-0.2, None, 1),
    ],
)
def test_capacity_from_the_largest_affinity(largest, factor, expected):
    hidden = torch.zeros(40, 64)
    hidden[:, 0::2], hidden[:, 1::2] = 1.0, -1.0  # orthogonal to all experts
    hidden[7] = math.sqrt(1 - largest**2) * hidden[7] / 8
    hidden[7, :16] += largest / 4
    if largest < 0:
        hidden[:] = hidden[7]
        hidden[:, 16:] -= 0.1
    router = LocMoEPlus(64, 4, capacity_factor=factor)
    assert routed(router, hidden).metrics["capacity"].item() == expected


def test_padding_has_no_say_in_the_capacity():
    hidden = draw(30, 64)
    hidden[3, :16] = 100.0  # an affinity of 1
    valid = torch.arange(30) != 3
    router = LocMoEPlus(64, 4, capacity_factor=None)
    assert routed(router, hidden).metrics["capacity"].item() == 30
    padded = routed(router, hidden, valid=valid).metrics["capacity"].item()
    assert padded == routed(router, hidden[valid]).metrics["capacity"].item() < 29


def test_the_estimate_of_a_wide_model_does_not_overflow():
    hidden = torch.ones(10, 8192)
    hidden[:, 1024:] = 0
    router = LocMoEPlus(8192, 8, capacity_factor=None)
    assert routed(router, hidden).metrics["capacity"].item() == 10


@pytest.mark.parametrize("signal", ["weights", "balance", "locality"])
def test_every_signal_reaches_the_token_states(signal):
    hidden = draw(24, 8).requires_grad_()
    routing = routed(LocMoEPlus(8, 4, top_k=2), hidden, batch=4)
    total = routing.weight.sum() if signal == "weights" else routing.losses[signal]
    total.backward()
    assert hidden.grad.abs().max() > 1e-4
    assert hidden.grad.isfinite().all()
