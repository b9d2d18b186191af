"""Counts of parameters and floating-point operations, against the built model and PyTorch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from helpers.flops import flop_counter
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from evomoe.models.flops import TRAINING_FACTOR
from evomoe.models.gpt import GPT
from evomoe.routing import BASELayer, DTSGate, StableMoE, Switch, TopK

Build = Callable[..., GPT]


def count_flops(model: GPT, tokens: Tensor, *, backward: bool) -> tuple[int, list[float]]:
    """FLOPs of one pass by the dispatched operators, and the active experts of each MoE layer."""
    # The counter knows no fused attention on CPU, so attention runs as its two matrix products.
    with flop_counter() as counter, sdpa_kernel(SDPBackend.MATH):
        logits, routings = model(tokens)
        if backward:
            auxiliary = sum(loss for routing in routings for loss in routing.losses.values())
            (cross_entropy(logits.flatten(0, 1), tokens.flatten()) + auxiliary).backward()
    active = [routing.tokens_per_expert.sum().item() / routing.num_tokens.item() for routing in routings]
    return counter.get_total_flops(), active


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("router", [None, Switch, TopK, DTSGate, BASELayer, partial(StableMoE, vocab_size=64)])
def test_formula_is_what_the_counter_counts(build: Build, tokens: Tensor, router: Any, backward: bool) -> None:
    model = build(num_layers=4, moe_every=0 if router is None else 2, router=router, allow_future_leak=True)
    counted, active = count_flops(model, tokens, backward=backward)
    formula = model.flops_per_token(12, active) * tokens.numel() * (TRAINING_FACTOR if backward else 1)
    assert counted == pytest.approx(formula, rel=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"activation": "swiglu", "bias": False},
        {"num_experts": 1, "router": Switch},
        {"d_expert": 16, "num_experts": 9, "shared_experts": 2},
    ],
)
def test_gated_and_single_experts_are_counted(build: Build, tokens: Tensor, settings: dict[str, Any]) -> None:
    model = build(**settings)
    counted, active = count_flops(model, tokens, backward=True)
    assert counted == pytest.approx(TRAINING_FACTOR * model.flops_per_token(12, active) * tokens.numel(), rel=1e-9)


def test_a_layer_with_one_living_expert_costs_what_a_dense_layer_costs(build: Build, tokens: Tensor) -> None:
    sparse, dense = build(), build(moe_every=0)
    for layer in sparse.moe_layers.values():
        layer.live_experts = 1
    assert sparse.flops_per_token(12, 1.0) == dense.flops_per_token(12)
    assert count_flops(sparse, tokens, backward=True)[0] == count_flops(dense, tokens, backward=True)[0]


def test_flops_of_a_hand_counted_model(build: Build) -> None:
    model = build()  # D=32, H=128, E=4, V=64 with the extra rows
    attention = 2 * 4 * 32 * 32 + 2 * 2 * 10 * 32
    expected = 2 * attention + 2 * 2 * 32 * 128 + (1.5 * 2 * 2 * 32 * 128 + 2 * 32 * 4) + 2 * 32 * 64
    assert model.flops_per_token(10, 1.5) == expected
    assert model.flops_per_token(10, [1.5]) == expected


def test_parameters_of_a_hand_counted_model(build: Build) -> None:
    model = build()
    expert = 2 * 32 * 128 + 128 + 32
    block = 4 * 32 * 32 + 4 * 32 + 4 * 32  # attention and two norms
    body = 64 * 32 + 16 * 32 + 2 * block + 2 * 32
    assert model.num_parameters() == body + expert + 4 * expert + 4 * 32
    assert model.num_active_parameters() == body + expert + expert + 4 * 32
    assert model.num_active_parameters(2.5) == body + expert + 2.5 * expert + 4 * 32
    assert build(moe_every=0).num_active_parameters() == build(moe_every=0).num_parameters() == body + 2 * expert


@pytest.mark.parametrize("active", [[1.0], [1.0, 1.0, 1.0]])
def test_one_number_per_moe_layer_is_required(build: Build, active: list[float]) -> None:
    model = build(num_layers=4)
    with pytest.raises(ValueError, match="active experts for 2 MoE layers"):
        model.num_active_parameters(active)
    with pytest.raises(ValueError, match="active experts for 2 MoE layers"):
        model.flops_per_token(12, active)
