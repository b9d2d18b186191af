from __future__ import annotations

import math

import pytest
import torch

from evomoe.errors import ConfigError
from evomoe.routing import RoutingInput, Switch

PROBABILITIES = torch.tensor(
    [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.2, 0.2, 0.6], [0.8, 0.1, 0.1]]
)  # (T, E): tokens 0, 1, 2 and 4 prefer expert 0, token 3 prefers expert 2


def switch_for(logits: torch.Tensor, **options: object) -> tuple[Switch, RoutingInput]:
    tokens, experts = logits.shape
    switch = Switch(tokens, experts, **options)
    with torch.no_grad():
        switch.gate.weight.copy_(logits.t())
    return switch, RoutingInput(hidden=torch.eye(tokens), batch=1, sequence=tokens)


def test_five_tokens_with_capacity():
    switch, inputs = switch_for(PROBABILITIES.log(), capacity_factor=1.2, jitter=0.0)
    routing = switch(inputs)
    # ceil(5 / 3 * 1.2) = 2 places: tokens 0 and 1 fill expert 0, tokens 2 and 4 find it full.
    assert routing.token.tolist() == [0, 1, 3]
    assert routing.expert.tolist() == [0, 0, 2]
    assert routing.weight.tolist() == pytest.approx([0.7, 0.6, 0.6])
    assert routing.tokens_per_expert.tolist() == [2, 0, 1]
    assert routing.dropped.item() == 2
    # Load before dropping (.8, 0, .2), mean probability (.56, .18, .26): 3 * (.8 * .56 + .2 * .26) = 1.5.
    assert routing.losses["balance"].item() == pytest.approx(1.5)
    assert routing.losses["z"].item() == pytest.approx(0, abs=1e-12)  # logits are log-probabilities


def test_padding_takes_no_place():
    switch, inputs = switch_for(PROBABILITIES.log(), capacity_factor=1.0, jitter=0.0)
    valid = torch.tensor([False, True, True, True, True])
    routing = switch(RoutingInput(hidden=inputs.hidden, batch=1, sequence=5, valid=valid))
    # ceil(4 / 3) = 2 places
    assert routing.token.tolist() == [1, 2, 3]
    assert routing.dropped.item() == 1
    assert routing.num_tokens.item() == 4


def test_capacity_of_evaluation_is_its_own():
    switch, inputs = switch_for(PROBABILITIES.log(), capacity_factor=1.2)
    assert switch.eval()(inputs).dropped.item() == 0
    bounded, inputs = switch_for(PROBABILITIES.log(), capacity_factor=None, eval_capacity_factor=0.6)
    assert bounded(inputs).dropped.item() == 0
    assert bounded.eval()(inputs).tokens_per_expert.tolist() == [1, 0, 1]


def test_a_factor_of_the_number_of_experts_drops_nothing():
    switch, inputs = switch_for(torch.tensor([[5.0, 0.0, 0.0]]).repeat(7, 1), capacity_factor=3.0)
    assert switch(inputs).tokens_per_expert.tolist() == [7, 0, 0]


def test_the_balance_loss_has_no_lower_bound_of_1():
    probabilities = torch.tensor([[0.34, 0.33, 0.33], [0.34, 0.33, 0.33], [0.0001, 0.5099, 0.49]])
    switch, inputs = switch_for(probabilities.log())
    # f = (2/3, 1/3, 0), P = (.22670, .38997, .38333): 3 * (2/3 * .22670 + 1/3 * .38997)
    assert switch.eval()(inputs).losses["balance"].item() == pytest.approx(0.84337, abs=1e-4)


@pytest.mark.parametrize("experts", [2, 8])
def test_losses_of_zero_logits(experts):
    switch, inputs = switch_for(torch.zeros(6, experts))
    losses = switch.eval()(inputs).losses
    assert losses["balance"].item() == pytest.approx(1)
    assert losses["z"].item() == pytest.approx(math.log(experts) ** 2)


