from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.flops import flop_counter
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.models.gpt import GPT
from evomoe.moe import MoELayer
from evomoe.routing import MoEPlusPlus, RoutingInput, TopK

E, D = 4, 16


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(experts: int = E, **options: Any) -> MoEPlusPlus:
    torch.manual_seed(0)
    return MoEPlusPlus(D, experts, **options)


def with_logits(logits: Tensor, experts: int, **options: Any) -> tuple[MoEPlusPlus, RoutingInput]:
    """A router of ``experts`` true experts whose gate returns ``logits (T, E + m)``; the tokens are unit vectors."""
    tokens = logits.shape[0]
    router = MoEPlusPlus(tokens, experts, **options)
    with torch.no_grad():
        router.gate.weight.copy_(logits.t())
    return router, RoutingInput(hidden=torch.eye(tokens), batch=1, sequence=tokens)


def test_the_choice_is_that_of_the_logits_where_probabilities_underflow():
    router, inputs = with_logits(torch.tensor([[1000.0, 10.0, 800.0, 20.0, 30.0]]), 2)
    assert router(inputs).metrics["null_share"] == 0.5  # the first expert and the zero
    router, inputs = with_logits(torch.tensor([[1000.0, 800.0, 10.0, 20.0, 30.0]]), 2)
    assert router(inputs).metrics["null_share"] == 0


# One true expert, then zero, copy and constant.
FOUR_TOKENS = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.2, 0.3]])


def test_hand_typed_contributions():
    router, inputs = with_logits(FOUR_TOKENS.log(), 1)
    with torch.no_grad():
        router.constant_gate.copy_(torch.tensor([[0.0, 0.0, math.log(3.0), 0.0], [0.0, 0.0, 0.0, 0.0]]))
        router.constants.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    routing = router(inputs)
    assert routing.to_dense().tolist() == [[pytest.approx(0.4)], [0], [0], [pytest.approx(0.4)]]
    vector = router.constants[0]
    expected = torch.stack(
        [
            torch.zeros(4),  # true and zero expert
            0.3 * inputs.hidden[1],  # zero and copy
            0.3 * inputs.hidden[2] + 0.4 * (0.75 * inputs.hidden[2] + 0.25 * vector),  # copy and constant
            0.3 * (0.5 * inputs.hidden[3] + 0.5 * vector),  # true and constant
        ]
    )
    torch.testing.assert_close(routing.bypass, expected)
    assert torch.equal(routing.bypass[0], torch.zeros(4))
    assert routing.metrics["null_share"].item() == pytest.approx(6 / 8)
    assert routing.balance.load.tolist() == [2, 2, 2, 2]
    # f = 1/2 each; P = .25 each: 4 / 2 * (1 + 3 * .75) / 2 * .25
    assert routing.losses["balance"].item() == pytest.approx(0.25 * (1 + 3 * 0.75))


@pytest.mark.parametrize("padding", [False, True])
def test_the_layer_against_a_loop_over_the_tokens(padding):
    torch.manual_seed(0)
    factory = partial(MoEPlusPlus, num_zero=2, num_copy=1, num_constant=2, top_k=3)
    layer = MoELayer(D, 24, E, factory, init_std=0.3)
    router: Any = layer.router
    hidden, previous = draw(3, 10, D), draw(30, E + 5, seed=1)
    valid = torch.rand(3, 10, generator=torch.Generator().manual_seed(2)) < 0.7 if padding else None
    output, routing = layer(hidden, previous_logits=previous, valid=valid)
    output = output.flatten(0, 1)

    chosen_experts = set()
    for t, x in enumerate(hidden.flatten(0, 1)):
        if valid is not None and not valid.flatten()[t]:
            assert torch.equal(output[t], torch.zeros(D))
            continue
        p = (router.gate.weight @ x + router.residual @ previous[t]).softmax(dim=0)
        expected = torch.zeros(D)
        for column in sorted(range(E + 5), key=lambda c, p=p: -p[c].item())[:3]:
            chosen_experts.add(column)
            if column < E:
                w = layer.experts.expert_parameters(column)
                result = w["w_out"] @ F.gelu(w["w_in"] @ x + w["b_in"]) + w["b_out"]
            elif column < E + 2:
                result = torch.zeros(D)
            elif column == E + 2:
                result = x
            else:
                n = column - E - 3
                a1, a2 = (router.constant_gate[2 * n : 2 * n + 2] @ x).softmax(dim=0)
                result = a1 * x + a2 * router.constants[n]
            expected = expected + p[column] * result
        torch.testing.assert_close(output[t], expected, atol=1e-5, rtol=1e-4)
    assert chosen_experts == set(range(E + 5))
    torch.testing.assert_close(
        routing.logits, hidden.flatten(0, 1) @ router.gate.weight.t() + previous @ router.residual.t()
    )


