from __future__ import annotations

import functools
import inspect
import math
from pathlib import Path

import numpy as np
import ot
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.models.generation import generate, trace_experts
from evomoe.models.gpt import GPT
from evomoe.routing import (
    ExpertChoice,
    RoutingInput,
    SinkhornExpertChoice,
    SoftmaxExpertChoice,
    SparseRouting,
    SparsityConstrainedExpertChoice,
)


def route(
    logits: Tensor, *, batch: int = 1, valid: Tensor | None = None, **options: object
) -> tuple[ExpertChoice, SparseRouting]:
    tokens, experts = logits.shape
    router = ExpertChoice(tokens, experts, **options)
    with torch.no_grad():
        router.gate.weight.copy_(logits.t())
    inputs = RoutingInput(hidden=torch.eye(tokens), batch=batch, sequence=tokens // batch, valid=valid)
    return router, router(inputs)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_hand_typed_choice():
    probabilities = torch.tensor([[0.5, 0.4, 0.1], [0.4, 0.3, 0.3], [0.2, 0.2, 0.6]])
    _, routing = route(probabilities.log(), capacity_factor=1.0)
    # One token each: experts 0 and 1 both take token 0, expert 2 takes token 2, and nobody takes token 1.
    expected = torch.tensor([[0.5, 0.4, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.6]])
    torch.testing.assert_close(routing.to_dense(), expected)
    assert routing.metrics["uncovered"].item() == pytest.approx(1 / 3)
    _, routing = route(probabilities.log(), capacity_factor=2.0)
    assert routing.to_dense().count_nonzero(dim=0).tolist() == [2, 2, 2]
    assert routing.metrics["uncovered"].item() == 0
    _, routing = route(probabilities.log(), capacity_factor=3.0)
    torch.testing.assert_close(routing.to_dense(), probabilities)


@settings(max_examples=60, deadline=None)
@given(
    pool=st.sampled_from(["sequence", "batch", "position"]),
    batch=st.integers(1, 4),
    sequence=st.integers(1, 5),
    experts=st.integers(1, 5),
    factor=st.sampled_from([0.3, 1.0, 1.1, 2.0, 9.0]),
    padded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_a_loop_over_pools_and_experts(pool, batch, sequence, experts, factor, padded, seed):
    tokens = batch * sequence
    logits = draw(tokens, experts, seed=seed)
    valid = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.6 if padded else None
    _, routing = route(logits, batch=batch, valid=valid, pool=pool, capacity_factor=factor)

    pools: dict[object, list[int]] = {}
    for token in range(tokens):
        if valid is None or valid[token]:
            key = {"sequence": token // sequence, "batch": 0, "position": token % sequence}[pool]
            pools.setdefault(key, []).append(token)
    probabilities = logits.softmax(dim=1)
    expected = torch.zeros(tokens, experts)
    for members in pools.values():
        places = min(max(math.ceil(len(members) * factor / experts - 1e-9), 1), len(members))
        for expert in range(experts):
            ranked = sorted(members, key=lambda token: -probabilities[token, expert].item())
            for token in ranked[:places]:
                expected[token, expert] = probabilities[token, expert]
    torch.testing.assert_close(routing.to_dense(), expected)
    real = sum(map(len, pools.values()))
    uncovered = real - int(expected.any(dim=1).sum())
    assert routing.metrics["uncovered"].item() == pytest.approx(uncovered / max(real, 1))


def test_a_tie_goes_to_the_earlier_token():
    _, routing = route(torch.zeros(6, 3), capacity_factor=1.0)
    assert routing.token.tolist() == [0, 1] * 3


def test_every_expert_takes_the_only_token_of_a_pool():
    _, routing = route(draw(1, 8), pool="batch", capacity_factor=0.5)
    assert routing.tokens_per_expert.tolist() == [1] * 8
    _, routing = route(draw(5, 4), pool="position", capacity_factor=1.0)
    torch.testing.assert_close(routing.to_dense(), draw(5, 4).softmax(dim=1))


def test_a_sequence_does_not_see_the_others():
    logits = draw(12, 3)
    _, together = route(logits, batch=3, pool="sequence", capacity_factor=1.0)
    alone = [route(part, pool="batch", capacity_factor=1.0)[1].to_dense() for part in logits.split(4)]
    torch.testing.assert_close(together.to_dense(), torch.cat(alone))


def test_padding_leaves_the_pools():
    logits, valid = draw(12, 3), torch.arange(12) % 4 < 3
    _, padded = route(logits, batch=3, valid=valid, pool="sequence", capacity_factor=1.0)
    _, packed = route(logits[valid], batch=3, pool="sequence", capacity_factor=1.0)
    torch.testing.assert_close(padded.to_dense()[valid], packed.to_dense())


def test_reordering_the_tokens_of_a_batch_reorders_the_routing():
    logits, order = draw(12, 3), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    _, first = route(logits, pool="batch")
    _, second = route(logits[order], pool="batch")
    torch.testing.assert_close(first.to_dense()[order], second.to_dense())


def test_only_the_pool_of_a_position_is_causal():
    for pool in ("sequence", "batch", "position"):
        router = ExpertChoice(8, 4, pool=pool)
        assert router.causal_in_train is router.causal_in_eval is (pool == "position")


# The three of vision


def test_places_are_rounded_as_told():
    for options, places in (
        ({}, 4),  # 10 * 1.0 / 3 = 3.33
        ({"capacity_rounding": "round"}, 3),
        ({"capacity_rounding": "round", "capacity_multiple": 4}, 4),
        ({"capacity_multiple": 3}, 6),
        ({"capacity_multiple": 16}, 10),  # no more than there are tokens
    ):
        _, routing = route(draw(10, 3), capacity_factor=1.0, **options)
        assert routing.tokens_per_expert.tolist() == [places] * 3


def test_noise_in_training_alone_and_of_its_deviation():
    logits = torch.zeros(4000, 4)
    router, routing = route(logits, noise=2.0, capacity_factor=4.0)
    torch.manual_seed(0)
    inputs = RoutingInput(hidden=torch.eye(4000), batch=1, sequence=4000)
    scores = router(inputs).scores
    assert not torch.equal(scores, routing.scores)
    of_noise = scores.log() - scores.log().mean(dim=1, keepdim=True)  # the softmax forgets each row's mean
    assert of_noise.std(correction=0).item() == pytest.approx(2 / 4 * (3 / 4) ** 0.5, rel=0.03)
    assert torch.equal(router.eval()(inputs).scores, logits.softmax(dim=1))


ONE_FAVOURITE = torch.tensor([[3.0, 2.0], [2.9, 1.5], [1.0, -3.0], [0.5, -3.0]])
"""Both experts score tokens 0 and 1 highest."""


@pytest.mark.parametrize(
    ("router", "solver"),
    # The published twenty steps of Adam leave some tokens uncovered.
    [(SinkhornExpertChoice, {}), (SparsityConstrainedExpertChoice, {"iterations": 500})],
)
def test_a_plan_covers_tokens_that_no_expert_likes_best(router, solver):
    options = {"pool": "batch", "capacity_factor": 1.0}
    logits = 3 * draw(64, 8, seed=1) + 2 * draw(64, 1, seed=2)
    _, plain = route(logits, **options)
    planned = route_by(router, logits, **options, **solver)
    assert planned.tokens_per_expert.tolist() == plain.tokens_per_expert.tolist() == [8] * 8
    assert planned.metrics["uncovered"] < plain.metrics["uncovered"]


def route_by(router: type[ExpertChoice], logits: Tensor, *, batch: int = 1, **options: object) -> SparseRouting:
    tokens, experts = logits.shape
    built = router(tokens, experts, **options).eval()
    with torch.no_grad():
        built.gate.weight.copy_(logits.t())
    return built(RoutingInput(hidden=torch.eye(tokens), batch=batch, sequence=tokens // batch))


def test_plans_choose_by_the_pair_and_not_by_the_token():
    _, plain = route(ONE_FAVOURITE, capacity_factor=1.0)
    assert plain.token.tolist() == [2, 3, 0, 1]  # the softmax over the experts compares them for each token
    assert route_by(SinkhornExpertChoice, ONE_FAVOURITE, pool="batch").token.tolist() == [2, 3, 0, 1]
    assert route_by(SparsityConstrainedExpertChoice, ONE_FAVOURITE, pool="batch").token.tolist() == [2, 3, 0, 1]


def test_sinkhorn_chooses_the_best_of_each_column_of_pots_plan():
    logits = draw(24, 4, seed=3)
    for combine in ("softmax", "plan"):
        options = {"combine": combine, "pool": "sequence", "iterations": 500, "tolerance": 0.0}
        dense = route_by(SinkhornExpertChoice, logits, batch=2, **options).to_dense()
        for pool, found in zip(logits.split(12), dense.split(12), strict=True):
            plan = ot.sinkhorn(np.ones(12), np.full(4, 3.0), -pool.double().numpy(), reg=1.0, stopThr=1e-12)
            plan = torch.from_numpy(plan).float()
            expected = torch.zeros(12, 4).scatter(0, plan.topk(3, dim=0).indices, 1.0)
            weights = plan if combine == "plan" else pool.softmax(dim=1)
            torch.testing.assert_close(found, expected * weights, atol=1e-5, rtol=1e-4)


def test_sparse_transport_chooses_the_tokens_of_its_plan():
    logits = draw(24, 4, seed=3)
    router = SparsityConstrainedExpertChoice(24, 4, combine="plan", pool="batch").eval()
    with torch.no_grad():
        router.gate.weight.copy_(logits.t())
    routing = router(RoutingInput(hidden=torch.eye(24), batch=1, sequence=24))
    benefit, valid, places = logits.softmax(dim=1).t()[None], torch.ones(1, 24, dtype=torch.bool), torch.tensor([[6]])
    plan = router.transport.plan(benefit, router.transport.potentials(benefit, valid, places), valid, places)
    torch.testing.assert_close(routing.to_dense(), plan[0].t())
    torch.testing.assert_close(routing.to_dense().sum(dim=0), torch.full((4,), 6.0))
    assert routing.tokens_per_expert.tolist() == [6] * 4


def test_the_three_of_vision_have_equal_defaults_which_are_those_of_the_configuration():
    def defaults(router: type[ExpertChoice]) -> dict[str, object]:
        parameters = inspect.signature(router).parameters.values()
        return {option.name: option.default for option in parameters if option.default is not inspect.Parameter.empty}

    shared = defaults(SoftmaxExpertChoice)
    file = Path(__file__).resolve().parents[3] / "configs" / "router" / "softmax_ec.yaml"
    gate = yaml.safe_load(file.read_text())["gate"]
    assert shared == {name: value for name, value in gate.items() if not name.startswith("_")}
    assert shared.items() <= defaults(SinkhornExpertChoice).items()
    without_noise = {name: value for name, value in shared.items() if name != "noise"}
    assert without_noise.items() <= defaults(SparsityConstrainedExpertChoice).items()


@pytest.mark.parametrize("router", [SinkhornExpertChoice, SparsityConstrainedExpertChoice])
def test_weights_of_the_plan_teach_the_gate(router):
    built = router(8, 4, combine="plan", pool="batch").eval()
    hidden = draw(20, 8)
    routing = built(RoutingInput(hidden=hidden, batch=1, sequence=20))
    (routing.weight * draw(routing.weight.numel(), seed=4)).sum().backward()
    assert built.gate.weight.grad.abs().max() > 1e-3


# In a language model


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    router = functools.partial(ExpertChoice, pool="position", capacity_factor=1.0)
    return GPT(50, 16, 32, 2, 2, num_experts=4, router=router, dropout=0.0).eval()


@torch.no_grad()
def test_generation_of_one_text_with_a_cache_is_that_without(model: GPT):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    (result,) = generate(model, [[3, 1, 4]], 8, temperature=0)
    tokens = [3, 1, 4]
    for _ in range(8):
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    assert result.continuation == tokens[3:]


def test_texts_of_a_batch_share_the_experts_of_each_position(model: GPT):
    traces = trace_experts(model, [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11]])
    for position, sequences in ((0, 4), (1, 4), (2, 3)):
        taken = [len(trace["block_1"][position]) for trace in traces[:sequences]]
        assert sum(taken) == 4, "ceil(4 / 4) and ceil(3 / 4) is one place for each of four experts"


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"capacity_factor": 0.0},
            "router capacity_factor=0.0: expected a finite factor above 0, the mean number of experts per token; the "
            "published one is 2",
        ),
        (
            {"capacity_factor": math.inf},
            "router capacity_factor=inf: expected a finite factor above 0, the mean number of experts per token; the "
            "published one is 2",
        ),
        ({"capacity_rounding": "floor"}, "router capacity_rounding='floor' is unknown: expected ceil or round"),
        (
            {"capacity_multiple": 0},
            "router capacity_multiple=0: expected 1 or more; V-MoE rounds up to multiples of 4",
        ),
        ({"noise": -1.0}, "router noise=-1.0: expected 0 for none, or a finite value above it; V-MoE's is 1"),
        ({"pool": "token"}, "router pool='token' is unknown: expected one of sequence, batch, position"),
    ],
)
def test_errors_name_the_value_and_the_remedy(options, message):
    with pytest.raises(ConfigError) as error:
        ExpertChoice(8, 4, **options)
    assert str(error.value) == message
