"""Expert sets from one validation to the next. Shapes: N tokens, E experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomoe.callbacks.monitoring.routing_stability import ExpertSets, Stability, mean_overlap

IDS = torch.tensor([5, 5, 9])
FIRST = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1]]).bool()
SECOND = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]]).bool()  # two tokens keep one of their two experts
THIRD = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 0, 1]]).bool()  # the last one changes back


def followed(*sets) -> Stability:
    stability = Stability(IDS, 3)
    for index, active in enumerate(sets):
        stability.add(10 * (index + 1), active)
    return stability


def test_fluctuation_typed_by_hand():
    stability = Stability(IDS, 3)
    assert stability.add(10, FIRST) is None
    assert stability.add(20, SECOND) == pytest.approx(1 - (1 + 1 / 2 + 1 / 2) / 3)
    assert stability.add(30, THIRD) == pytest.approx(1 - (1 + 1 + 1 / 2) / 3)
    assert stability.add(40, THIRD) == 0


def test_saturation_is_relative_to_the_last_validation():
    saturation = followed(FIRST, SECOND, THIRD).saturation()
    assert saturation == pytest.approx({10: (1 + 1 / 2 + 1) / 3, 20: (1 + 1 + 1 / 2) / 3, 30: 1.0})


def test_the_last_fluctuation_of_each_token():
    assert followed(FIRST, SECOND, THIRD, THIRD).last_fluctuation.tolist() == [0, 20, 30]
    assert followed(FIRST).last_fluctuation.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("first", "second", "overlap"),
    [
        ([1, 1, 0, 0], [1, 1, 0, 0], 1),
        ([1, 1, 0, 0], [0, 0, 1, 1], 0),
        ([1, 1, 1, 1], [1, 0, 0, 0], 1 / 4),  # from dense to one expert
        ([0, 0, 0, 0], [0, 0, 0, 0], 1),
        ([0, 0, 0, 0], [0, 1, 0, 0], 0),
    ],
)
def test_overlap_of_sets_of_different_size(first, second, overlap):
    first, second = torch.tensor([first]).bool(), torch.tensor([second]).bool()
    assert mean_overlap(first, second) == mean_overlap(second, first) == pytest.approx(overlap)


@given(experts=st.integers(1, 70), seed=st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_what_is_packed_into_bits_comes_back(experts, seed):
    generator = torch.Generator().manual_seed(seed)
    sets = [torch.rand(5, experts, generator=generator) < 0.3 for _ in range(3)]
    stability = Stability(torch.arange(5), experts)
    for step, active in enumerate(sets):
        stability.add(step, active)
    expected = {step: mean_overlap(active, sets[-1]) for step, active in enumerate(sets)}
    assert stability.saturation() == expected
    assert expected[2] == 1


def test_a_restored_one_goes_on_alike():
    kept = followed(FIRST, SECOND)
    state = kept.state_dict()
    restored = Stability.restore(state)
    assert restored.add(30, THIRD) == kept.add(30, THIRD)
    assert restored.saturation() == kept.saturation()
    assert restored.last_fluctuation.tolist() == kept.last_fluctuation.tolist()
    assert state["steps"] == [10, 20], "what was saved is not what goes on"
    assert state["last_fluctuation"].tolist() == [0, 20, 20]


def test_it_knows_its_tokens():
    stability = followed(FIRST)
    assert stability.follows(IDS.clone(), 3)
    assert not stability.follows(IDS.flip(0), 3)
    assert not stability.follows(IDS[:2], 3)
    assert not stability.follows(IDS, 4)


def test_the_first_tokens_are_taken_and_no_more():
    sets = ExpertSets(num_tokens=4, num_experts=3)
    sets.update(FIRST, IDS)
    sets.update(SECOND, IDS + 1)
    sets.update(THIRD, IDS + 2)
    ids, active = sets.compute()
    assert ids.tolist() == [5, 5, 9, 6]
    assert torch.equal(active, torch.cat([FIRST, SECOND[:1]]))
