from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomoe.errors import ConfigError
from evomoe.routing import RoutingInput
from evomoe.routing.selection import (
    assign_choices,
    assign_mask,
    assign_within_capacity,
    capacity_per_expert,
    check_capacity_factor,
    within_capacity,
)


def served_one_by_one(
    expert: list[list[int]], capacity: int, valid: list[bool], priority: str, order: list[int] | None = None
) -> list[list[bool]]:
    """Tokens ask in turn for a free place: the definition."""
    tokens, top_k = len(expert), len(expert[0])
    served = [[False] * top_k for _ in range(tokens)]
    taken: dict[int, int] = {}
    turns = [(t, k) for t in range(tokens) for k in range(top_k)]
    if priority != "token":
        turns = [(t, k) for k in range(top_k) for t in (order or range(tokens))]
    for t, k in turns:
        if valid[t] and taken.get(expert[t][k], 0) < capacity:
            taken[expert[t][k]] = taken.get(expert[t][k], 0) + 1
            served[t][k] = True
    return served


@st.composite
def choices(draw):
    """``(expert (T, K), E)`` with distinct experts in a row."""
    experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, experts))
    row = st.permutations(range(experts)).map(lambda order: list(order[:top_k]))
    return draw(st.lists(row, min_size=1, max_size=8)), experts


@settings(deadline=None)
@given(choices=choices(), capacity=st.integers(1, 4), priority=st.sampled_from(["token", "choice"]), data=st.data())
def test_capacity_serves_as_a_queue_does(choices, capacity, priority, data):
    expert, _ = choices
    valid = data.draw(st.lists(st.booleans(), min_size=len(expert), max_size=len(expert)))
    served = within_capacity(torch.tensor(expert), capacity, torch.tensor(valid), priority)
    assert served.tolist() == served_one_by_one(expert, capacity, valid, priority)


@settings(deadline=None)
@given(choices=choices(), capacity=st.integers(1, 4), data=st.data())
def test_batch_priority_serves_large_weights_first(choices, capacity, data):
    expert, _ = choices
    flags = st.lists(st.booleans(), min_size=len(expert), max_size=len(expert))
    valid, number = data.draw(flags), st.sampled_from([0.1, 0.2, 0.5, 0.9])
    weight = data.draw(st.lists(number, min_size=len(expert), max_size=len(expert)))
    order = sorted(range(len(expert)), key=lambda token: -weight[token])
    served = within_capacity(torch.tensor(expert), capacity, torch.tensor(valid), "best", torch.tensor(weight))
    assert served.tolist() == served_one_by_one(expert, capacity, valid, "best", order)


@settings(deadline=None)
@given(
    batch=st.integers(1, 3),
    sequence=st.integers(1, 4),
    pool=st.sampled_from(["batch", "sequence", "position"]),
    priority=st.sampled_from(["token", "choice", "best"]),
    multiple=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_each_pool_has_places_of_its_own(batch, sequence, pool, priority, multiple, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens, experts, factor = batch * sequence, 3, 0.7
    weight, expert = torch.rand(tokens, experts, generator=generator).topk(2, dim=1)
    valid = torch.rand(tokens, generator=generator) < 0.7
    inputs = RoutingInput(hidden=torch.zeros(tokens, 1), batch=batch, sequence=sequence, valid=valid)
    (token, kept, counts), load = assign_within_capacity(
        inputs, expert, weight, experts, factor, priority, pool, multiple, confidence=weight[:, 0]
    )
    assert torch.equal(load, torch.bincount(expert[valid].flatten(), minlength=experts))

    numbers = torch.arange(tokens)
    key = {"batch": numbers * 0, "sequence": numbers // sequence, "position": numbers % sequence}[pool]
    expected = torch.zeros(tokens, experts)
    for members in (numbers[key == number] for number in key.unique()):
        real = valid[members].sum()
        capacity = -(-max(math.ceil(float(real) * 2 * factor / experts - 1e-9), 1) // multiple) * multiple
        served = within_capacity(expert[members], capacity, valid[members], priority, weight[members, 0])
        expected[members] = expected[members].scatter(1, expert[members], weight[members] * served)
    found = torch.zeros(tokens, experts)
    found[token, torch.arange(experts).repeat_interleave(counts)] = kept
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("rounding", "multiple", "places"),
    [("ceil", 1, 4), ("round", 1, 3), ("ceil", 4, 4), ("round", 4, 4), ("ceil", 3, 6)],
)
def test_rounding_of_the_capacity(rounding, multiple, places):
    assert capacity_per_expert(torch.tensor(10), 3, 1, 1.0, rounding, multiple).item() == places


def test_halves_are_rounded_as_python_does():
    tokens = torch.arange(60)
    expected = [max(round(number / 4), 1) for number in range(60)]
    assert capacity_per_expert(tokens, 4, 1, 1.0, "round").tolist() == expected


@settings(deadline=None)
@given(choices=choices(), data=st.data())
def test_choices_and_mask_give_the_same_assignments(choices, data):
    rows, experts = choices
    expert = torch.tensor(rows)
    flags = st.lists(st.booleans(), min_size=len(rows[0]), max_size=len(rows[0]))
    keep = torch.tensor(data.draw(st.lists(flags, min_size=len(rows), max_size=len(rows))))
    weights = torch.rand(len(rows), experts)
    mask = torch.zeros(len(rows), experts, dtype=torch.bool).scatter(1, expert, keep)
    for by_choice, by_mask in zip(
        assign_choices(expert, weights.gather(1, expert), experts, keep), assign_mask(mask, weights), strict=True
    ):
        assert torch.equal(by_choice, by_mask)


def test_hand_typed_assignments():
    expert = torch.tensor([[2, 0], [0, 1], [2, 1]])
    weight = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]])
    token, weights, tokens_per_expert = assign_choices(expert, weight, 4)
    assert token.tolist() == [0, 1, 1, 2, 0, 2]
    assert weights.tolist() == pytest.approx([0.3, 0.6, 0.4, 0.1, 0.7, 0.9])
    assert tokens_per_expert.tolist() == [2, 2, 2, 0]


def test_gshard_counterexample_of_causality():
    # With one place per expert, token 1's first choice decides whether token 0 keeps its second one.
    elsewhere, evicts = torch.tensor([[0, 1], [2, 1]]), torch.tensor([[0, 1], [1, 2]])
    assert within_capacity(elsewhere, 1, None, "choice").tolist() == [[True, True], [True, False]]
    assert within_capacity(evicts, 1, None, "choice").tolist() == [[True, False], [True, True]]
    for expert in (elsewhere, evicts):
        assert within_capacity(expert, 1, None, "token")[0].tolist() == [True, True]


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "factor", "places"),
    [
        (100, 10, 1, 1.1, 11),  # 11.000000000000002 in floating point
        (5, 4, 1, 1.0, 2),
        (8, 4, 1, 1.0, 2),
        (8, 4, 2, 1.25, 5),
        (8, 4, 1, 1.25, 3),
        (1, 8, 1, 1.0, 1),
        (0, 8, 1, 1.0, 1),
        (2**24 + 3, 1, 1, 1.0, 2**24 + 3),  # more than single precision counts
    ],
)
def test_capacity_is_rounded_up(tokens, experts, top_k, factor, places):
    assert int(capacity_per_expert(torch.tensor(tokens), experts, top_k, factor)) == places


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_capacity_factor_must_leave_a_place(factor):
    with pytest.raises(ConfigError, match=f"capacity={factor}: expected a finite factor above 0, or null for dropless"):
        check_capacity_factor("capacity", factor)
