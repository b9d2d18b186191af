from __future__ import annotations

import math

import pytest
import torch

from evomoe.routing import RoutingInput, SparseRouting, Switch
from evomoe.routing.metrics import brief_metrics, dropped_fraction, load_max_violation, router_entropy


def routing(scores: list[list[float]], tokens_per_expert: list[int], num_tokens: int, dropped: int) -> SparseRouting:
    assigned = sum(tokens_per_expert)
    return SparseRouting(
        token=torch.zeros(assigned, dtype=torch.int64),
        weight=torch.ones(assigned),
        tokens_per_expert=torch.tensor(tokens_per_expert),
        scores=torch.tensor(scores),
        num_tokens=torch.tensor(num_tokens),
        dropped=torch.tensor(dropped),
    )


@pytest.mark.parametrize(
    ("load", "violation"),
    [([3, 3, 3, 3], 0.0), ([12, 0, 0, 0], 3.0), ([6, 6, 0, 0], 1.0), ([4, 3, 3, 2], 1 / 3)],
)
def test_load_max_violation(load, violation):
    assert load_max_violation(torch.tensor(load)).item() == pytest.approx(violation)


def test_entropy_is_the_mean_over_real_tokens():
    scores = [[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0] * 4]  # the last one is padding
    entropy = router_entropy(routing(scores, [3, 0, 0, 0], num_tokens=3, dropped=0))
    assert entropy.item() == pytest.approx((math.log(4) + 0 + math.log(2)) / 3)


def test_dropped_fraction():
    assert dropped_fraction(routing([[1.0, 0.0]], [3, 2], num_tokens=10, dropped=5)).item() == pytest.approx(0.5)
    assert dropped_fraction(routing([[0.0, 0.0]], [0, 0], num_tokens=0, dropped=0)).item() == 0


def test_brief_metrics_of_a_batch_of_padding_are_finite():
    metrics = brief_metrics(routing([[0.0, 0.0]], [0, 0], num_tokens=0, dropped=0))
    assert sorted(metrics) == ["active_experts", "dropped", "load_max_violation", "router_entropy"]
    assert all(value.isfinite() for value in metrics.values())
    assert metrics["active_experts"].item() == 0


def test_active_experts_count_real_tokens():
    metrics = brief_metrics(routing([[0.5, 0.5]] * 4, [3, 2], num_tokens=2, dropped=0))
    assert metrics["active_experts"].item() == pytest.approx(2.5)


def test_the_logged_violation_is_of_the_choice_not_of_what_a_capacity_left():
    router = Switch(4, 4, capacity_factor=1.0, jitter=0.0)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(4))
    hidden = torch.eye(4)[[0, 0, 0, 0, 0, 1, 2, 3]]  # five of eight tokens choose expert 0, which has two places
    bounded = router(RoutingInput(hidden=hidden, batch=1, sequence=8))
    assert bounded.tokens_per_expert.tolist() == [2, 1, 1, 1]
    assert brief_metrics(bounded)["load_max_violation"].item() == pytest.approx(5 / 2 - 1)
