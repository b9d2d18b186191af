from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.routing import CosineRouter, RoutingInput, SparseRouting

D, E, T = 12, 4, 18


def build(experts: int = E, seed: int = 0, **options) -> CosineRouter:
    torch.manual_seed(seed)
    return CosineRouter(D, experts, **options)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def route(router: CosineRouter, hidden: Tensor) -> SparseRouting:
    return router(RoutingInput(hidden=hidden, batch=1, sequence=hidden.shape[0]))


def rotating() -> tuple[CosineRouter, Tensor]:
    """A router whose logits are those of the states over their length, and balanced states of length 6 ** 0.5."""
    router = CosineRouter(E, E, projection_dim=E, temperature=6**-0.5)
    with torch.no_grad():
        router.gate.projection.copy_(torch.eye(E))
        router.gate.experts.copy_(torch.eye(E))
    falling = torch.tensor([2.0, 1.0, 0.0, -1.0])
    return router, torch.stack([falling.roll(shift) for shift in range(E)]).repeat(3, 1)


def test_logits_are_cosines_over_the_temperature():
    router = build(projection_dim=3, temperature=0.2)
    hidden = draw(T, D)
    projected = hidden @ router.gate.projection.t()
    cosines = F.cosine_similarity(projected[:, None], router.gate.experts[None], dim=2)  # (T, E)
    torch.testing.assert_close(router.gate(hidden), cosines / 0.2)
    routing = route(router, hidden)
    probabilities = (cosines / 0.2).softmax(dim=1)
    torch.testing.assert_close(routing.scores, probabilities)
    best = probabilities.max(dim=1)
    torch.testing.assert_close(
        routing.to_dense(), torch.zeros(T, E).scatter(1, best.indices[:, None], best.values[:, None])
    )


def test_lengths_of_states_and_expert_vectors_do_not_matter():
    router = build()
    hidden = draw(T, D)
    before = router.gate(hidden)
    torch.testing.assert_close(router.gate(hidden * torch.linspace(0.1, 50, T)[:, None]), before)
    with torch.no_grad():
        router.gate.experts *= torch.linspace(0.1, 50, E)[:, None]
    torch.testing.assert_close(router.gate(hidden), before)


@pytest.mark.parametrize(
    ("log_scale", "largest"), [(0.0, 1.0), (math.log(7), 7.0), (20.0, 100.0), (-3.0, math.exp(-3))]
)
def test_no_logit_exceeds_the_scale_and_the_scale_its_bound(log_scale, largest):
    router = build()
    with torch.no_grad():
        router.gate.log_scale.fill_(log_scale)
    towards = router.gate.experts[2] @ torch.linalg.pinv(router.gate.projection).t()  # P towards = e_2
    logits = router.gate(torch.cat([100 * draw(T, D), towards[None].detach()]))
    assert logits.abs().max().item() == pytest.approx(largest, rel=1e-5)
    assert logits[-1].argmax().item() == 2


def test_a_state_of_zeros_is_undecided_and_has_finite_gradients():
    router = build()
    hidden = torch.zeros(3, D, requires_grad=True)
    routing = route(router, hidden)
    torch.testing.assert_close(routing.scores, torch.full((3, E), 1 / E))
    assert routing.losses["z"].item() == pytest.approx(math.log(E) ** 2)
    (routing.weight.sum() + routing.losses["z"]).backward()
    assert all(tensor.grad.isfinite().all() for tensor in (hidden, *router.parameters()))


def test_temperature_is_learned():
    router = build(temperature=0.5)
    assert router.gate.log_scale.item() == pytest.approx(math.log(2))
    optimizer = torch.optim.SGD([router.gate.log_scale], lr=0.1)
    hidden = draw(T, D)
    before = route(router, hidden).weight.mean()
    (-before).backward()
    optimizer.step()
    assert router.gate.log_scale.item() > math.log(2)
    assert route(router, hidden).weight.mean().item() > before.item()


def test_beyond_its_bound_the_temperature_still_has_a_gradient_that_leads_back():
    router = build()
    with torch.no_grad():
        router.gate.log_scale.fill_(math.log(150))
    logits = router.gate(draw(T, D))
    assert logits.abs().max() <= 100 * (1 + 1e-5)
    logits.square().mean().backward()
    torch.testing.assert_close(router.gate.log_scale.grad, 2 * logits.detach().square().mean())


def test_losses_at_balance():
    router, hidden = rotating()
    losses = route(router, hidden).losses
    assert losses["balance"].item() == pytest.approx(1)
    partition = math.log(sum(math.exp(logit) for logit in (2, 1, 0, -1)))
    assert losses["z"].item() == pytest.approx(partition**2, rel=1e-5)


def test_balance_loss_turns_the_overloaded_expert_away():
    router, hidden = rotating()
    hidden = torch.cat([hidden, torch.tensor([[0.1, 3.0, 0.2, -0.3]]).repeat(9, 1)])  # expert 1 is crowded
    before = route(router, hidden)
    before.losses["balance"].backward()
    with torch.no_grad():
        router.gate.experts -= 0.05 * router.gate.experts.grad
    assert route(router, hidden).scores.mean(dim=0)[1].item() < before.scores.mean(dim=0)[1].item()


def test_renaming_the_experts_renames_the_routing():
    router, renamed = build(), build()
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        renamed.gate.experts.copy_(router.gate.experts[order])
    hidden = draw(T, D)
    torch.testing.assert_close(route(router, hidden).to_dense()[:, order], route(renamed, hidden).to_dense())


@pytest.mark.parametrize(("experts", "dimensions"), [(1, 1), (2, 1), (5, 3), (8, 4)])
def test_the_hypersphere_has_half_as_many_dimensions_as_there_are_experts(experts, dimensions):
    router = build(experts)
    assert router.gate.projection.shape == (dimensions, D)
    assert router.flops_per_token() == 2 * dimensions * (D + experts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection_dim": 0}, "router projection_dim=0: expected at least 1, or null for E / 2"),
        ({"temperature": 0.0}, "router temperature=0.0: expected a finite value of 0.01 or above"),
        ({"temperature": math.inf}, "router temperature=inf: expected a finite value of 0.01 or above"),
        ({"top_k": 5}, "router top_k=5: expected 1 to 4, the number of experts"),
    ],
)
def test_errors_name_the_value_and_the_remedy(options, message):
    with pytest.raises(ConfigError) as error:
        build(**options)
    assert str(error.value) == message
