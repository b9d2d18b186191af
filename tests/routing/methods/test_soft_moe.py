"""Soft MoE against its definition in loops, and against another package.

Shapes: B batch, S sequence, T = B * S tokens, D model width, H expert hidden width, E experts, C slots per expert.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.models.gpt import GPT
from evomoe.moe import MoELayer
from evomoe.moe.spawn import Spawn, spawn_experts
from evomoe.routing import RoutingInput, SoftMoE
from evomoe.routing.metrics import brief_metrics

B, S, D, H, E, C = 2, 5, 8, 12, 3, 2
VALID = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(slots: int = C, experts: int = E) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(D, H, experts, functools.partial(SoftMoE, slots=slots), init_std=0.5)
    with torch.no_grad():
        layer.router.scale.fill_(3.0)
        for name, parameter in layer.experts.named_parameters():
            if name.startswith("b_"):
                parameter.normal_()
    return layer


def feed_forward(layer: MoELayer, expert: int, row: Tensor) -> Tensor:
    weights = layer.experts.expert_parameters(expert)
    return weights["w_out"] @ F.gelu(weights["w_in"] @ row + weights["b_in"]) + weights["b_out"]


def by_definition(layer: MoELayer, tokens: Tensor) -> Tensor:
    """One sequence ``(S, D)``, slot by slot and token by token."""

    def unit(vector: Tensor) -> Tensor:
        return vector / (vector.dot(vector) + 1e-6).sqrt()

    router = layer.router
    logits = [[float(router.scale * unit(token).dot(unit(slot))) for slot in router.slots] for token in tokens]
    outputs = []
    for number in range(len(router.slots)):
        of_tokens = [math.exp(row[number]) for row in logits]
        slot = sum(share / sum(of_tokens) * token for share, token in zip(of_tokens, tokens, strict=True))
        outputs.append(feed_forward(layer, number // router.slots_per_expert, slot))
    mixed = []
    for row in logits:
        of_slots = [math.exp(logit) for logit in row]
        mixed.append(sum(share / sum(of_slots) * output for share, output in zip(of_slots, outputs, strict=True)))
    return torch.stack(mixed)


@pytest.mark.parametrize("slots", [1, 2, 3])
@torch.no_grad()
def test_layer_is_its_definition(slots):
    layer, hidden = make(slots), draw(B, S, D)
    expected = torch.stack([by_definition(layer, tokens) for tokens in hidden])
    torch.testing.assert_close(layer(hidden)[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_is_as_if_it_were_not_there():
    layer, hidden = make(), draw(B, S, D)
    output, routing = layer(hidden, valid=VALID)
    torch.testing.assert_close(output[:1], layer(hidden[:1])[0])
    torch.testing.assert_close(output[1:, :3], layer(hidden[1:, :3])[0])
    assert torch.equal(output[1, 3:], torch.zeros(2, D))
    assert routing.num_tokens.item() == 8
    assert routing.rows == B * E * C
    assert routing.active_experts.item() == pytest.approx(B * E * C / 8)


def test_another_package_agrees():
    package = pytest.importorskip("soft_moe_pytorch")
    layer = make().double()
    peer = package.SoftMoE(D, num_experts=E, num_slots=C, expert_mult=H / D).double()
    with torch.no_grad():
        peer.norm.gamma.fill_(1.0)
        peer.slot_norm.gamma.copy_(layer.router.scale / D)  # both sides have norm sqrt(D) there
        peer.slot_embeds.copy_(layer.router.slots.view(E, C, D))
        for e, expert in enumerate(peer.experts.experts):
            weights = layer.experts.expert_parameters(e)
            for linear, side in ((expert[0], "in"), (expert[-1], "out")):
                linear.weight.copy_(weights[f"w_{side}"])
                linear.bias.copy_(weights[f"b_{side}"])
    # It mixes normalised tokens, so give it tokens that are.
    hidden = D**0.5 * F.normalize(draw(B, S, D).double(), dim=-1)
    torch.testing.assert_close(layer(hidden)[0], peer(hidden), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_scale_every_slot_is_the_mean_token_and_every_token_the_mean_output():
    layer, hidden = make(), draw(B, S, D)
    layer.router.scale.zero_()
    output, routing = layer(hidden)
    means = hidden.mean(dim=1)
    for sequence in range(B):
        expected = torch.stack([feed_forward(layer, expert, means[sequence]) for expert in range(E)]).mean(dim=0)
        torch.testing.assert_close(output[sequence], expected.expand(S, D), atol=1e-5, rtol=1e-5)
    brief = {name: value.item() for name, value in brief_metrics(routing).items()}
    assert brief == pytest.approx(
        {
            "active_experts": E * C / S,
            "load_max_violation": 0.0,
            "router_entropy": math.log(E),
            "tokens_per_slot": S,
            "slots_per_token": E * C,
        },
        abs=1e-5,
    )


def test_the_length_of_a_token_changes_what_a_slot_reads_but_not_how():
    router = make().router
    hidden = draw(S, D)
    first, second = (router(RoutingInput(hidden=states, batch=1, sequence=S)) for states in (hidden, 7 * hidden))
    torch.testing.assert_close(first.dispatch, second.dispatch, atol=1e-5, rtol=0)
    torch.testing.assert_close(first.combine, second.combine, atol=1e-5, rtol=0)


def test_a_sequence_does_not_see_the_others():
    layer, hidden = make(), draw(B, S, D)
    alone = torch.cat([layer(sequence)[0] for sequence in hidden.split(1)])
    torch.testing.assert_close(layer(hidden)[0], alone)


def test_every_parameter_learns():
    layer = make()
    (layer(draw(B, S, D))[0] * draw(B, S, D, seed=2)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 1e-4, name


def test_renaming_the_experts_renames_the_routing():
    first, second = make().router, make().router
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        second.slots.copy_(first.slots.view(E, C, D)[order].flatten(0, 1))
    inputs = RoutingInput(hidden=draw(B * S, D), batch=B, sequence=S)
    torch.testing.assert_close(first(inputs).combine[:, :, order], second(inputs).combine)
    torch.testing.assert_close(first(inputs).load[order], second(inputs).load)


def test_young_layer_grows_into_soft_experts():
    layer, hidden = make(), draw(B, S, D)
    layer.live_experts = 1
    output, routing = layer(hidden)
    assert routing.rows == B * S
    torch.testing.assert_close(output[0, 0], feed_forward(layer, 0, hidden[0, 0]))
    spawn_experts([("block_1", layer)], Spawn(method="copy"), seed=0)
    output, routing = layer(hidden)
    assert layer.live_experts == E
    assert routing.rows == B * E * C


def test_a_language_model_refuses_it():
    sizes = (50, 16, 32, 2, 2)
    with pytest.raises(ConfigError, match="SoftMoE looks at later tokens in training and evaluation"):
        GPT(*sizes, num_experts=4, router=SoftMoE)
    model = GPT(*sizes, num_experts=4, router=SoftMoE, allow_future_leak=True)
    assert model(torch.zeros(1, 4, dtype=torch.long))[0].shape == (1, 4, 50)


def test_less_than_one_slot_is_refused():
    with pytest.raises(ConfigError) as error:
        SoftMoE(8, 4, slots=0)
    assert str(error.value) == "router slots=0: expected 1 or more slots per expert, the published number is 1"
