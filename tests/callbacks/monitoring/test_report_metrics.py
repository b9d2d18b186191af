"""The metrics of ``callbacks/monitoring/routing_metrics.py``. Shapes: T tokens, E experts."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.processes import on_two_processes
from helpers.typed_routing import routing_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomoe.callbacks.monitoring.routing_metrics import (
    CoActivation,
    ExpertLoad,
    RouterEntropy,
    WordExperts,
    active_experts,
)
from evomoe.callbacks.monitoring.routing_stability import ExpertSets

# Five tokens, of which the last is padding; three experts.
ACTIVE = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
VALID = torch.tensor([True, True, True, True, False])


def plain(values: dict[str, Tensor]) -> dict:
    return {name: value.tolist() for name, value in values.items()}


def load_of(*routings) -> dict:
    metric = ExpertLoad(routings[0].tokens_per_expert.numel())
    for routing in routings:
        metric.update(routing)
    return plain(metric.compute())


def test_active_experts_of_real_tokens():
    routing = routing_of(ACTIVE, valid=VALID)
    assert torch.equal(active_experts(routing, VALID), ACTIVE[:4])
    assert active_experts(routing).tolist() == [*ACTIVE[:4].tolist(), [False] * 3]


def test_load_typed_by_hand():
    # Before the capacity expert 0 had four tokens, of which it kept three.
    values = load_of(routing_of(ACTIVE, wanted=torch.tensor([4, 2, 0]), valid=VALID))
    assert values == {
        "load": pytest.approx([4 / 6, 2 / 6, 0]),
        "load_kept": pytest.approx([0.6, 0.4, 0]),
        "load_max_violation": pytest.approx(1.0),  # 4 where 2 would be balance
        "load_max_violation_batch": pytest.approx(1.0),
        "dead_experts": pytest.approx(1 / 3),
        "dropped": pytest.approx(1 / 6),
        "active_experts": pytest.approx(5 / 4),
    }


def test_balance_over_all_that_was_counted_hides_the_imbalance_of_the_batches():
    first, second = torch.tensor([[1, 0]] * 3).bool(), torch.tensor([[0, 1]] * 3).bool()
    values = load_of(routing_of(first), routing_of(second))
    assert (values["load_max_violation"], values["load_max_violation_batch"]) == (0.0, 1.0)
    assert (values["load"], values["dead_experts"]) == ([0.5, 0.5], 0.0)


def test_a_batch_of_padding_has_no_balance():
    padding = routing_of(ACTIVE, valid=torch.zeros(5, dtype=torch.bool))
    skewed = routing_of(torch.tensor([[1, 0, 0]]).bool())
    assert load_of(skewed, padding)["load_max_violation_batch"] == pytest.approx(2.0)
    alone = load_of(padding)
    assert (alone["load"], alone["load_max_violation_batch"], alone["active_experts"]) == ([0.0] * 3, 0.0, 0.0)


def entropy_of(*scores: list[float]) -> dict:
    table = torch.tensor(scores)
    metric = RouterEntropy(table.shape[1])
    metric.update(routing_of(table[:, :2] > 0.4, scores=table))
    return plain(metric.compute())


def test_entropy_typed_by_hand():
    # The third column is that of an expert without computation; the last token has no scores.
    values = entropy_of([1.0, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0], [1.0, 0, 0], [0.0, 0, 0])
    of_mean = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert values == {
        "router_entropy": pytest.approx(math.log(2) / 2),
        "balance_entropy": pytest.approx(of_mean / math.log(3)),
        "mutual_information": pytest.approx(of_mean - math.log(2) / 2),
    }


def test_extremes_of_entropy():
    undecided = entropy_of([0.25] * 4, [0.25] * 4)
    assert undecided == pytest.approx(
        {"router_entropy": math.log(4), "balance_entropy": 1, "mutual_information": 0}, abs=1e-6
    )
    expert_of_its_own = entropy_of(*torch.eye(4).tolist())
    assert expert_of_its_own == pytest.approx(
        {"router_entropy": 0, "balance_entropy": 1, "mutual_information": math.log(4)}, abs=1e-6
    )
    assert entropy_of([1.0], [1.0]) == {"router_entropy": 0, "balance_entropy": 0, "mutual_information": 0}


def test_co_activation_typed_by_hand():
    metric = CoActivation(3)
    metric.update(ACTIVE[:4])
    values = metric.compute()
    expected = torch.tensor([[1, 2 / 3, 0], [1, 1, 0], [0, 0, 0]])  # expert 1 never works without expert 0
    torch.testing.assert_close(values["co_activation"], expected)
    assert values["co_activation_max"] == 1
    assert values["experts_per_token"].tolist() == [0.25, 0.25, 0.5, 0]
    assert values["uncovered"] == 0.25


def test_one_expert_per_token_has_no_company():
    metric = CoActivation(3)
    metric.update(torch.eye(3).bool())
    values = metric.compute()
    assert values["co_activation"].tolist() == torch.eye(3).tolist()
    assert values["co_activation_max"] == 0
    assert values["experts_per_token"].tolist() == [0, 1, 0, 0]


def test_word_experts_typed_by_hand():
    metric = WordExperts(6, 3)
    metric.update(ACTIVE[:4], torch.tensor([4, 4, 4, 2]))
    values = metric.compute()
    assert values["vocabulary_specialization"] == 0.75  # three tokens of word 4 go to expert 0, word 2 has no expert
    assert values["word_count"].tolist() == [0, 0, 1, 0, 3, 0]
    torch.testing.assert_close(values["word_share"][4], torch.tensor([1, 2 / 3, 0]))
    assert values["word_share"].sum() == pytest.approx(5 / 3)


def test_baseline_of_specialization():
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(20_000) % 5
    ignores_the_word, is_the_word = WordExperts(5, 8), WordExperts(5, 8)
    ignores_the_word.update(torch.eye(8).bool()[torch.randint(8, (20_000,), generator=generator)], ids)
    is_the_word.update(torch.eye(8).bool()[ids], ids)
    assert ignores_the_word.compute()["vocabulary_specialization"].item() == pytest.approx(1 / 8, abs=0.02)
    assert is_the_word.compute()["vocabulary_specialization"] == 1


@given(tokens=st.integers(1, 12), experts=st.integers(2, 6), seed=st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_invariants(tokens, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(tokens, experts, generator=generator) < 0.5
    active[0, 0] = True
    ids = torch.randint(4, (tokens,), generator=generator)
    scores = torch.rand(tokens, experts, generator=generator).add(1e-3)
    routing = routing_of(active, scores=scores / scores.sum(dim=1, keepdim=True))

    load = load_of(routing)
    assert sum(load["load"]) == pytest.approx(1)
    assert sum(load["load_kept"]) == pytest.approx(1)
    assert -1e-6 <= load["load_max_violation"] <= experts - 1 + 1e-6

    entropy = RouterEntropy(experts)
    entropy.update(routing)
    values = entropy.compute()
    assert values["mutual_information"] >= -1e-5
    assert values["balance_entropy"] <= 1 + 1e-5

    together = CoActivation(experts)
    together.update(active)
    values = together.compute()
    assert torch.equal(values["co_activation"].diagonal(), active.any(dim=0).float())
    assert values["experts_per_token"].sum().item() == pytest.approx(1)
    mean = (values["experts_per_token"] * torch.arange(experts + 1)).sum().item()
    assert mean == pytest.approx(load["active_experts"], rel=1e-5)

    words = WordExperts(4, experts)
    words.update(active, ids)
    special = words.compute()["vocabulary_specialization"].item()
    assert active.float().mean(dim=0).max().item() - 1e-6 <= special <= 1


# Several processes

BATCHES, T, E, V = 3, 16, 4, 11


def made_batches() -> list[tuple[Tensor, ...]]:
    """Tokens that want 0 to E experts and do not get all of them, and padding that is not shared equally."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for index in range(BATCHES):
        wanted = torch.rand(T, E, generator=generator) < torch.tensor([0.8, 0.5, 0.2, 0.1])
        active = wanted & (torch.rand(T, E, generator=generator) < 0.7)
        scores = torch.rand(T, E, generator=generator).softmax(dim=1)
        ids = torch.randint(V, (T,), generator=generator)
        valid = torch.arange(T) < T - 3 * index
        batches.append((wanted, active, scores, ids, valid))
    return batches


