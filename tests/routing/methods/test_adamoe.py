from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.moe import MoELayer
from evomoe.routing import AdaMoE, RoutingInput, SparseRouting, TopK
from evomoe.routing.methods.adamoe import null_balance
from evomoe.routing.metrics import brief_metrics


def adamoe_for(logits: Tensor, experts: int, **options: object) -> tuple[AdaMoE, RoutingInput]:
    """A router of ``experts`` true experts whose gate returns ``logits (T, E + m)``."""
    tokens, columns = logits.shape
    router = AdaMoE(tokens, experts, num_null=columns - experts, **options)
    with torch.no_grad():
        router.gate.weight.copy_(logits.t())
    return router, RoutingInput(hidden=torch.eye(tokens), batch=1, sequence=tokens)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def equation_6(probabilities: Tensor, chosen: Tensor, experts: int) -> float:
    """The balance loss by its definition, from ``(T, E + m)`` and the chosen columns ``(T, K)``."""
    tokens, columns = probabilities.shape
    f = [(chosen == i).any(dim=1).sum().item() / tokens for i in range(columns)]
    averaged = sum(f[experts:]) / (columns - experts) if columns > experts else 0.0
    f = f[:experts] + [averaged] * (columns - experts)
    return columns * sum(f_i * p_i for f_i, p_i in zip(f, probabilities.double().mean(dim=0).tolist(), strict=True))


# Two true experts and two nulls; two choices a token: both true, one true, both null.
THREE_TOKENS = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.3, 0.2], [0.1, 0.1, 0.4, 0.4]])


