"""Spawning: what the newborn experts are, and what nothing else may become."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from evomoe.errors import ConfigError
from evomoe.moe import MoELayer, Spawn, spawn_experts
from evomoe.routing import DTSGate, ScheduleValues

D, H, E = 16, 64, 4


def make_layer(activation: str = "gelu") -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(D, H, E, partial(DTSGate, init="zeros"), activation=activation)
    layer.live_experts = 1
    with torch.no_grad():
        for name in ("b_in", "b_out"):
            layer.experts.expert_parameters(0)[name].normal_()
    return layer


def train_step(layer: MoELayer, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    layer(torch.randn(2, 8, D))[0].square().sum().backward()
    optimizer.step()


def snapshot(layer: MoELayer, expert: int) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in layer.experts.expert_parameters(expert).items()}


def spawn_one(layer: MoELayer, seed: int = 0, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> None:
    spawn_experts([("layer", layer)], Spawn(**options), seed, optimizer)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_copy_clones_expert_0(activation: str) -> None:
    layer = make_layer(activation)
    base = snapshot(layer, 0)
    spawn_one(layer, method="copy")
    for expert in range(E):
        for name, value in snapshot(layer, expert).items():
            assert torch.equal(value, base[name])


def test_copy_under_a_uniform_gate_keeps_the_function() -> None:
    layer = make_layer().eval()
    hidden = torch.randn(2, 8, D)
    before, _ = layer(hidden)
    spawn_one(layer, method="copy")
    layer.router.set_schedule(ScheduleValues(temperature=2.0))
    after, routing = layer(hidden)
    assert routing.active_experts == E
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-5)


def test_mask_zeroes_the_configured_share_of_each_matrix_independently() -> None:
    layer = make_layer()
    base = snapshot(layer, 0)
    spawn_one(layer, method="mask", ratio=0.3)
    masks = []
    for expert in range(E):
        child = snapshot(layer, expert)
        for name in ("w_in", "w_out"):
            kept = child[name] != 0
            assert torch.equal(child[name], base[name] * kept)
            assert abs(1 - kept.float().mean().item() - 0.3) < 4 * (0.3 * 0.7 / kept.numel()) ** 0.5
        assert torch.equal(child["b_in"], base["b_in"])
        assert torch.equal(child["b_out"], base["b_out"])
        masks.append(child["w_in"] != 0)
    for i in range(E):
        for j in range(i):  # independent masks agree on 0.7^2 + 0.3^2 of the weights
            assert abs((masks[i] == masks[j]).float().mean().item() - 0.58) < 0.07


def test_rescale_divides_the_survivors_by_their_share() -> None:
    layer, plain = make_layer(), make_layer()
    spawn_one(layer, method="mask", ratio=0.5, rescale=True)
    spawn_one(plain, method="mask", ratio=0.5)
    for expert in range(E):
        torch.testing.assert_close(snapshot(layer, expert)["w_in"], 2 * snapshot(plain, expert)["w_in"])


def test_noise_has_the_configured_deviation() -> None:
    layer = make_layer()
    base = snapshot(layer, 0)
    spawn_one(layer, method="noise", ratio=0.2)
    for expert in range(E):
        noise = snapshot(layer, expert)["w_in"] - base["w_in"]
        assert noise.std() / base["w_in"].std() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_reinit_redraws_whole_hidden_units_with_the_statistics_of_what_they_replace(activation: str) -> None:
    layer = make_layer(activation)
    with torch.no_grad():
        layer.experts.expert_parameters(0)["w_in"][H:] *= 10
    base = snapshot(layer, 0)
    spawn_one(layer, method="reinit", ratio=0.5, keep_first=True)
    child = snapshot(layer, 1)
    units = (child["w_out"] != base["w_out"]).all(dim=0)  # (H,)
    assert units.sum() == H // 2
    assert torch.equal(child["w_out"][:, ~units], base["w_out"][:, ~units])
    rows = units.repeat(child["w_in"].shape[0] // H)
    assert torch.equal((child["w_in"] != base["w_in"]).all(dim=1), rows)
    assert torch.equal((child["b_in"] != base["b_in"]), rows)
    assert torch.equal(child["b_out"], base["b_out"])
    for part in range(child["w_in"].shape[0] // H):  # swiglu's gate and its twin, here of another scale
        drawn, before = (weights["w_in"].chunk(child["w_in"].shape[0] // H)[part][units] for weights in (child, base))
        assert drawn.std().item() == pytest.approx(before.std().item(), rel=0.15)


def test_keep_first_leaves_expert_0_as_it_was() -> None:
    layer = make_layer()
    base = snapshot(layer, 0)
    spawn_one(layer, keep_first=True)
    assert all(torch.equal(value, base[name]) for name, value in snapshot(layer, 0).items())
    assert not torch.equal(snapshot(layer, 1)["w_in"], base["w_in"])


def test_spawn_touches_nothing_but_the_experts_and_says_that_all_live() -> None:
    network = nn.ModuleDict({"embedding": nn.Embedding(8, D), "moe": make_layer()})
    before = {name: value.clone() for name, value in network.state_dict().items() if ".experts." not in name}
    spawn_one(network["moe"])  # type: ignore[arg-type]
    assert network["moe"].live_experts == E
    for name, value in before.items():
        if name != "moe.born":
            assert torch.equal(network.state_dict()[name], value)
    assert network.state_dict()["moe.born"] == E


def test_the_draws_depend_on_seed_layer_and_expert_alone() -> None:
    first, again, other_seed, other_name = (make_layer() for _ in range(4))
    spawn_one(first)
    torch.manual_seed(123)
    spawn_one(again)
    spawn_one(other_seed, seed=1)
    spawn_experts([("another", other_name)], Spawn(), 0)
    weights = [snapshot(layer, 2)["w_in"] for layer in (first, again, other_seed, other_name)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


@pytest.mark.parametrize("fused", [False, True])
def test_moments_are_carried_the_first_one_masked_like_the_weights(fused: bool) -> None:
    layer = make_layer()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, fused=fused)
    for _ in range(3):
        train_step(layer, optimizer)
    w_in = layer.experts.expert_parameters(0)["w_in"]
    moments = {key: optimizer.state[w_in][key].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
    assert layer.experts.expert_parameters(1)["w_in"] not in optimizer.state
    spawn_one(layer, optimizer=optimizer, method="mask", ratio=0.5)
    for expert in range(E):
        child = layer.experts.expert_parameters(expert)["w_in"]
        kept = child != 0
        state = optimizer.state[child]
        assert state["step"] == 3
        assert torch.equal(state["exp_avg"], moments["exp_avg"] * kept)
        assert torch.equal(state["exp_avg_sq"], moments["exp_avg_sq"])
    train_step(layer, optimizer)  # no state is shared between experts
    steps = {float(optimizer.state[layer.experts.expert_parameters(expert)["w_in"]]["step"]) for expert in range(E)}
    assert steps == {4.0}


def test_no_weight_moves_further_than_it_did_before_the_spawn() -> None:
    """Under a constant gradient Adam moves each weight by the learning rate; also one whose first moment is gone."""
    layer = make_layer()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(40):
        if step == 30:
            spawn_one(layer, optimizer=optimizer, method="mask", ratio=0.5)
        for expert in range(E if step >= 30 else 1):
            for parameter in layer.experts.expert_parameters(expert).values():
                parameter.grad = torch.ones_like(parameter)
        before = [parameter.clone() for parameter in layer.experts.parameters()]
        optimizer.step()
        moved = [(now - then).abs().max().item() for now, then in zip(layer.experts.parameters(), before, strict=True)]
        assert max(moved) < 1.01e-3


def test_reset_starts_all_experts_moments_anew() -> None:
    layer = make_layer()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    train_step(layer, optimizer)
    spawn_one(layer, optimizer=optimizer, moments="reset")
    for expert in range(E):
        for parameter in layer.experts.expert_parameters(expert).values():
            assert parameter not in optimizer.state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "clone"}, "method='clone'.*mask, noise, copy, reinit"),
        ({"ratio": 1.0}, r"ratio=1.0.*\[0, 1\)"),
        ({"ratio": -0.1}, "ratio=-0.1"),
        ({"method": "reinit", "ratio": 1.5}, r"\[0, 1\]"),
        ({"moments": "keep"}, "moments='keep'"),
        ({"method": "copy", "rescale": True}, "rescale=true does nothing"),
    ],
)
def test_impossible_spawns_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Spawn(**options)  # type: ignore[arg-type]
