from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.routing import ReMoE, RoutingInput, SparseRouting, StepStatistics


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def remoe_for(logits: Tensor, **options) -> tuple[ReMoE, RoutingInput]:
    tokens, experts = logits.shape
    router = ReMoE(tokens, experts, **options)
    with torch.no_grad():
        router.gate.weight.copy_(logits.t())
    return router, RoutingInput(hidden=torch.eye(tokens), batch=1, sequence=tokens)


def step(router: ReMoE, active: float) -> None:
    router.after_optimizer_step(
        StepStatistics(load=torch.ones(4), tokens=torch.tensor(4), active_experts=torch.tensor(active))
    )


def penalty(routing: SparseRouting, top_k: int) -> float:
    """The definition, by loops."""
    gates = routing.to_dense().detach()
    tokens, experts = gates.shape
    total = 0.0
    for e in range(experts):
        active = sum(1 for t in range(tokens) if gates[t, e] > 0)
        total += active * sum(float(gates[t, e]) for t in range(tokens))
    return experts / (top_k * tokens**2) * total


# Gates and loss


def test_hand_typed_gates():
    logits = torch.tensor([[2.0, -1.0, 0.5], [-1.0, -2.0, -0.1], [0.0, 3.0, 1.0]])
    router, inputs = remoe_for(logits, top_k=1, initial_lambda=0.5)
    routing = router(inputs)
    assert routing.to_dense().tolist() == [[2.0, 0, 0.5], [0, 0, 0], [0, 3.0, 1.0]]
    assert routing.tokens_per_expert.tolist() == [1, 1, 2]
    # 0.5 * 3 / 9 * (1 * 2 + 1 * 3 + 2 * 1.5)
    assert routing.losses["sparsity"].item() == pytest.approx(4 / 3)
    assert routing.metrics["lambda"].item() == 0.5
    assert routing.metrics["sparsity"].item() == pytest.approx(5 / 9)
    assert routing.scores[0].tolist() == pytest.approx([0.8, 0, 0.2])


@pytest.mark.parametrize("top_k", [1, 3])
def test_loss_is_its_definition(top_k):
    router, inputs = remoe_for(draw(30, 5), top_k=top_k, initial_lambda=0.1)
    routing = router(inputs)
    assert routing.losses["sparsity"].item() == pytest.approx(0.1 * penalty(routing, top_k), rel=1e-5)


def test_gradient_of_the_loss_shrinks_active_gates_by_the_load_of_their_expert():
    logits = draw(30, 5)
    router, inputs = remoe_for(logits, top_k=2, initial_lambda=0.1)
    (gradient,) = torch.autograd.grad(router(inputs).losses["sparsity"], router.gate.weight)
    active = (logits > 0).float()
    torch.testing.assert_close(gradient.t(), 0.1 * 5 / (2 * 30**2) * active * active.sum(dim=0))


def test_nothing_active_costs_nothing():
    router, inputs = remoe_for(-draw(6, 4).abs(), initial_lambda=1.0)
    routing = router(inputs)
    assert routing.token.numel() == 0
    assert routing.losses["sparsity"].item() == 0
    assert torch.equal(routing.scores, torch.zeros(6, 4))


def test_a_gate_fades_in_where_top_k_would_jump():
    outputs = []
    for logit in (-1e-4, 0.0, 1e-4):
        router, inputs = remoe_for(torch.tensor([[1.0, logit]]))
        outputs.append(router(inputs).to_dense())
    for left, right in pairwise(outputs):
        assert (left - right).abs().max().item() <= 1.001e-4
    assert outputs[0][0, 1] == outputs[1][0, 1] == 0 < outputs[2][0, 1]


@pytest.mark.parametrize("init", ["scaled", "small"])
def test_about_half_of_the_experts_work_at_first(init):
    torch.manual_seed(0)
    router = ReMoE(64, 16, init=init)
    routing = router(RoutingInput(hidden=draw(500, 64), batch=1, sequence=500))
    assert routing.metrics["sparsity"].item() == pytest.approx(0.5, abs=0.05)


# Lambda


def test_lambda_follows_the_sparsity():
    router = ReMoE(8, 4, top_k=1)
    factors = []
    for active in (2.0, 1.01, 1.0, 0.5, 4.0):
        before = router.l1_factor.item()
        step(router, active)
        factors.append(router.l1_factor.item() / before)
    assert factors == pytest.approx([1.2, 1.2, 1 / 1.2, 1 / 1.2, 1.2], rel=1e-5)
    assert router.l1_factor.item() == pytest.approx(1e-8 * 1.2, rel=1e-5)


@pytest.mark.parametrize(("active", "bound"), [(4.0, 1e4), (0.0, 1e-10)])
def test_lambda_stays_within_its_bounds(active, bound):
    router = ReMoE(8, 4)
    for _ in range(200):
        step(router, active)
    assert router.l1_factor.item() == pytest.approx(bound)


def test_what_is_logged_is_the_lambda_of_the_batch():
    router, inputs = remoe_for(draw(6, 4), initial_lambda=0.5)
    routing = router(inputs)
    step(router, 4.0)
    assert routing.metrics["lambda"].item() == 0.5
    routing.losses["sparsity"].backward()
    assert router.gate.weight.grad.abs().max() > 0


def test_lambda_is_state_and_is_forgotten_with_the_gate():
    router = ReMoE(8, 4)
    step(router, 4.0)
    assert router.state_dict()["l1_factor"].item() == pytest.approx(1.2e-8)
    router.reset_parameters()
    assert router.l1_factor.item() == pytest.approx(1e-8)


def test_a_toy_run_arrives_at_the_aim():
    """The gate learns a target by its weights; the penalty leaves 2 of 8 experts a token.

    The states have a feature in common. Without one, no gate without bias could work for less than half of them.
    """
    torch.manual_seed(0)
    router = ReMoE(16, 8, top_k=2)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.01)
    values, hidden = draw(8, 4, seed=1), draw(256, 16, seed=2)
    hidden[:, 0] = 2
    target = hidden[:, 1:5]
    active = []
    for _ in range(600):
        routing = router(RoutingInput(hidden=hidden, batch=1, sequence=256))
        loss = (routing.to_dense() @ values - target).square().mean() + routing.losses["sparsity"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        active.append(routing.active_experts.item())
        step(router, active[-1])
    assert active[0] == pytest.approx(4, abs=0.7)
    assert sum(active[-300:]) / 300 == pytest.approx(2, abs=0.4)


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "router top_k=5: expected 1 to 4, the number of experts"),
        ({"initial_lambda": 0.0}, "router initial_lambda=0.0: expected a value in [1e-10, 10000.0]"),
        ({"growth": 1.0}, "router growth=1.0: expected a finite factor above 1, the published one is 1.2"),
        ({"growth": math.inf}, "router growth=inf: expected a finite factor above 1, the published one is 1.2"),
        ({"init": "zeros"}, "router init='zeros' leaves ReLU gates without gradient: expected scaled or small"),
    ],
)
def test_errors_name_the_value_and_the_remedy(options, message):
    with pytest.raises(ConfigError) as error:
        ReMoE(8, 4, **options)
    assert str(error.value) == message
