from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomoe.errors import ConfigError
from evomoe.routing import Schedule

SHAPES = ["linear", "exponential", "cosine"]
shapes = st.sampled_from(SHAPES)
values = st.floats(1e-3, 1e3)


@given(start=values, end=values, length=st.integers(1, 10_000), shape=shapes)
def test_starts_at_start_and_stays_at_end(start, end, length, shape):
    schedule = Schedule(start, end, length, shape)
    assert schedule.at(0) == pytest.approx(start)
    assert schedule.at(-5) == schedule.at(0)
    assert schedule.at(length) == schedule.at(length + 1) == schedule.at(10 * length) == end


@given(start=values, end=values, length=st.integers(1, 200), shape=shapes)
def test_is_monotone_and_between_its_ends(start, end, length, shape):
    way = [Schedule(start, end, length, shape).at(step) for step in range(length + 2)]
    sign = 1 if end >= start else -1
    slack = 1e-9 * max(start, end)
    assert all(sign * (later - earlier) >= -slack for earlier, later in itertools.pairwise(way))
    assert min(start, end) - slack <= min(way)
    assert max(way) <= max(start, end) + slack


def test_hand_typed_values():
    assert [Schedule(2.0, 0.5, 3).at(step) for step in range(5)] == [2.0, 1.5, 1.0, 0.5, 0.5]
    assert [Schedule(8.0, 1.0, 3, "exponential").at(step) for step in range(5)] == pytest.approx([8, 4, 2, 1, 1])
    assert [Schedule(1.0, 0.0, 4, "cosine").at(step) for step in range(6)] == pytest.approx(
        [1, 0.853553, 0.5, 0.146447, 0, 0], abs=1e-6
    )


def test_published_translation_recipe():
    # WMT: temperature 2.0 to 0.5 over 5000 steps, max(2 - t * 1.5 / 5000, 0.5).
    schedule = Schedule(2.0, 0.5, 5000)
    for step in (0, 1, 1234, 4999, 5000, 5999):
        assert schedule.at(step) == pytest.approx(max(2 - step * 1.5 / 5000, 0.5))


@pytest.mark.parametrize("shape", SHAPES)
def test_length_zero_means_the_end_at_once(shape):
    schedule = Schedule(2.0, 0.5, 0, shape)
    assert schedule.at(-1) == schedule.at(0) == schedule.at(1) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0, 5, "flat"), "schedule shape='flat' is unknown: expected one of linear, exponential, cosine, step"),
        ((1, 0, -5), "schedule length=-5 is negative: expected a number of steps >= 0"),
        (
            (1, 0, 5, "exponential"),
            "an exponential schedule from 1 to 0 never arrives: both ends must be above zero; "
            "use shape=linear or shape=cosine",
        ),
    ],
)
def test_errors_name_the_value_and_the_remedy(arguments, message):
    with pytest.raises(ConfigError) as error:
        Schedule(*arguments)
    assert str(error.value) == message


def test_a_step_keeps_its_start_until_its_end():
    schedule = Schedule(2.0, 0.5, 3, "step")
    assert [schedule.at(step) for step in range(5)] == [2.0, 2.0, 2.0, 0.5, 0.5]
