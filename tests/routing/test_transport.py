"""Transport plans against POT.

Shapes: G pools, n tokens of a pool, E experts.
"""

from __future__ import annotations

import contextlib
import io
import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evomoe.errors import ConfigError
from evomoe.routing.transport import Sinkhorn, SparseTransport, check_combine, project_sparse_simplex

TO_THE_END = Sinkhorn(iterations=500, tolerance=0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_real(logits: Tensor) -> Tensor:
    return torch.ones(logits.shape[:2], dtype=torch.bool)


# Sinkhorn


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 5.0])
@pytest.mark.parametrize(("tokens", "experts"), [(64, 4), (7, 3), (3, 8), (5, 1)])
def test_sinkhorn_is_that_of_pot(epsilon, tokens, experts):
    logits = draw(2, tokens, experts)
    plans = Sinkhorn(epsilon, 2000, 0).log_plan(logits, all_real(logits)).exp()
    for plan, of_pool in zip(plans, logits, strict=True):
        masses = np.ones(tokens), np.full(experts, tokens / experts)
        expected = ot.sinkhorn(*masses, -of_pool.numpy(), reg=epsilon, numItermax=20_000, stopThr=1e-13)
        np.testing.assert_allclose(plan.numpy(), expected, atol=1e-9)


def test_published_number_of_iterations_balances_the_load_of_normal_logits():
    logits = draw(3, 196, 32).float()
    plan = Sinkhorn(tolerance=0).log_plan(logits, all_real(logits)).exp()
    torch.testing.assert_close(plan.sum(dim=2), torch.ones(3, 196))
    torch.testing.assert_close(plan.sum(dim=1), torch.full((3, 32), 196 / 32), rtol=1e-5, atol=0)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50))
def test_a_constant_on_a_token_or_an_expert_changes_nothing(seed, shift):
    logits = draw(1, 9, 4, seed=seed)
    plan = TO_THE_END.log_plan(logits, all_real(logits)).exp()
    shifted = logits + shift * draw(1, 9, 1, seed=seed + 1) + shift * draw(1, 1, 4, seed=seed + 2)
    torch.testing.assert_close(TO_THE_END.log_plan(shifted, all_real(logits)).exp(), plan, atol=1e-6, rtol=0)
    torch.testing.assert_close(TO_THE_END.log_plan(logits.log_softmax(dim=2), all_real(logits)).exp(), plan)


def test_logits_that_overflow_as_exponentials_have_a_plan():
    logits = 1000 * draw(2, 16, 4).float()
    plan = Sinkhorn(iterations=20).log_plan(logits, all_real(logits)).exp()
    torch.testing.assert_close(plan.sum(dim=2), torch.ones(2, 16))


def test_a_balanced_load_need_not_be_balanced_in_its_best_entries():
    logits = draw(1, 64, 4)
    plan = TO_THE_END.log_plan(logits, all_real(logits)).exp()
    torch.testing.assert_close(plan.sum(dim=1), torch.full((1, 4), 16.0, dtype=torch.float64))
    assert plan.argmax(dim=2).flatten().bincount(minlength=4).tolist() != [16] * 4


def test_the_tolerance_bounds_the_error_of_the_load():
    logits = 2 * draw(1, 64, 8).float()
    errors = {}
    for tolerance in (1e-1, 1e-3, 1e-5):
        load = Sinkhorn(iterations=500, tolerance=tolerance).log_plan(logits, all_real(logits)).exp().sum(dim=1)
        errors[tolerance] = float((load / 8 - 1).abs().max())
        assert errors[tolerance] < tolerance
    assert errors[1e-1] > errors[1e-3] > errors[1e-5]


def test_a_pool_does_not_depend_on_the_others():
    logits = torch.cat([draw(1, 12, 4), 10 * draw(1, 12, 4, seed=1), torch.zeros(1, 12, 4, dtype=torch.float64)])
    solver = Sinkhorn(iterations=50)
    together = solver.log_plan(logits, all_real(logits)).exp()
    for pool, plan in zip(logits.split(1), together.split(1), strict=True):
        assert torch.equal(solver.log_plan(pool, all_real(pool)).exp(), plan)


def test_padding_carries_no_mass():
    logits, valid = draw(2, 9, 3), torch.arange(9).expand(2, 9) % 3 != 1
    packed = TO_THE_END.log_plan(logits[:, valid[0]], all_real(logits[:, valid[0]])).exp()
    torch.testing.assert_close(TO_THE_END.log_plan(logits, valid).exp()[:, valid[0]], packed)
    assert TO_THE_END.log_plan(logits, torch.zeros_like(valid)).exp().isfinite().all()


