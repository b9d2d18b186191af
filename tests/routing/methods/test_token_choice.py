"""The token choice of vision, against its definitions and POT.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.routing import RoutingInput, SinkhornTokenChoice, SoftmaxTokenChoice, SparseRouting

DROPLESS = {"capacity_factor": None, "eval_capacity_factor": None}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def route(
    router: type[SoftmaxTokenChoice],
    logits: Tensor,
    *,
    batch: int = 1,
    train: bool = False,
    valid: Tensor | None = None,
    **options: object,
) -> SparseRouting:
    """What the gate makes of ``logits (T, E)``."""
    tokens, experts = logits.shape
    built = router(tokens, experts, **options).train(train)
    with torch.no_grad():
        built.gate.weight.copy_(logits.t())
    torch.manual_seed(7)
    return built(RoutingInput(hidden=torch.eye(tokens), batch=batch, sequence=tokens // batch, valid=valid))


def noisy(logits: Tensor, noise: float) -> Tensor:
    """The logits with the noise that :func:`route` makes the router draw."""
    torch.manual_seed(7)
    return logits + noise / logits.shape[1] * torch.randn_like(logits)


def kept(routing: SparseRouting) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in routing.to_dense()]


# Softmax


def test_choices_and_weights_are_those_of_the_softmax_with_noise_in_training_alone():
    logits = draw(40, 4)
    for train, expected in ((False, logits), (True, noisy(logits, 3.0))):
        routing = route(SoftmaxTokenChoice, logits, train=train, noise=3.0, top_k=2, **DROPLESS)
        best = expected.softmax(dim=1).topk(2, dim=1)
        torch.testing.assert_close(routing.to_dense(), torch.zeros(40, 4).scatter(1, best.indices, best.values))
        torch.testing.assert_close(routing.scores, logits.softmax(dim=1))
    assert not torch.equal(logits.argmax(dim=1), noisy(logits, 3.0).argmax(dim=1))


def test_the_choice_is_that_of_the_logits_where_probabilities_underflow():
    logits = torch.tensor([[1000.0, 10.0, 20.0, 800.0, 30.0, 40.0, 50.0, 60.0]])
    assert route(SoftmaxTokenChoice, logits, top_k=2, **DROPLESS).expert.tolist() == [0, 3]


@pytest.mark.parametrize("train", [True, False])
def test_losses_are_those_of_v_moe(train):
    """Importance and load, by loops over the real tokens."""
    logits, noise, top_k = draw(24, 4), 2.0, 2
    valid = torch.arange(24) % 5 != 3
    routing = route(SoftmaxTokenChoice, logits, train=train, valid=valid, noise=noise, top_k=top_k)
    seen = noisy(logits, noise) if train else logits
    importance, load = np.zeros(4), np.zeros(4)
    for token in valid.nonzero().flatten().tolist():
        importance += logits[token].softmax(dim=0).numpy()
        threshold = sorted(seen[token].tolist())[-top_k]
        load += 1 - norm.cdf((threshold - logits[token].numpy()) / (noise / 4))
    for name, amounts in (("importance", importance), ("load", load)):
        expected = (np.std(amounts) / np.mean(amounts)) ** 2
        assert routing.losses[name].item() == pytest.approx(expected, rel=1e-4), name


def test_a_load_without_noise_is_counted():
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    losses = route(SoftmaxTokenChoice, logits, noise=0.0, **DROPLESS).losses
    assert losses["load"].item() == pytest.approx((1 / 2) ** 2)  # 3 and 1 tokens: deviation 1, mean 2


def test_both_losses_teach_the_gate():
    router = SoftmaxTokenChoice(8, 4)
    routing = router(RoutingInput(hidden=draw(20, 8), batch=1, sequence=20))
    for name in ("importance", "load"):
        (gradient,) = torch.autograd.grad(routing.losses[name], router.gate.weight, retain_graph=True)
        assert gradient.abs().max() > 1e-4, name


CROWD = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1], [0.8, 0.2]]).log()
"""All four tokens prefer expert 0, the later ones more."""


def test_batch_priority_routing_serves_sure_tokens_first():
    options = {"capacity_factor": 1.0, "eval_capacity_factor": 1.0}  # two places an expert
    assert kept(route(SoftmaxTokenChoice, CROWD, **options)) == [[0], [0], [], []]
    assert kept(route(SoftmaxTokenChoice, CROWD, priority="best", **options)) == [[], [], [0], [0]]
    assert kept(route(SoftmaxTokenChoice, CROWD, priority="best", top_k=2, **options)) == [[0, 1]] * 4
    half = {"capacity_factor": 0.5, "eval_capacity_factor": 0.5}
    assert kept(route(SoftmaxTokenChoice, CROWD, priority="best", top_k=2, **half)) == [[], [], [0, 1], [0, 1]]


def test_images_have_places_of_their_own_or_share_them():
    options = {"eval_capacity_factor": 1.0}
    apart = route(SoftmaxTokenChoice, CROWD, batch=2, pool="sequence", **options)
    assert kept(apart) == [[0], [], [0], []]
    assert apart.dropped == 2
    assert kept(route(SoftmaxTokenChoice, CROWD, batch=2, pool="batch", **options)) == [[0], [0], [], []]


def test_capacity_in_training_and_evaluation_and_its_multiple():
    options = {"capacity_factor": 0.5, "eval_capacity_factor": 1.0, "noise": 0.0}
    assert route(SoftmaxTokenChoice, CROWD, train=True, **options).tokens_per_expert.tolist() == [1, 0]
    assert route(SoftmaxTokenChoice, CROWD, **options).tokens_per_expert.tolist() == [2, 0]
    assert route(SoftmaxTokenChoice, CROWD, capacity_multiple=4, **options).tokens_per_expert.tolist() == [4, 0]


# Sinkhorn


@pytest.mark.parametrize("combine", ["softmax", "plan"])
@pytest.mark.parametrize("epsilon", [0.5, 1.0])
def test_sinkhorn_chooses_the_best_of_each_row_of_pots_plan(combine, epsilon):
    logits = draw(24, 4, seed=3) + torch.tensor([2.0, 0.0, 0.0, -1.0])
    options = {"combine": combine, "epsilon": epsilon, "pool": "sequence", "iterations": 500, "tolerance": 0.0}
    dense = route(SinkhornTokenChoice, logits, batch=2, top_k=2, **options, **DROPLESS).to_dense()
    for pool, found in zip(logits.split(12), dense.split(12), strict=True):
        plan = ot.sinkhorn(np.ones(12), np.full(4, 3.0), -pool.double().numpy(), reg=epsilon, stopThr=1e-12)
        plan = torch.from_numpy(plan).float()
        chosen = torch.zeros(12, 4).scatter(1, plan.topk(2, dim=1).indices, 1.0)
        weights = plan if combine == "plan" else pool.softmax(dim=1)
        torch.testing.assert_close(found, chosen * weights, atol=1e-5, rtol=1e-4)


def test_the_plan_evens_the_load_out_and_the_capacity_bounds_what_is_left():
    logits = draw(64, 8) + 2 * draw(1, 8, seed=1)
    plain = route(SoftmaxTokenChoice, logits, **DROPLESS).tokens_per_expert
    planned = route(SinkhornTokenChoice, logits, **DROPLESS)
    assert planned.tokens_per_expert.max() < plain.max() / 2
    assert planned.losses == {}
    bounded = route(SinkhornTokenChoice, logits, eval_capacity_factor=1.0)
    assert bounded.tokens_per_expert.max() == 8
    assert bounded.dropped == (planned.tokens_per_expert - 8).clamp(min=0).sum() > 0


def test_noise_reaches_the_plan_in_training_alone():
    logits = draw(32, 4)
    quiet = route(SinkhornTokenChoice, noisy(logits, 4.0), combine="plan", **DROPLESS)
    torch.testing.assert_close(
        route(SinkhornTokenChoice, logits, train=True, noise=4.0, combine="plan", **DROPLESS).to_dense(),
        quiet.to_dense(),
    )
    still = route(SinkhornTokenChoice, logits, noise=4.0, combine="plan", **DROPLESS).to_dense()
    assert not torch.equal(still > 0, quiet.to_dense() > 0)


def test_weights_of_the_plan_teach_the_gate():
    router = SinkhornTokenChoice(8, 4, combine="plan")
    routing = router(RoutingInput(hidden=draw(20, 8), batch=1, sequence=20))
    (routing.weight * draw(routing.weight.numel(), seed=4)).sum().backward()
    assert router.gate.weight.grad.abs().max() > 1e-3


# What a token sees


@pytest.mark.parametrize(
    ("router", "options", "causal"),
    [
        (SoftmaxTokenChoice, {}, True),
        (SoftmaxTokenChoice, {"top_k": 2}, False),
        (SoftmaxTokenChoice, {"priority": "best"}, False),
        (SoftmaxTokenChoice, {"priority": "best", "pool": "position"}, True),
        (SinkhornTokenChoice, {}, False),
        (SinkhornTokenChoice, {"pool": "sequence"}, False),
        (SinkhornTokenChoice, {"pool": "position"}, True),
    ],
)
def test_it_says_whether_it_looks_ahead(router, options, causal):
    built = router(8, 4, **options)
    assert built.causal_in_train is built.causal_in_eval is causal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "router top_k=5: expected 1 to 4, the number of experts"),
        ({"capacity_multiple": 0}, "router capacity_multiple=0: expected 1 or more; V-MoE rounds up to multiples of 4"),
        ({"pool": "image"}, "router pool='image' is unknown: expected one of sequence, batch, position"),
        ({"noise": -1.0}, "router noise=-1.0: expected 0 for none, or a finite value above it; V-MoE's is 1"),
        ({"priority": "first"}, "router priority='first' is unknown: expected one of token, choice, best"),
        ({"combine": "gate"}, "router combine='gate' is unknown: expected softmax or plan"),
        ({"epsilon": 0.0}, "router epsilon=0.0: expected a finite value above 0, the published one is 1"),
    ],
)
def test_errors_name_the_value_and_the_remedy(options, message):
    with pytest.raises(ConfigError) as error:
        SinkhornTokenChoice(8, 4, **options)
    assert str(error.value) == message