def test_hand_typed_choice_weights_and_loss():
    router, inputs = adamoe_for(THREE_TOKENS.log(), 2, top_k=2)
    routing = router(inputs)
    torch.testing.assert_close(routing.to_dense(), torch.tensor([[4 / 7, 3 / 7], [0.0, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(routing.scores, THREE_TOKENS)
    # f = 1/3, 2/3 and, averaged over the nulls, (2/3 + 1/3) / 2; P = .2, .8/3, .9/3, .7/3.
    expected = 4 * (1 / 3 * 0.2 + 2 / 3 * 0.8 / 3 + 1 / 2 * 0.9 / 3 + 1 / 2 * 0.7 / 3)
    assert routing.losses["balance"].item() == pytest.approx(expected)
    assert routing.balance.load.tolist() == [1, 2, 2, 1]
    assert routing.metrics["null_share"].item() == pytest.approx(3 / 6)
    assert routing.metrics["all_null"].item() == pytest.approx(1 / 3)
    assert brief_metrics(routing).items() >= routing.metrics.items()
    assert routing.active_experts.item() == pytest.approx(1)
    assert routing.bypass is None


def test_option_1_divides_by_the_sum_over_all_choices():
    router, inputs = adamoe_for(THREE_TOKENS.log(), 2, top_k=2, renormalize="all")
    torch.testing.assert_close(router(inputs).to_dense(), torch.tensor([[4 / 7, 3 / 7], [0.0, 4 / 7], [0.0, 0.0]]))


def test_identities_add_their_weight_of_the_token():
    router, inputs = adamoe_for(THREE_TOKENS.log(), 2, top_k=2, renormalize="all", null_output="identity")
    routing = router(inputs)
    torch.testing.assert_close(routing.bypass, torch.diag(torch.tensor([0.0, 3 / 7, 1.0])))
    total = routing.to_dense().sum(dim=1) + routing.bypass.sum(dim=1)
    torch.testing.assert_close(total, torch.ones(3))
    padded = router(replace(inputs, valid=torch.tensor([True, True, False])))
    torch.testing.assert_close(padded.bypass, torch.diag(torch.tensor([0.0, 3 / 7, 0.0])))


@pytest.mark.parametrize("renormalize", ["experts", "all"])
@pytest.mark.parametrize(("experts", "nulls", "top_k"), [(4, 9, 4), (8, 8, 3), (3, 1, 4), (5, 0, 2)])
def test_against_a_loop_over_the_tokens(experts, nulls, top_k, renormalize):
    logits = 2 * draw(40, experts + nulls)
    valid = torch.arange(40) % 5 != 2
    router, inputs = adamoe_for(logits, experts, top_k=top_k, renormalize=renormalize)
    routing = router(replace(inputs, valid=valid))
    expected = torch.zeros(40, experts)
    all_null = taken = 0
    for t in range(40):
        if not valid[t]:
            continue
        ranked = sorted(range(experts + nulls), key=lambda column: -logits[t, column].item())[:top_k]
        true = [column for column in ranked if column < experts]
        taken += top_k - len(true)
        all_null += not true
        among = true if renormalize == "experts" else ranked
        for column in true:
            expected[t, column] = math.exp(logits[t, column]) / sum(math.exp(logits[t, other]) for other in among)
    torch.testing.assert_close(routing.to_dense(), expected)
    assert routing.metrics["null_share"].item() == pytest.approx(taken / (32 * top_k))
    assert routing.metrics["all_null"].item() == pytest.approx(all_null / 32)
    chosen = logits[valid].topk(top_k, dim=1).indices
    loss = equation_6(logits[valid].softmax(dim=1), chosen, experts)
    assert routing.losses["balance"].item() == pytest.approx(loss, rel=1e-5)


def test_without_nulls_it_is_renormalised_top_k_bit_for_bit():
    hidden = draw(200, 16)
    torch.manual_seed(0)
    router, peer = AdaMoE(16, 6, num_null=0, top_k=2), TopK(16, 6, top_k=2, renormalize=True)
    peer.load_state_dict(router.state_dict())
    routings: list[SparseRouting] = []
    for each in (router, peer):
        routing = each(RoutingInput(hidden=hidden, batch=1, sequence=200))
        (routing.weight * draw(400, seed=1)).sum().backward()
        routings.append(routing)
    ours, theirs = routings
    assert torch.equal(ours.token, theirs.token)
    assert torch.equal(ours.tokens_per_expert, theirs.tokens_per_expert)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.scores, theirs.scores)
    torch.testing.assert_close(router.gate.weight.grad, peer.gate.weight.grad, rtol=1e-5, atol=1e-6)
    # Equation 3, whose load is not divided by the choices per token
    assert ours.losses["balance"].item() == pytest.approx(2 * theirs.losses["balance"].item(), rel=1e-6)


# The loss


def test_the_loss_does_not_see_which_null_is_chosen():
    probabilities = draw(30, 7).softmax(dim=1)
    spread, heaped = torch.tensor([4, 6, 2, 5, 8, 1, 4]), torch.tensor([4, 6, 2, 18, 0, 0, 0])
    tokens = torch.tensor(30)
    values = [null_balance(probabilities, load, tokens, 3).loss().item() for load in (spread, heaped)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    switched = probabilities[:, [0, 1, 2, 6, 4, 3, 5]]
    assert null_balance(switched, spread, tokens, 3).loss().item() == pytest.approx(values[0], rel=1e-6)


def test_the_loss_is_the_choices_per_token_at_balance():
    load = torch.full((13,), 40)  # 130 tokens with 4 choices
    assert null_balance(torch.full((130, 13), 1 / 13), load, torch.tensor(130), 4).loss().item() == pytest.approx(4)


def test_prices_give_equation_6_for_the_load_of_two_batches():
    batches = [draw(20, 7, seed=seed) for seed in (1, 2)]
    parts = [router(inputs) for router, inputs in (adamoe_for(logits, 3, top_k=3) for logits in batches)]
    load = parts[0].balance.load + parts[1].balance.load
    spread = replace(parts[0].balance, load=load, tokens=torch.tensor(40)).loss().item()
    f = load.double() / 40
    f[3:] = f[3:].mean()
    expected = 7 * (f * batches[0].double().softmax(dim=1).mean(dim=0)).sum().item()
    assert spread == pytest.approx(expected, rel=1e-5)


def test_the_balance_loss_alone_teaches_the_nulls():
    def null_gradient(signal: str, renormalize: str) -> float:
        router, inputs = adamoe_for(draw(30, 9), 4, top_k=4, renormalize=renormalize)
        routing = router(inputs)
        total = routing.losses["balance"] if signal == "balance" else (routing.to_dense() * draw(30, 4, seed=1)).sum()
        (gradient,) = torch.autograd.grad(total, router.gate.weight)
        assert gradient[:4].abs().max() > 1e-4
        return float(gradient[4:].abs().max())

    assert null_gradient("weights", "experts") == 0
    assert null_gradient("weights", "all") > 0.01
    assert null_gradient("balance", "experts") > 1e-4


def test_a_strong_coefficient_leaves_the_share_of_true_experts_and_frees_each_token():
    """4 true experts among 13, 4 choices: 16 / 13 true experts a token on average."""
    hidden = draw(4096, 16)
    torch.manual_seed(0)
    router = AdaMoE(16, 4, num_null=9, top_k=4)
    inputs = RoutingInput(hidden=hidden, batch=1, sequence=4096)
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    before = router(inputs).active_experts.item()
    for _ in range(60):
        optimizer.zero_grad()
        router(inputs).losses["balance"].backward()
        optimizer.step()
    routing = router(inputs)
    assert abs(before - 16 / 13) > 0.05
    assert routing.active_experts.item() == pytest.approx(16 / 13, abs=0.03)
    assert routing.losses["balance"].item() == pytest.approx(4, abs=0.02)
    assert routing.metrics["null_share"].item() == pytest.approx(9 / 13, abs=0.01)
    per_token = torch.bincount(routing.token, minlength=4096)
    assert set(per_token.tolist()) >= {0, 1, 2, 3}


# Tokens of nulls


def test_a_token_whose_choices_are_null_gets_exactly_zero():
    torch.manual_seed(0)
    layer = MoELayer(8, 16, 2, partial(AdaMoE, num_null=3, top_k=2), init_std=0.3)
    with torch.no_grad():
        layer.experts.b_out[0].fill_(1.0)
        layer.router.gate.weight.zero_()
        layer.router.gate.weight[2:, 0] = 1.0  # the nulls are the choice of tokens whose first feature is large
    hidden = torch.zeros(1, 4, 8)
    hidden[0, :, 1] = 1.0
    hidden[0, 2, 0] = 1e4  # every true probability underflows
    hidden[0, 1, 0] = -1.0
    hidden.requires_grad_()
    output, routing = layer(hidden)
    assert torch.equal(output[0, 2], torch.zeros(8))
    assert output[0, 1].abs().min() > 0
    assert routing.to_dense()[1].sum().item() == pytest.approx(1)
    (output.sum() + routing.losses["balance"]).backward()
    for gradient in (hidden.grad, layer.router.gate.weight.grad):
        assert gradient.isfinite().all()


def test_very_likely_nulls_leave_the_weights_of_the_others_alone():
    router, inputs = adamoe_for(torch.tensor([[1.0, 0.0, 300.0, -5.0], [1.0, 0.0, 0.5, -5.0]]), 2, top_k=3)
    first, second = router(inputs).to_dense()
    torch.testing.assert_close(first, torch.tensor([1.0, 0.0]).softmax(dim=0))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_null": -1}, "router num_null=-1: expected 0 or more"),
        ({"num_null": 2, "top_k": 7}, "router top_k=7: expected 1 to 6, the number of experts"),
        ({"top_k": 1}, "router top_k=1 gives the only choice weight 1 and the gate no gradient: expected 2 or more"),
        ({"renormalize": True}, "router renormalize=True is unknown: expected experts or all"),
        ({"null_output": "copy"}, "router null_output='copy' is unknown: expected zero or identity"),
        (
            {"null_output": "identity"},
            "router null_output=identity with renormalize=experts gives it no weight: set renormalize=all",
        ),
    ],
)
def test_errors_name_the_value_and_the_remedy(options, message):
    with pytest.raises(ConfigError) as error:
        AdaMoE(8, 4, **options)
    assert str(error.value) == message