def measure(share: slice, followed: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """All metrics over a share of the rows of every batch."""
    load, entropy, together, words = ExpertLoad(E), RouterEntropy(E), CoActivation(E), WordExperts(V, E)
    sets = ExpertSets(followed, E)
    for wanted, active, scores, ids, valid in ([part[share] for part in batch] for batch in made_batches()):
        routing = routing_of(active, scores, (wanted & valid[:, None]).sum(dim=0), valid)
        real = active_experts(routing, valid)
        load.update(routing)
        entropy.update(routing)
        together.update(real)
        words.update(real, ids[valid])
        sets.update(real, ids[valid])
    values = {name: value for metric in (load, entropy, together, words) for name, value in metric.compute().items()}
    return values, *sets.compute()


def measure_half(rank: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    return measure(slice(rank, None, 2), followed=10)


def test_a_split_batch_measures_as_the_whole(tmp_path):
    whole, _, _ = measure(slice(None), followed=20)
    halves = [measure_half(rank) for rank in (0, 1)]
    assert not torch.allclose(halves[0][0]["load_max_violation_batch"], whole["load_max_violation_batch"])
    for values, ids, active in on_two_processes(measure_half, tmp_path):
        assert values.keys() == whole.keys()
        for name, value in values.items():
            torch.testing.assert_close(value, whole[name], msg=name)
        assert torch.equal(ids, torch.cat([half[1] for half in halves]))
        assert torch.equal(active, torch.cat([half[2] for half in halves]))
        assert len(ids) == 20
