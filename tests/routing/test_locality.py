"""The gate, the nodes and the capacity bounds of LocMoE and LocMoE+.

Shapes: T tokens, D model width, E experts, N nodes.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.routing import LocMoE, LocMoEPlus, RoutingInput
from evomoe.routing.locality import (
    cosine_affinity,
    grouped_average_pooling,
    local_distribution,
    locality_loss,
    log_cap_probability,
    log_capacity_erfc,
    log_capacity_exact,
    log_capacity_exponential,
    node_of,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def omega(width: int, experts: int) -> Tensor:
    """The fixed rows of the gate, ``(E, D)``, by their definition."""
    rows = torch.zeros(experts, width)
    for i in range(experts):
        for j in range(width):
            if i * width / experts <= j < (i + 1) * width / experts:
                rows[i, j] = experts / width
    return rows


# The gate


def test_pooling_is_the_dense_gate_with_fixed_rows():
    hidden, rows = draw(20, 24), omega(24, 4)
    torch.testing.assert_close(rows @ rows.t(), 4 / 24 * torch.eye(4))
    torch.testing.assert_close(grouped_average_pooling(hidden, 4), hidden @ rows.t())
    hand = torch.tensor([[1.0, 3.0, 0.0, -4.0, 5.0, 7.0]])
    assert grouped_average_pooling(hand, 3).tolist() == [[2, -2, 6]]
    assert grouped_average_pooling(hidden.bfloat16(), 4).dtype == torch.float32


def test_affinity_is_the_cosine_to_the_fixed_rows():
    hidden = draw(50, 24)
    expected = torch.nn.functional.cosine_similarity(hidden[:, None], omega(24, 4)[None], dim=2)
    affinity = cosine_affinity(hidden, 4)
    torch.testing.assert_close(affinity, expected)
    assert affinity.abs().max() <= 1
    assert (affinity.square().sum(dim=1) <= 1 + 1e-6).all(), "the rows are orthogonal"
    torch.testing.assert_close(cosine_affinity(1e3 * hidden, 4), affinity)
    aligned = omega(24, 4)[2:3]
    torch.testing.assert_close(cosine_affinity(-5 * aligned, 4), torch.tensor([[0.0, 0.0, -1.0, 0.0]]))


def test_a_token_of_zeros_has_no_affinity_and_a_finite_gradient():
    hidden = torch.zeros(2, 8, requires_grad=True)
    affinity = cosine_affinity(hidden, 4)
    assert torch.equal(affinity, torch.zeros(2, 4))
    affinity.sum().backward()
    assert hidden.grad.isfinite().all()


# Nodes


@pytest.mark.parametrize(
    ("number", "nodes", "expected"),
    [
        (4, 2, [0, 0, 1, 1]),
        (6, 3, [0, 0, 1, 1, 2, 2]),
        (5, 2, [0, 0, 0, 1, 1]),
        (4, 1, [0, 0, 0, 0]),
        (3, 3, [0, 1, 2]),
        (1, 4, [0]),
        (2, 4, [0, 2]),
    ],
)
def test_nodes_hold_contiguous_blocks(number, nodes, expected):
    assert node_of(number, nodes).tolist() == expected


def test_local_distribution_by_hand():
    expected = torch.tensor([[0.4, 0.4, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4]])
    torch.testing.assert_close(local_distribution(4, 2, 0.2), expected)
    torch.testing.assert_close(local_distribution(4, 1, 0.2), torch.full((1, 4), 0.25))
    uneven = torch.tensor([[0.45, 0.45, 0.1], [0.05, 0.05, 0.9]])
    torch.testing.assert_close(local_distribution(3, 2, 0.1), uneven)


def inputs_for(batch: int, sequence: int, valid: Tensor | None = None) -> RoutingInput:
    return RoutingInput(hidden=torch.zeros(batch * sequence, 1), batch=batch, sequence=sequence, valid=valid)


def test_locality_loss_by_hand():
    local = local_distribution(4, 2, 0.2)
    at_home = torch.tensor([[0.8, 0.0, 0.1, 0.1], [0.0, 0.8, 0.1, 0.1]])
    away = torch.tensor([[0.4, 0.4, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1]])
    loss = locality_loss(torch.cat([at_home, away]), local, inputs_for(2, 2))
    # Node 0: its mean is the local distribution. Node 1: .8 ln(.4 / .1) + .2 ln(.1 / .4).
    assert loss.item() == pytest.approx(0.5 * 0.6 * math.log(4), rel=1e-6)
    on_node_0 = locality_loss(torch.cat([at_home, away]), local, inputs_for(1, 4))
    assert on_node_0.item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(("batch", "nodes"), [(4, 2), (5, 3), (2, 4), (1, 2), (3, 1)])
def test_locality_loss_against_scipy(batch, nodes):
    sequence, experts = 6, 8
    valid = torch.rand(batch * sequence, generator=torch.Generator().manual_seed(1)) < 0.7
    probabilities = (2 * draw(batch * sequence, experts)).softmax(dim=1) * valid[:, None]
    local = local_distribution(experts, nodes, 0.1)
    expected = 0.0
    for node in range(nodes):
        of_node = torch.tensor([t // sequence * nodes // batch == node for t in range(batch * sequence)]) & valid
        if of_node.any():
            current = probabilities[of_node].double().mean(dim=0)
            expected += int(of_node.sum()) / int(valid.sum()) * stats.entropy(current, local[node].double())
    loss = locality_loss(probabilities, local, inputs_for(batch, sequence, valid))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_locality_loss_rises_with_the_share_that_leaves():
    local, losses = local_distribution(4, 2, 0.1), []
    for away in (0.1, 0.3, 0.5, 0.8, 1.0):
        row = torch.tensor([(1 - away) / 2, (1 - away) / 2, away / 2, away / 2])
        losses.append(locality_loss(row.repeat(3, 1), local, inputs_for(1, 3)).item())
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses == sorted(losses)
    assert losses[-1] == pytest.approx(math.log(0.5 / 0.05), rel=1e-5)


def test_locality_loss_has_a_finite_gradient_where_nobody_considers_an_expert():
    logits = torch.tensor([[1e4, 0.0, 0.0, -1e4]] * 3, requires_grad=True)
    loss = locality_loss(logits.softmax(dim=1), local_distribution(4, 2, 0.1), inputs_for(1, 3))
    loss.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("router", [LocMoE, LocMoEPlus])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_nodes": 0}, "router num_nodes=0 with 4 experts: expected 1 to 4, so that every node holds an expert"),
        ({"num_nodes": 5}, "router num_nodes=5 with 4 experts: expected 1 to 4, so that every node holds an expert"),
        ({"smoothing": 0.0}, "router smoothing=0.0: expected a share in (0, 1), at 0 the loss is infinite"),
        (
            {"capacity_factor": 0.0},
            "router capacity_factor=0.0: expected a finite factor above 0, or null for dropless routing",
        ),
    ],
)
def test_errors_name_the_value_and_the_remedy(router, options, message):
    with pytest.raises(ConfigError) as error:
        router(8, 4, **options)
    assert str(error.value) == message


@pytest.mark.parametrize("router", [LocMoE, LocMoEPlus])
def test_a_width_that_cannot_be_shared_out_is_refused(router):
    with pytest.raises(ConfigError) as error:
        router(10, 4)
    assert str(error.value) == (
        "d_model=10 with 4 experts: grouped average pooling needs one block of features for each expert; choose a "
        "d_model that is a multiple of num_experts"
    )


@pytest.mark.parametrize("router", [LocMoE, LocMoEPlus])
def test_the_gate_has_nothing_to_learn_save_or_multiply(router):
    built = router(8, 4)
    assert list(built.parameters()) == []
    assert built.state_dict() == {}
    assert built.flops_per_token() == 0


# Capacity


@pytest.mark.parametrize(
    ("d_model", "delta", "experts", "exact", "erfc", "exponential"),
    [
        (5120, 0.03, 16, 1.965, 1.966, 0.627),
        (1024, 0.1, 16, 46.4, 46.8, 10.7),
        (64, 0.3, 4, 16.5, 17.8, 5.1),
    ],
)
def test_bounds_of_theorem_1(d_model, delta, experts, exact, erfc, exponential):
    found = [
        math.exp(bound(experts, d_model, delta))
        for bound in (log_capacity_exact, log_capacity_erfc, log_capacity_exponential)
    ]
    assert found == pytest.approx([exact, erfc, exponential], rel=5e-3)


@given(d_model=st.integers(2, 200), delta=st.floats(0.01, 0.95))
def test_cap_probability_is_the_area_of_two_caps(d_model, delta):
    """The density of one coordinate of a uniform direction is proportional to (1 - t^2)^((d - 3) / 2)."""
    symmetric_beta = stats.beta((d_model - 1) / 2, (d_model - 1) / 2)  # of (1 + t) / 2
    expected = 2 * symmetric_beta.sf((1 + delta) / 2)
    assert math.exp(log_cap_probability(d_model, delta)) == pytest.approx(expected, rel=1e-6, abs=1e-200)


def test_cap_probability_of_random_directions():
    directions = torch.nn.functional.normalize(draw(100_000, 64), dim=1)
    for delta in (0.125, 0.3):
        share = (directions[:, 0].abs() >= delta).double().mean().item()
        assert share == pytest.approx(math.exp(log_cap_probability(64, delta)), abs=0.004)


@given(d_model=st.integers(3, 6000), delta=st.floats(0.001, 0.95), experts=st.integers(1, 256))
def test_the_exponential_form_is_the_lowest(d_model, delta, experts):
    lowest = log_capacity_exponential(experts, d_model, delta)
    assert lowest <= log_capacity_exact(experts, d_model, delta) + 1e-6
    assert lowest <= log_capacity_erfc(experts, d_model, delta) + 1e-9


def test_no_bound_overflows_for_wide_states_close_to_an_expert():
    assert log_capacity_exact(8, 8192, 0.9) == math.inf, "its chance underflows"
    assert log_capacity_exponential(8, 8192, 0.9) == pytest.approx(8192 * 0.81 / 1.19 - math.log(8))
    assert log_capacity_erfc(8, 8192, 0.9) == pytest.approx(8192 * 0.81 / 1.19, rel=0.01)
