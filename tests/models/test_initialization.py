from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from evomoe.models.gpt import GPT
from evomoe.models.initialization import draw_normal_, seeded
from evomoe.routing.contract import Router, Routing, RoutingInput
from evomoe.routing.methods.dts import DTSGate
from evomoe.routing.methods.switch import Switch
from evomoe.routing.methods.topk import TopK

Build = Callable[..., GPT]


def test_deviations_are_those_of_gpt2(build: Build) -> None:
    model = build(vocab_size=512, context=256, d_model=128, num_layers=8)
    residual = 0.02 / 16**0.5
    block = model.blocks[1]
    expected = {
        0.02: [model.token_embedding.weight, model.position_embedding.weight, block.attention.qkv.weight],
        residual: [block.attention.output.weight],
    }
    for expert in range(4):
        parameters = block.feed_forward.experts.expert_parameters(expert)
        expected[0.02].append(parameters["w_in"])
        expected[residual].append(parameters["w_out"])
        assert torch.count_nonzero(parameters["b_in"]) == torch.count_nonzero(parameters["b_out"]) == 0
    for std, weights in expected.items():
        for weight in weights:
            assert weight.std().item() == pytest.approx(std, rel=0.02)
            assert weight.mean().item() == pytest.approx(0, abs=4 * std / weight.numel() ** 0.5)
    assert torch.count_nonzero(block.attention.qkv.bias) == 0
    assert torch.equal(model.final_norm.weight, torch.ones(128))


def test_first_loss_is_that_of_a_uniform_guess(build: Build, tokens: torch.Tensor) -> None:
    logits, _ = build()(tokens)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(torch.tensor(50.0).log().item(), rel=0.02)


def test_methods_share_every_weight_outside_experts_and_routers(build: Build) -> None:
    dense = dict(build(moe_every=0).named_parameters())
    switch = build(router=Switch, num_experts=4)
    dts = build(router=DTSGate, num_experts=8)
    for model in (switch, dts):
        shared = {name: p for name, p in model.named_parameters() if ".router." not in name and name in dense}
        assert shared.keys() == dense.keys()  # expert 0 bears the name of the dense feed-forward
        assert all(torch.equal(parameter, dense[name]) for name, parameter in shared.items())


def test_a_router_of_ordinary_modules_is_drawn_too(build: Build) -> None:
    class TwoLayers(Router):
        def __init__(self, d_model: int, num_experts: int) -> None:
            super().__init__(d_model, num_experts)
            self.net = nn.Sequential(nn.Linear(d_model, 8), nn.GELU(), nn.Linear(8, num_experts))
            self.topk = TopK(num_experts, num_experts)

        def forward(self, inputs: RoutingInput) -> Routing:
            return self.topk(replace(inputs, hidden=self.net(inputs.hidden)))

    first, second = (build(router=TwoLayers).blocks[1].feed_forward.router.net for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(parameter.std() > 0 for parameter in first.parameters())


def test_all_experts_live_in_weights_that_are_drawn_anew(build: Build) -> None:
    model = build()
    (layer,) = model.moe_layers.values()
    layer.live_experts = 1
    model.init_weights(0)
    assert layer.live_experts == layer.num_experts


def test_experts_start_different_from_one_another(build: Build) -> None:
    experts = build().blocks[1].feed_forward.experts
    weights = [experts.expert_parameters(expert)["w_in"] for expert in range(4)]
    assert all(not torch.equal(weights[i], weights[j]) for i in range(4) for j in range(i))


def test_weights_depend_on_the_seed_not_on_earlier_draws(build: Build) -> None:
    reference = build()
    torch.manual_seed(0)
    torch.rand(5)
    later = GPT(50, 16, 32, 2, 2, num_experts=4, router=Switch)
    assert torch.equal(later.blocks[1].attention.qkv.weight, reference.blocks[1].attention.qkv.weight)
    later.init_weights(seed=1)
    assert not torch.equal(later.blocks[1].attention.qkv.weight, reference.blocks[1].attention.qkv.weight)
    later.init_weights(seed=0)
    assert torch.equal(later.blocks[1].attention.qkv.weight, reference.blocks[1].attention.qkv.weight)


def test_routers_start_alike_and_leave_the_global_generator_alone(build: Build) -> None:
    model = build(num_layers=4)
    first, second = (layer.router.gate.weight.clone() for layer in model.moe_layers.values())
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    model.init_weights(seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.moe_layers["block_1"].router.gate.weight, first)


def test_seeded_bodies_repeat() -> None:
    device = torch.device("cpu")
    draws = []
    for name in ("a", "a", "b"):
        with seeded(0, name, device):
            draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_half_precision_weight_is_the_rounded_full_one() -> None:
    full, half = torch.empty(4, 5), torch.empty(4, 5, dtype=torch.bfloat16)
    draw_normal_(full, 0.02, 0, "weight")
    draw_normal_(half, 0.02, 0, "weight")
    assert torch.equal(half, full.bfloat16())