@pytest.mark.parametrize(("experts", "constants"), [(1, 1), (4, 1), (8, 1), (16, 2), (32, 6)])
def test_published_number_of_constant_experts(experts, constants):
    router = build(experts)
    assert router.num_constant == constants
    columns = experts + 2 + constants
    assert router.gate.weight.shape == (columns, D)
    assert sum(parameter.numel() for parameter in router.parameters()) == columns * (D + columns) + constants * 3 * D


@pytest.mark.parametrize("previous", [False, True])
def test_flops_are_those_of_its_matrix_products(previous):
    router = build(num_constant=3)
    inputs = RoutingInput(
        hidden=draw(10, D), batch=1, sequence=10, previous_logits=draw(10, E + 5) if previous else None
    )
    with flop_counter() as counter:
        router(inputs)
    residual = 0 if previous else 2 * (E + 5) ** 2
    assert counter.get_total_flops() == 10 * (router.flops_per_token() - residual)


# The loss


def test_with_tau_1_the_loss_is_that_of_top_k_over_all_experts():
    router, peer = build(tau=1.0), TopK(D, E + 3, top_k=2, renormalize=False)
    peer.gate.load_state_dict(router.gate.state_dict())
    inputs = RoutingInput(hidden=draw(50, D), batch=1, sequence=50)
    torch.testing.assert_close(router(inputs).losses["balance"], peer(inputs).losses["balance"])


def test_a_smaller_tau_makes_tokens_choose_cheap_experts():
    shares = []
    for tau in (1.0, 0.75, 0.25):
        router, inputs = build(tau=tau), RoutingInput(hidden=draw(512, D), batch=1, sequence=512)
        optimizer = torch.optim.SGD([router.gate.weight], lr=1.0)
        for _ in range(60):
            optimizer.zero_grad()
            router(inputs).losses["balance"].backward()
            optimizer.step()
        shares.append(router(inputs).metrics["null_share"].item())
    assert shares[0] == pytest.approx(3 / 7, abs=0.02)
    assert shares[0] < shares[1] < shares[2]


# Capacity


def test_heterogeneous_capacity_by_hand():
    """Two true experts, a zero and a copy expert; ten tokens with two choices each, and gamma tau = 0.5."""
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 6 + [[1.0, 2.0, 3.0, 4.0]] * 4)
    options = {"num_constant": 0, "tau": 0.5, "capacity_factor": 1.0}
    router, inputs = with_logits(logits, 2, **options)
    routing = router(inputs)
    # 1.0 * 2 * 10 / (0.5 * 2 + 2) = 6.67: ceil(3.33) = 4 places at a true expert, 7 at the others.
    assert routing.token.tolist() == [0, 1, 2, 3] * 2
    assert routing.load.tolist() == [6, 6]
    assert int(routing.dropped) == 4
    assert routing.balance.load.tolist() == [6, 6, 4, 4]
    p = logits[9].softmax(dim=0)
    torch.testing.assert_close(routing.bypass[9], p[3] * torch.eye(10)[9])
    tight, _ = with_logits(logits, 2, **options | {"capacity_factor": 0.3})
    # 2 places, which tokens 6 and 7 take, at the copy expert as at the zero expert
    assert tight(inputs).bypass.abs().sum(dim=1).nonzero().flatten().tolist() == [6, 7]
    assert router.eval()(inputs).token.numel() == 12


