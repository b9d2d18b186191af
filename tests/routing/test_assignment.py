"""The balanced assignment against SciPy's solver of the linear assignment problem.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from evomoe.routing.assignment import balanced_assignment


def optimum(scores: Tensor) -> float:
    """The largest sum of scores: every expert's column once per place, the places above ``floor(T / E)`` optional.

    A dummy token takes each optional place that is left; it may not take a place that must be filled.
    """
    tokens, experts = scores.shape
    floor, larger = divmod(tokens, experts)
    matrix = scores.double().numpy()
    must = np.repeat(matrix, floor, axis=1)  # (T, E * floor)
    if larger == 0:
        rows, columns = linear_sum_assignment(must, maximize=True)
        return float(must[rows, columns].sum())
    whole = np.block(
        [[must, matrix], [np.full((experts - larger, experts * floor), -1e9), np.zeros((experts - larger, experts))]]
    )
    rows, columns = linear_sum_assignment(whole, maximize=True)
    return float(whole[rows, columns].sum())


def assert_balanced(scores: Tensor, expert: Tensor) -> None:
    tokens, experts = scores.shape
    load = torch.bincount(expert, minlength=experts)
    assert int(load.min()) >= tokens // experts
    assert int(load.max()) <= -(-tokens // experts)


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(1, 60),
    experts=st.integers(1, 9),
    kind=st.sampled_from(["normal", "skewed", "ties", "bfloat16", "huge"]),
    seed=st.integers(0, 10_000),
)
def test_balanced_and_optimal(tokens, experts, kind, seed):
    scores = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    scores = {
        "normal": scores,
        "skewed": scores + 3 * torch.arange(experts),
        "ties": scores.round(),
        "bfloat16": (scores * 10).bfloat16().float(),
        "huge": scores * 1e4,
    }[kind]
    expert = balanced_assignment(scores)
    assert_balanced(scores, expert)
    found = float(scores.double().gather(1, expert[:, None]).sum())
    assert found == pytest.approx(optimum(scores), rel=1e-6, abs=1e-5)


def test_hand_typed_case():
    scores = torch.tensor([[9.0, 1.0], [8.0, 7.0], [7.0, 0.0], [6.0, 5.0]])
    assert balanced_assignment(scores).tolist() == [0, 1, 0, 1]  # greedy would give expert 0 everything


def test_the_larger_loads_go_where_they_gain_most():
    scores = torch.tensor([[1.0, 0.0, 0.0]] * 3 + [[0.0, 5.0, 0.0]] * 2)  # 5 tokens: loads 2, 2, 1
    assert balanced_assignment(scores).bincount(minlength=3).tolist() == [2, 2, 1]


@pytest.mark.parametrize("experts", [8, 64])
def test_a_training_batch(experts):
    scores = torch.randn(1024, experts, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 2, experts)
    expert = balanced_assignment(scores)
    assert torch.equal(expert.bincount(minlength=experts), torch.full((experts,), 1024 // experts))
    assert float(scores.double().gather(1, expert[:, None]).sum()) == pytest.approx(optimum(scores), rel=1e-9)


def test_equal_scores_balance():
    assert balanced_assignment(torch.zeros(40, 4)).bincount(minlength=4).tolist() == [10] * 4


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["equal experts", "equal tokens", "half of the tokens equal", "rounded"])
def test_ties_are_balanced_exactly_and_at_once(kind):
    """Token by token the first two would take most of a minute."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4096, 32, generator=generator)
    scores = {
        "equal experts": torch.zeros(4096, 32),
        "equal tokens": scores[:1].expand(4096, -1),
        "half of the tokens equal": torch.cat([scores[:1].expand(2048, -1), scores[2048:]]),
        "rounded": (scores * 4).round(),
    }[kind]
    expert = balanced_assignment(scores)
    assert torch.equal(expert.bincount(minlength=32), torch.full((32,), 128))
    assert float(scores.double().gather(1, expert[:, None]).sum()) == pytest.approx(optimum(scores), rel=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_do_not_keep_it_from_ending(bad):
    scores = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    scores[2] = bad
    assert balanced_assignment(scores).bincount(minlength=3).tolist() == [4, 4, 4]
    assert balanced_assignment(torch.full((6, 3), bad)).bincount(minlength=3).tolist() == [2, 2, 2]


@pytest.mark.timeout(60)
def test_rows_of_very_different_magnitude_do_not_keep_it_from_ending():
    """In fp32 the first choice of these scores is not optimal for its load: moves between two experts gain for ever."""
    for seed in (260, *range(5)):
        scores = torch.randn(2048, 8, generator=torch.Generator().manual_seed(seed))
        scores[::2] += 1e4
        assert balanced_assignment(scores).bincount(minlength=8).tolist() == [256] * 8


def test_permuting_the_tokens_permutes_the_assignment():
    scores = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(balanced_assignment(scores)[order], balanced_assignment(scores[order]))


def test_no_tokens():
    assert balanced_assignment(torch.zeros(0, 4)).shape == (0,)
