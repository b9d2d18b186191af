from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evomoe.routing import LocMoE, RoutingInput, Switch
from evomoe.routing.locality import grouped_average_pooling


def states(means: list[list[float]]) -> Tensor:
    """Token states with these means over blocks of two features, which differ from the mean by one."""
    return torch.tensor(means).repeat_interleave(2, dim=1) + torch.tensor([1.0, -1.0]).repeat(len(means[0]))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MEANS = [[2.0, -1.0, 0.0, 1.0], [-1.0, 0.5, -2.0, 0.0], [0.0, 0.0, 0.0, 3.0], [-3.0, -2.0, -1.0, -2.0]]


def test_hand_typed_choice_and_weights():
    router = LocMoE(8, 4)
    routing = router(RoutingInput(hidden=states(MEANS), batch=2, sequence=2))
    cut = torch.tensor(MEANS).clamp(min=0).softmax(dim=1)
    expected = torch.zeros(4, 4)
    # The last token's scores are all cut to 0: the tie goes to the one that was largest before.
    for token, expert in ((0, 0), (1, 1), (2, 3), (3, 2)):
        expected[token, expert] = cut[token, expert]
    assert expected[3, 2] == 0.25
    torch.testing.assert_close(routing.to_dense(), expected)
    assert routing.losses["balance"].item() == pytest.approx(1), "one token each"
    # Tokens 0 and 1 lie on node 0 with experts 0 and 1, tokens 2 and 3 on node 1 with experts 2 and 3.
    assert routing.metrics["off_node"].item() == 0
    one_sequence = router(RoutingInput(hidden=states(MEANS), batch=1, sequence=4))
    assert one_sequence.metrics["off_node"].item() == 0.5


def test_without_relu_it_is_switch_with_a_fixed_gate():
    hidden = draw(40, 8)
    switch = Switch(8, 4, jitter=0.0, capacity_factor=1.0)
    with torch.no_grad():
        switch.gate.weight.copy_(torch.eye(4).repeat_interleave(2, dim=1) / 2)
    inputs = RoutingInput(hidden=hidden, batch=4, sequence=10, valid=torch.arange(40) % 7 != 3)
    ours, theirs = LocMoE(8, 4, relu=False, capacity_factor=1.0)(inputs), switch(inputs)
    assert int(theirs.dropped) > 0
    assert torch.equal(ours.dropped, theirs.dropped)
    torch.testing.assert_close(ours.to_dense(), theirs.to_dense())
    torch.testing.assert_close(ours.losses["balance"], theirs.losses["balance"])


def test_the_relu_changes_weights_and_not_the_choice():
    inputs = RoutingInput(hidden=draw(40, 8), batch=4, sequence=10)
    cut, plain = LocMoE(8, 4)(inputs), LocMoE(8, 4, relu=False)(inputs)
    assert torch.equal(cut.token, plain.token)
    assert torch.equal(cut.tokens_per_expert, plain.tokens_per_expert)
    assert (cut.weight < plain.weight).any()
    torch.testing.assert_close(cut.scores, grouped_average_pooling(inputs.hidden, 4).relu().softmax(dim=1))


@pytest.mark.parametrize("signal", ["weights", "balance", "locality"])
def test_every_signal_reaches_the_token_states(signal):
    hidden = draw(24, 8).requires_grad_()
    routing = LocMoE(8, 4)(RoutingInput(hidden=hidden, batch=4, sequence=6))
    total = routing.weight.sum() if signal == "weights" else routing.losses[signal]
    total.backward()
    assert hidden.grad.abs().max() > 1e-4
    assert hidden.grad.isfinite().all()


def test_locality_loss_pulls_tokens_home():
    """A layer below the router learns to keep the tokens of two nodes, which differ in their features, on them."""
    kinds = draw(2, 16, seed=1)
    hidden = (
        draw(8, 16, 16) + kinds.repeat_interleave(4, dim=0)[:, None]
    )  # sequences 0 to 3 on node 0, 4 to 7 on node 1
    torch.manual_seed(0)
    below, router = torch.nn.Linear(16, 16), LocMoE(16, 4)
    optimizer = torch.optim.Adam(below.parameters(), lr=0.03)
    off_node, balance = [], []
    for _ in range(60):
        routing = router(RoutingInput(hidden=below(hidden).flatten(0, 1), batch=8, sequence=16))
        off_node.append(routing.metrics["off_node"].item())
        balance.append(routing.losses["balance"].item())
        optimizer.zero_grad()
        (routing.losses["locality"] + routing.losses["balance"]).backward()
        optimizer.step()
    assert off_node[0] > 0.3
    assert off_node[-1] < 0.05
    assert balance[-1] < 1.2


def test_a_full_expert_serves_earlier_tokens_and_evaluation_has_its_own_capacity():
    hidden = states([[1.0, 0.0, 0.0, 0.0]] * 3 + [[0.0, 1.0, 0.0, 0.0]])
    router = LocMoE(8, 4, capacity_factor=2.0)
    inputs = RoutingInput(hidden=hidden, batch=1, sequence=4)
    routing = router(inputs)
    assert routing.token.tolist() == [0, 1, 3]
    assert routing.load.tolist() == [3, 1, 0, 0]
    assert int(routing.dropped) == 1
    assert router.eval()(inputs).token.tolist() == [0, 1, 2, 3]