# The gating residual


def gpt(**options: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(50, 16, 32, 4, 2, num_experts=4, moe_every=2, router=MoEPlusPlus, dropout=0.0, **options)


TOKENS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))


def test_the_second_layer_hears_the_first_and_teaches_it():
    model = gpt()
    first, second = (layer.router for layer in model.moe_layers.values())
    seen: list[Tensor] = []
    second.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    _, (routing_1, routing_2) = model(TOKENS)
    (inputs,) = seen
    assert inputs.previous_logits is routing_1.logits
    expected = second.gate(inputs.hidden) + routing_1.logits @ second.residual.t()
    torch.testing.assert_close(routing_2.logits, expected)

    alone = second(replace(inputs, hidden=inputs.hidden.detach())).logits
    (gradient,) = torch.autograd.grad(alone.square().sum(), routing_1.logits, retain_graph=True)
    torch.testing.assert_close(gradient, 2 * alone @ second.residual)
    routing_2.losses["balance"].backward()
    assert first.residual.grad is None
    assert second.residual.grad.abs().max() > 0
    assert first.gate.weight.grad.abs().max() > 0


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for checkpoint in (False, True):
        model = gpt(checkpoint_activations=checkpoint)
        logits, routings = model(TOKENS)
        (logits.square().mean() + sum(routing.losses["balance"] for routing in routings)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_young_layers_pass_no_logits_on():
    model = gpt()
    layers = list(model.moe_layers.values())
    for layer in layers:
        layer.live_experts = 1
    assert [routing.logits for routing in model(TOKENS)[1]] == [None, None]
    layers[1].live_experts = 4
    _, (young, grown) = model(TOKENS)
    assert young.logits is None
    assert grown.logits.shape == (36, 7)
    grown.losses["balance"].backward()
    assert layers[1].router.residual.grad is None


def test_padding_changes_nothing_through_the_residual():
    router = build()
    valid = torch.arange(20) % 3 != 0
    inputs = RoutingInput(
        hidden=draw(20, D), batch=1, sequence=20, valid=valid, previous_logits=draw(20, E + 3, seed=1)
    )
    other = torch.where(valid[:, None], inputs.previous_logits, 50 * draw(20, E + 3, seed=2))
    routing, changed = router(inputs), router(replace(inputs, previous_logits=other))
    torch.testing.assert_close(routing.to_dense(), changed.to_dense())
    torch.testing.assert_close(routing.bypass, changed.bypass)
    torch.testing.assert_close(routing.losses["balance"], changed.losses["balance"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_zero": -1}, "router num_zero=-1: expected 0 or more"),
        ({"num_constant": -2}, "router num_constant=-2: expected 0 or more"),
        ({"tau": 0.0}, "router tau=0.0: expected a share in (0, 1], the published value is 0.75"),
        ({"top_k": 8}, "router top_k=8: expected 1 to 7, the number of experts"),
        (
            {"eval_capacity_factor": -1.0},
            "router eval_capacity_factor=-1.0: expected a finite factor above 0, or null for dropless routing",
        ),
    ],
)
def test_errors_name_the_value_and_the_remedy(options, message):
    with pytest.raises(ConfigError) as error:
        build(**options)
    assert str(error.value) == message


def test_no_expert_without_computation_is_top_k():
    router, peer = build(num_zero=0, num_copy=0, num_constant=0), TopK(D, E, top_k=2, renormalize=False)
    peer.gate.load_state_dict(router.gate.state_dict())
    inputs = RoutingInput(hidden=draw(50, D), batch=1, sequence=50)
    ours, theirs = router(inputs), peer(inputs)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.bypass, torch.zeros(50, D))
    torch.testing.assert_close(ours.losses["balance"], theirs.losses["balance"])
