from __future__ import annotations

import pytest
import torch

from evomoe.errors import ConfigError
from evomoe.routing import RoutingInput, Switch, TopK


def topk_for(logits: torch.Tensor, **options: object) -> tuple[TopK, RoutingInput]:
    tokens, experts = logits.shape
    router = TopK(tokens, experts, **options)
    with torch.no_grad():
        router.gate.weight.copy_(logits.t())
    return router, RoutingInput(hidden=torch.eye(tokens), batch=1, sequence=tokens)


def kept(routing) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in routing.to_dense()]


def test_hand_typed_top_2():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])
    router, inputs = topk_for(probabilities.log())
    routing = router(inputs)
    assert routing.token.tolist() == [0, 0, 1, 1]
    assert routing.expert.tolist() == [0, 1, 1, 2]
    assert routing.weight.tolist() == pytest.approx([5 / 8, 3 / 8, 1 / 3, 2 / 3])
    # Load over two choices (1/4, 1/2, 1/4), mean probability (.3, .3, .4): 3 * .325
    assert routing.losses["balance"].item() == pytest.approx(0.975)
    raw, inputs = topk_for(probabilities.log(), renormalize=False)
    assert raw(inputs).weight.tolist() == pytest.approx([0.5, 0.3, 0.3, 0.6])


def test_gradient_of_renormalized_weights_is_that_of_a_softmax_over_the_chosen_logits():
    logits = torch.tensor([[2.0, 0.5, 1.0], [-1.0, 0.0, 0.5]])
    router, inputs = topk_for(logits)
    direction = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.7, -1.0]])
    (gradient,) = torch.autograd.grad((router(inputs).to_dense() * direction).sum(), router.gate.weight)
    leaf = logits.clone().requires_grad_()
    chosen = leaf.masked_fill(torch.tensor([[False, True, False], [True, False, False]]), -torch.inf)
    (expected,) = torch.autograd.grad((torch.softmax(chosen, dim=1) * direction).sum(), leaf)
    torch.testing.assert_close(gradient.t(), expected)


def test_gshard_priority_lets_a_later_token_evict_a_second_choice():
    first = [0.6, 0.3, 0.1]
    for second, by_choice in (([0.1, 0.2, 0.7], [0, 1]), ([0.1, 0.7, 0.2], [0])):
        logits = torch.tensor([first, second]).log()
        # ceil(2 tokens * 2 choices / 3 experts * 0.75) = 1 place
        router, inputs = topk_for(logits, capacity_factor=0.75, priority="choice")
        assert kept(router(inputs))[0] == by_choice
        causal, inputs = topk_for(logits, capacity_factor=0.75, priority="token")
        assert kept(causal(inputs))[0] == [0, 1]


def test_weights_are_not_renormalized_again_after_dropping():
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.7, 0.2]]).log()
    router, inputs = topk_for(logits, capacity_factor=0.75, priority="choice")
    routing = router(inputs)
    assert kept(routing) == [[0], [1, 2]]
    assert routing.to_dense().sum(dim=1).tolist() == pytest.approx([2 / 3, 1])
    assert routing.dropped.item() == 1


def test_causality_declared_by_mode():
    assert TopK(8, 4, priority="choice").causal_in_train
    bounded = TopK(8, 4, priority="choice", capacity_factor=1.0)
    assert (bounded.causal_in_train, bounded.causal_in_eval) == (False, True)
    both = TopK(8, 4, priority="choice", capacity_factor=1.0, eval_capacity_factor=2.0)
    assert (both.causal_in_train, both.causal_in_eval) == (False, False)


def test_one_choice_without_renormalization_is_switch():
    torch.manual_seed(0)
    switch, router = Switch(16, 4, jitter=0.0), TopK(16, 4, top_k=1, renormalize=False, capacity_factor=1.25)
    router.load_state_dict(switch.state_dict())
    inputs = RoutingInput(hidden=torch.randn(40, 16), batch=1, sequence=40)
    assert torch.equal(router(inputs).to_dense(), switch(inputs).to_dense())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_against_mixtral_of_transformers(top_k):
    """Experts, weights and the balance loss, whose load theirs does not divide by K."""
    peer = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    tokens, width, experts = 30, 16, 6
    config = MixtralConfig(hidden_size=width, num_local_experts=experts, num_experts_per_tok=top_k)
    mixtral = peer.MixtralTopKRouter(config)
    router = TopK(width, experts, top_k=top_k, renormalize=top_k > 1)
    with torch.no_grad():
        mixtral.weight.copy_(router.gate.weight)
    hidden = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(tokens) % 4 != 0
    logits, weight, expert = mixtral(hidden)
    routing = router(RoutingInput(hidden=hidden, batch=1, sequence=tokens))
    if top_k == 1:  # Mixtral renormalises one choice to 1
        assert torch.equal(routing.to_dense() > 0, torch.zeros(tokens, experts).scatter(1, expert, weight) > 0)
    else:
        torch.testing.assert_close(routing.to_dense(), torch.zeros(tokens, experts).scatter(1, expert, weight))
    balance = peer.load_balancing_loss_func((logits,), experts, top_k)
    torch.testing.assert_close(routing.losses["balance"] * top_k, balance)
    masked = router(RoutingInput(hidden=hidden, batch=1, sequence=tokens, valid=valid)).losses["balance"]
    torch.testing.assert_close(
        masked * top_k, peer.load_balancing_loss_func((logits,), experts, top_k, valid.long()[None])
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "router top_k=0: expected 1 to 4, the number of experts"),
        ({"top_k": 5}, "router top_k=5: expected 1 to 4, the number of experts"),
        ({"priority": "score"}, "router priority='score' is unknown: expected one of token, choice, best"),
        ({"top_k": 1}, "router renormalize=true with top_k=1 leaves the gate without gradient: set renormalize=false"),
        ({"jitter": -0.1}, "router jitter=-0.1: expected a value in [0, 1), the published one is 0.01"),
    ],
)
def test_errors_name_the_value_and_the_remedy(options, message):
    with pytest.raises(ConfigError) as error:
        TopK(8, 4, **options)
    assert str(error.value) == message


def test_batch_priority_goes_by_the_probability_and_not_by_its_renormalised_share():
    probabilities = torch.tensor([[0.50, 0.45, 0.05], [0.05, 0.15, 0.80], [0.45, 0.28, 0.27]])
    options = {"top_k": 2, "capacity_factor": 0.5, "priority": "best"}  # one place each
    router, inputs = topk_for(probabilities.log(), **options)
    kept = router.train()(inputs).to_dense()
    assert kept[0, 0] > 0  # of the shares 0.526 and 0.616 the second is larger
    assert kept[2, 0] == 0


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_choice_is_that_of_the_logits_where_probabilities_underflow(scale):
    logits = scale * torch.tensor([[9.0, 0.1, 0.2, 8.0, 0.3, 0.4, 0.5, 0.6]])
    router, inputs = topk_for(logits, top_k=3)
    assert sorted(router(inputs).expert.tolist()) == [0, 3, 7]