def test_nothing_is_read_from_a_device_that_would_have_to_be_waited_for():
    logits = torch.empty(2, 9, 3, device="meta")  # a device without values: to read one is an error
    assert Sinkhorn().log_plan(logits, torch.ones(2, 9, dtype=torch.bool, device="meta")).shape == (2, 9, 3)


def test_gradient_of_the_plan_is_that_of_a_softmax_with_constant_prices():
    logits = draw(1, 6, 3).requires_grad_()
    plan = TO_THE_END.log_plan(logits, all_real(logits)).exp()
    prices = (plan.log() - logits).detach()
    direction = draw(1, 6, 3, seed=1)
    (found,) = torch.autograd.grad((plan * direction).sum(), logits)
    (expected,) = torch.autograd.grad(((logits + prices).softmax(dim=2) * direction).sum(), logits)
    torch.testing.assert_close(found, expected)


# The sparse projection


@pytest.mark.parametrize(
    ("values", "k", "expected"),
    [
        ([0.9, 0.2, 0.5, -0.1], 1, [1, 0, 0, 0]),
        ([0.9, 0.2, 0.5, -0.1], 2, [0.7, 0, 0.3, 0]),
        ([0.9, 0.2, 0.5, -0.1], 4, [0.7, 0, 0.3, 0]),
        ([0.5, 0.4, 0.3, 0.2], 2, [0.55, 0.45, 0, 0]),
        ([0.5, 0.4, 0.3, 0.2], 3, [13 / 30, 10 / 30, 7 / 30, 0]),
        ([0.5, 0.4, 0.3, 0.2], 4, [0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_projections_worked_by_hand(values, k, expected):
    found = project_sparse_simplex(torch.tensor(values), torch.tensor([k]))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


@settings(deadline=None)
@given(n=st.integers(1, 12), k=st.integers(1, 12), scale=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 1000))
def test_projection_is_that_of_pot(n, k, scale, seed):
    values, k = scale * draw(5, n, seed=seed), min(k, n)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = ot.utils.projection_sparse_simplex(values.numpy(), k, axis=1)
    np.testing.assert_allclose(project_sparse_simplex(values, torch.tensor([k])).numpy(), expected, atol=1e-12)


def test_each_row_may_have_its_own_number_of_places():
    values = draw(3, 6)
    together = project_sparse_simplex(values, torch.tensor([[1], [3], [6]]))
    for row, places, projected in zip(values, (1, 3, 6), together, strict=True):
        torch.testing.assert_close(project_sparse_simplex(row, torch.tensor([places])), projected)


def test_jacobian_of_the_projection_is_the_identity_minus_the_mean_of_the_support():
    values = torch.tensor([0.5, 0.4, 0.3, 0.2], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: project_sparse_simplex(x, torch.tensor([3])), values)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[:3, :3] = torch.eye(3) - 1 / 3
    torch.testing.assert_close(jacobian, expected)
    assert torch.autograd.gradcheck(lambda x: project_sparse_simplex(x, torch.tensor([3])), draw(2, 6).requires_grad_())


# Sparsity-constrained transport


def sparse_problem(n: int = 16, experts: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Benefit ``(1, E, n)`` and the mask of real tokens."""
    benefit = draw(1, n, experts, seed=seed).softmax(dim=2).transpose(1, 2).contiguous()
    return benefit, torch.ones(1, n, dtype=torch.bool)


def semi_dual(benefit: Tensor, potential: Tensor, k: int, gamma: float) -> float:
    """Its value at ``potential (1, n)``: equation 8, with the benefit as minus the cost."""
    valid = torch.ones(potential.shape, dtype=torch.bool)
    plan = SparseTransport(gamma).plan(benefit, potential, valid, torch.tensor([[k]]))
    gain = (plan * (potential[:, None] + benefit)).sum() - gamma / 2 * plan.square().sum()
    return float(potential.sum() - gain)


def pot(benefit: Tensor, k: int, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """POT's plan ``(n, E)`` and its potentials ``(n,)``."""
    _, experts, n = benefit.shape
    regularizer = {"reg_type": "l2"} if k == n else {"reg_type": "sparsity_constrained", "max_nz": k}
    masses = np.ones(n), np.full(experts, n / experts)
    with contextlib.redirect_stdout(io.StringIO()):
        plan, log = ot.smooth.smooth_ot_semi_dual(
            *masses, -benefit[0].t().numpy(), gamma, **regularizer, numItermax=5000, stopThr=1e-12, log=True
        )
    return plan, log["alpha"]


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("k", [4, 5, 8, 16])
def test_semi_dual_climbs_to_pots_optimum(k, gamma):
    benefit, valid = sparse_problem()
    places = torch.tensor([[k]])
    theirs_plan, theirs = pot(benefit, k, gamma)
    np.testing.assert_allclose(theirs_plan.sum(axis=0), 4.0, atol=1e-9)
    best = semi_dual(benefit, torch.tensor(theirs)[None], k, gamma)
    reached = {}
    for iterations in (20, 1000):
        solver = SparseTransport(gamma, iterations)
        potential = solver.potentials(benefit, valid, places)
        plan = solver.plan(benefit, potential, valid, places)
        reached[iterations] = semi_dual(benefit, potential, k, gamma)
        torch.testing.assert_close(plan.sum(dim=2), torch.full((1, 4), 4.0, dtype=torch.float64))
        assert (plan.count_nonzero(dim=2) <= k).all()
    start = semi_dual(benefit, torch.zeros(1, 16, dtype=torch.float64), k, gamma)
    # Near the optimum the steps of Adam are longer than the way that is left.
    assert min(start, best - 1e-3) < reached[20] <= best + 1e-6
    assert reached[1000] == pytest.approx(best, abs=5e-3)
    assert reached[1000] <= best + 1e-6


def test_without_a_bound_the_plan_is_that_of_quadratic_transport():
    benefit, valid = sparse_problem()
    solver, places = SparseTransport(iterations=300), torch.tensor([[16]])
    plan = solver.plan(benefit, solver.potentials(benefit, valid, places), valid, places)
    np.testing.assert_allclose(plan[0].t().numpy(), pot(benefit, 16, 1.0)[0], atol=1e-6)
    torch.testing.assert_close(plan.sum(dim=1), torch.ones(1, 16, dtype=torch.float64))


def test_padding_and_other_pools_change_no_sparse_plan():
    (first, _), (second, _) = sparse_problem(seed=1), sparse_problem(seed=2)
    benefit = torch.cat([first, second, second])
    valid = torch.ones(3, 16, dtype=torch.bool)
    valid[1, 10:] = False
    valid[2] = False
    places = torch.tensor([[4], [3], [0]])
    solver = SparseTransport()
    plan = solver.plan(benefit, solver.potentials(benefit, valid, places), valid, places)
    assert plan.isfinite().all()
    alone = solver.plan(first, solver.potentials(first, valid[:1], places[:1]), valid[:1], places[:1])
    torch.testing.assert_close(plan[:1], alone)
    packed, real = second[:, :, :10], valid[1:2, :10]
    alone = solver.plan(packed, solver.potentials(packed, real, places[1:2]), real, places[1:2])
    torch.testing.assert_close(plan[1:2, :, :10], alone)
    assert torch.equal(plan[1, :, 10:], torch.zeros(4, 6, dtype=torch.float64))


class CountReads(TorchDispatchMode):
    """Counts the values that leave their device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_number_of_places_is_read_once_for_all_iterations():
    benefit, valid = sparse_problem()
    with CountReads() as reads:
        SparseTransport(iterations=20).potentials(benefit, valid, torch.tensor([[4]]))
    assert reads.count == 1


# Mistakes


ABOVE_0 = "expected a finite value above 0, the published one is"
AT_LEAST_1 = "router iterations=0: expected 1 or more, the published number is 20"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Sinkhorn(epsilon=0.0), f"router epsilon=0.0: {ABOVE_0} 1"),
        (lambda: Sinkhorn(epsilon=math.nan), f"router epsilon=nan: {ABOVE_0} 1"),
        (lambda: Sinkhorn(iterations=0), AT_LEAST_1),
        (lambda: Sinkhorn(tolerance=-1.0), "router tolerance=-1.0: expected 0 (all iterations) or more, such as 0.001"),
        (lambda: SparseTransport(gamma=-1.0), f"router gamma=-1.0: {ABOVE_0} 1"),
        (lambda: SparseTransport(iterations=0), AT_LEAST_1),
        (lambda: SparseTransport(learning_rate=math.inf), f"router learning_rate=inf: {ABOVE_0} 0.01"),
        (lambda: check_combine("gate"), "router combine='gate' is unknown: expected softmax or plan"),
    ],
)
def test_errors_name_the_value_and_the_remedy(build, message):
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value) == message