def test_gradient_of_the_z_loss_is_twice_the_log_partition_times_the_probabilities():
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    switch, inputs = switch_for(logits)
    (gradient,) = torch.autograd.grad(switch.eval()(inputs).losses["z"], switch.gate.weight)
    expected = 2 * logits.logsumexp(dim=1, keepdim=True) * torch.softmax(logits, dim=1) / 6
    torch.testing.assert_close(gradient.t(), expected)


def test_gradient_of_the_balance_loss_flows_through_the_probabilities_alone():
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    switch, inputs = switch_for(logits)
    (gradient,) = torch.autograd.grad(switch.eval()(inputs).losses["balance"], switch.gate.weight)
    leaf = logits.clone().requires_grad_()
    load = torch.bincount(logits.argmax(dim=1), minlength=3) / 6
    (expected,) = torch.autograd.grad(3 * (load * torch.softmax(leaf, dim=1).mean(dim=0)).sum(), leaf)
    torch.testing.assert_close(gradient.t(), expected)


def test_jitter_moves_the_logits_within_its_bounds_in_training_only():
    logits = torch.full((200, 2), 4.0)
    switch, inputs = switch_for(logits, jitter=0.1, capacity_factor=None)
    torch.manual_seed(0)
    root = switch(inputs).losses["z"].sqrt().item()
    assert 4 * 0.9 < root - math.log(2) < 4 * 1.1
    # The states are one-hot, so a token's logits are 4 u with one draw u; their softmax stays (.5, .5).
    unequal, inputs = switch_for(torch.tensor([[4.0, 0.0]]).repeat(2000, 1), jitter=0.1, capacity_factor=None)
    draws = torch.logit(unequal(inputs).scores[:, 0].double()).detach() / 4
    assert 0.899 < draws.min() < 0.902
    assert 1.098 < draws.max() < 1.101
    assert draws.mean().item() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(unequal.eval()(inputs).scores[0], torch.softmax(torch.tensor([4.0, 0.0]), dim=0))


def test_against_transformers():
    """Expert, weight, capacity and both losses, on one sequence (transformers counts a capacity per sequence)."""
    peer = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    from transformers import SwitchTransformersConfig

    tokens, width, experts, places = 24, 16, 4, 7
    config = SwitchTransformersConfig(d_model=width, num_experts=experts, expert_capacity=places)
    router = peer.SwitchTransformersTop1Router(config).eval()
    switch = Switch(width, experts, capacity_factor=1.0, eval_capacity_factor=places * experts / tokens).eval()
    hidden = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    hidden[: tokens // 2] += 1.5 * router.classifier.weight[0].detach() / router.classifier.weight[0].norm() ** 2
    with torch.no_grad():
        switch.gate.weight.copy_(router.classifier.weight)
        # Their router may multiply its argument in place, so it gets a copy.
        one_hot, top, logits = router(hidden.clone()[None])
    routing = switch(RoutingInput(hidden=hidden, batch=1, sequence=tokens))

    assert routing.dropped.item() == tokens - int(one_hot.sum()) > 0
    torch.testing.assert_close(routing.to_dense().detach(), (one_hot * top)[0])
    balance = peer.load_balancing_loss_func(torch.softmax(logits, dim=-1), logits.argmax(dim=-1))
    torch.testing.assert_close(routing.losses["balance"].detach(), balance)
    torch.testing.assert_close(routing.losses["z"].detach(), peer.router_z_loss_func(logits))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"capacity_factor": 0.0},
            "router capacity_factor=0.0: expected a finite factor above 0, or null for dropless routing",
        ),
        (
            {"eval_capacity_factor": -2.0},
            "router eval_capacity_factor=-2.0: expected a finite factor above 0, or null for dropless routing",
        ),
        ({"jitter": 1.0}, "router jitter=1.0: expected a value in [0, 1), the published one is 0.01"),
    ],
)
def test_errors_name_the_value_and_the_remedy(options, message):
    with pytest.raises(ConfigError) as error:
        Switch(8, 4, **options)
    assert str(error.value) == message
