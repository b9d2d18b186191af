"""The shared suite: what the contract promises, checked for every row of the registry.

Shapes: T tokens, D model width, E experts, A assignments.
"""

from __future__ import annotations

import importlib
import io
import math
import pkgutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing.checks import (
    assert_contract,
    assert_same,
    assert_same_losses,
    by_token,
    chosen,
    directed,
    draw,
    route,
    weights_of,
)
from routing.registry import ROWS
from routing.rows import Row, nothing
from torch import Tensor

import evomoe.routing
from evomoe.routing import Router

# D is a multiple of every number of experts below, and T of E, for gates that share out the features among the experts.
D, E = 120, 4
BATCH, SEQUENCE = 4, 6
T = BATCH * SEQUENCE

every_row = pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS])
every_mode = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
every_loss_of_logits = pytest.mark.parametrize(
    ("row", "name"),
    [pytest.param(row, name, id=f"{row.id}-{name}") for row in ROWS if row.set_logits for name in row.balanced_losses],
)
every_loss = pytest.mark.parametrize(
    ("row", "name"), [pytest.param(row, name, id=f"{row.id}-{name}") for row in ROWS for name in row.balanced_losses]
)


def rows_where(condition) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS if condition(row)])


def test_every_router_of_the_package_has_a_row():
    for module in pkgutil.iter_modules(evomoe.routing.__path__, "evomoe.routing."):
        importlib.import_module(module.name)
    pending, routers = [Router], set()
    while pending:
        subclasses = pending.pop().__subclasses__()
        pending += subclasses
        routers |= {router for router in subclasses if router.__module__.startswith("evomoe.routing.")}
    exported = {getattr(evomoe.routing, name) for name in evomoe.routing.__all__}
    assert {item for item in exported if isinstance(item, type) and issubclass(item, Router)} - {Router} <= routers
    assert {type(row.build(D, E)) for row in ROWS} == routers
    assert len({row.id for row in ROWS}) == len(ROWS)


def gradients_of(total: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Zero where ``total`` does not depend on an input."""
    if not (inputs and total.requires_grad):
        return [torch.zeros_like(item) for item in inputs]
    return list(torch.autograd.grad(total, inputs, materialize_grads=True))


# Every size, every kind of batch


@every_row
@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    sequence=st.integers(1, 5),
    experts=st.integers(1, 6),
    train=st.booleans(),
    final_rule=st.booleans(),
    padding=st.sampled_from(["none", "some", "all"]),
    seed=st.integers(0, 1000),
)
def test_contract(row, batch, sequence, experts, train, final_rule, padding, seed):
    router = row.build(D, row.allow(experts), seed).train(train)
    hidden = 2 * draw(batch * sequence, D, seed=seed)
    share = {"none": 1.0, "some": 0.6, "all": 0.0}[padding]
    valid = torch.rand(batch * sequence, generator=torch.Generator().manual_seed(seed)) < share
    routing = route(router, hidden, batch=batch, valid=None if padding == "none" else valid, final_rule=final_rule)
    if final_rule and router.rules_differ:
        assert_contract(replace(row, experts_per_token=(1, 1)), router, routing, valid)
    else:
        assert_contract(row, router, routing, valid)


@every_row
@every_mode
def test_fewer_tokens_than_experts(row, train):
    router = row.build(D, 8).train(train)
    for tokens in (1, 3):
        assert_contract(row, router, route(router, draw(tokens, D)), torch.ones(tokens, dtype=torch.bool))


@rows_where(lambda row: row.min_experts == 1 and not row.soft)
@every_mode
def test_the_only_expert(row, train):
    router = row.build(D, 1).train(train)
    routing = route(router, draw(T, D), batch=BATCH)
    assert_contract(row, router, routing, torch.ones(T, dtype=torch.bool))
    if row.experts_per_token[0] > 0:
        assert torch.equal(routing.token, torch.arange(T))
    if row.weight_alone is not None:
        torch.testing.assert_close(routing.weight, torch.full(routing.weight.shape, row.weight_alone))


@every_row
@every_mode
def test_all_padding(row, train):
    router = row.build(D, E).train(train)
    routing = route(router, draw(T, D), batch=BATCH, valid=torch.zeros(T, dtype=torch.bool))
    assert not chosen(routing).any()
    assert torch.equal(routing.scores, torch.zeros(T, E + row.null_experts))
    assert all(loss.item() == 0 for loss in routing.losses.values())
    for gradient in gradients_of(weights_of(routing).sum() + sum(routing.losses.values()), list(router.parameters())):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@every_row
@every_mode
def test_no_padding_and_a_mask_without_padding_are_the_same(row, train):
    router, hidden = row.build(D, E).train(train), draw(T, D)
    masked = route(router, hidden, batch=BATCH, valid=torch.ones(T, dtype=torch.bool))
    assert_same(route(router, hidden, batch=BATCH), masked)


# Padding


@every_row
@every_mode
def test_content_of_padding_changes_nothing(row, train):
    router = row.build(D, E).train(train)
    valid = torch.tensor([True] * 4 + [False] * 2).repeat(BATCH)
    valid[0] = False
    hidden = draw(T, D)
    routing = route(router, hidden, batch=BATCH, valid=valid)
    for seed, scale in ((1, 1.0), (2, 100.0), (3, 0.0)):
        other = torch.where(valid[:, None], hidden, scale * draw(T, D, seed=seed))
        assert_same(routing, route(router, other, batch=BATCH, valid=valid))


@rows_where(lambda row: row.permutes_tokens or row.drops)
def test_padding_routes_as_if_it_were_not_there(row):
    router = row.build(D, E).eval()
    valid = torch.arange(T) % 3 != 1
    hidden = draw(T, D)
    padded, packed = route(router, hidden, valid=valid), route(router, hidden[valid])
    assert torch.equal(chosen(padded)[valid], chosen(packed))
    torch.testing.assert_close(padded.to_dense()[valid], packed.to_dense())
    assert row.soft or torch.equal(padded.dropped, packed.dropped)
    assert_same_losses(padded, packed)


@every_row
def test_padding_receives_no_gradient(row):
    router = row.build(D, E)
    valid = torch.arange(T) % 3 != 1
    hidden = draw(T, D).requires_grad_()
    routing = route(router, hidden, batch=BATCH, valid=valid)
    (gradient,) = gradients_of(directed(routing) + sum(routing.losses.values()), [hidden])
    assert torch.equal(gradient[~valid], torch.zeros_like(gradient[~valid]))


# Causality


def past_differs(router: Router, seed: int, cut: int) -> bool:
    """Whether new states from position ``cut`` on, in every sequence in turn, change the routing before it."""
    hidden, fresh = draw(BATCH, SEQUENCE, D, seed=seed), draw(BATCH, SEQUENCE, D, seed=seed + 10_000)
    before = route(router, hidden.flatten(0, 1), batch=BATCH)
    for b in range(BATCH):
        changed = hidden.clone()
        changed[b, cut:] = 3 * fresh[b, cut:]
        after = route(router, changed.flatten(0, 1), batch=BATCH)
        past = slice(b * SEQUENCE, b * SEQUENCE + cut)
        if not (
            torch.equal(chosen(before)[past], chosen(after)[past])
            and torch.allclose(by_token(before)[past], by_token(after)[past], atol=1e-5)
            and torch.allclose(before.scores[past], after.scores[past], atol=1e-5)
        ):
            return True
    return False


@every_row
@every_mode
def test_causality_is_as_declared(row, train):
    router = row.build(D, E).train(train)
    declared = router.causal_in_train if train else router.causal_in_eval
    trials = [(seed, cut) for seed in range(8) for cut in (1, 3, 5)]
    leaks = [past_differs(router, seed, cut) for seed, cut in trials]
    assert any(leaks) is not declared


# Equivariance


@rows_where(lambda row: row.permutes_experts and row.set_logits)
@pytest.mark.parametrize("final_rule", [False, True])
def test_renaming_the_experts_renames_the_routing(row, final_rule):
    router, renamed = row.build(T, E).eval(), row.build(T, E).eval()
    logits, order = 2 * draw(T, E), torch.tensor([2, 0, 3, 1])
    first = route(router, row.set_logits(router, logits), batch=BATCH, final_rule=final_rule)
    second = route(renamed, row.set_logits(renamed, logits[:, order]), batch=BATCH, final_rule=final_rule)
    assert torch.equal(chosen(first)[:, order], chosen(second))
    torch.testing.assert_close(first.to_dense()[:, order], second.to_dense())
    torch.testing.assert_close(first.scores[:, order], second.scores[:, :E])
    torch.testing.assert_close(first.scores[:, E:], second.scores[:, E:])
    assert_same_losses(first, second)


@rows_where(lambda row: row.permutes_tokens)
@pytest.mark.parametrize("final_rule", [False, True])
def test_reordering_the_tokens_reorders_the_routing(row, final_rule):
    router, hidden = row.build(D, E).eval(), draw(T, D)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    first, second = route(router, hidden, final_rule=final_rule), route(router, hidden[order], final_rule=final_rule)
    assert torch.equal(chosen(first)[order], chosen(second))
    torch.testing.assert_close(first.to_dense()[order], second.to_dense())
    assert_same_losses(first, second)


# Gradients and losses


def assert_teaches(row: Row, router: Router, total: Tensor, signal: str, least: float) -> None:
    """Gradients of ``total`` reach the parameters that the row declares for ``signal``, and no others."""
    taught = {id(parameter) for parameter in row.taught(router, signal)}
    parameters = dict(router.named_parameters())
    for (name, parameter), gradient in zip(
        parameters.items(), gradients_of(total, list(parameters.values())), strict=True
    ):
        assert gradient.isfinite().all()
        largest = float(gradient.abs().max())
        assert largest > least if id(parameter) in taught else largest < 1e-6, name


@every_row
def test_the_combine_weights_teach_the_gate(row):
    router = row.build(D, E)
    routing = route(router, draw(T, D), batch=BATCH)
    assert_teaches(row, router, directed(routing), "weights", least=1e-3)


@every_loss
@every_mode
def test_each_loss_teaches_the_gate_unless_declared_inert(row, name, train):
    router = row.build(D, E).train(train)
    loss = route(router, draw(T, D), batch=BATCH).losses[name]
    inert = replace(row, teaches={name: lambda _router: ()}) if name in row.inert_losses else row
    assert_teaches(inert, router, loss, name, least=1e-4)


@every_loss_of_logits
def test_value_of_each_loss_at_balance(row, name):
    falling = torch.tensor([2.0, 1.0, 0.0, -1.0])
    rotations = torch.stack([falling.roll(shift) for shift in range(E)])
    logits = rotations.repeat(3, 1)  # (T, E): three tokens prefer each expert
    router = row.build(logits.shape[0], E).eval()
    loss = route(router, row.set_logits(router, logits)).losses[name]
    assert loss.item() == pytest.approx(float(row.balanced_losses[name](falling)), rel=1e-5, abs=1e-6)


@rows_where(
    lambda row: (
        "balance" in row.balanced_losses
        and "balance" not in row.inert_losses
        and row.set_logits
        and row.teaches.get("balance") is not nothing
    )
)
def test_balance_loss_pushes_down_the_overloaded_expert(row):
    logits = 0.1 * draw(T, E)
    logits[:, 1] += torch.linspace(0.5, 3, T)  # expert 1 is every token's first choice, by a small or a large margin
    router = row.build(T, E).eval()
    hidden = row.set_logits(router, logits)
    before = route(router, hidden)
    before.losses["balance"].backward()
    with torch.no_grad():
        for parameter in row.taught(router, "balance"):
            parameter -= 0.01 * parameter.grad / parameter.grad.abs().max()
    after = route(router, hidden)
    assert after.scores.mean(dim=0)[1].item() < before.scores.mean(dim=0)[1].item()


@every_loss
def test_losses_do_not_depend_on_the_number_of_tokens(row, name):
    router, hidden = row.build(D, E).eval(), draw(T, D)
    once, thrice = route(router, hidden), route(router, hidden.repeat(3, 1))
    torch.testing.assert_close(once.losses[name], thrice.losses[name])


# Numerics


@every_row
@every_mode
def test_fp32_under_autocast_and_for_bf16_states(row, train):
    router, hidden = row.build(D, E).train(train), draw(T, D).bfloat16()
    plain = route(router, hidden.float(), batch=BATCH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(plain, route(router, hidden.float(), batch=BATCH))
        routing = route(router, hidden, batch=BATCH)
    assert_same(plain, routing)
    assert_contract(row, router, routing, torch.ones(T, dtype=torch.bool))


@rows_where(lambda row: row.set_logits)
@every_mode
@pytest.mark.parametrize("scale", [0.0, 1e4], ids=["ties", "huge_logits"])
def test_extreme_logits(row, train, scale):
    router = row.build(T, E).train(train)
    routing = route(router, row.set_logits(router, scale * draw(T, E)), batch=BATCH)
    assert_contract(row, router, routing, torch.ones(T, dtype=torch.bool))
    total = routing.weight.sum() + sum(routing.losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients_of(total, list(router.parameters())))


@rows_where(lambda row: row.set_logits)
def test_ties_are_broken_the_same_way_every_time(row):
    router = row.build(T, E).eval()
    hidden = row.set_logits(router, torch.zeros(T, E))
    assert_same(route(router, hidden), route(router, hidden))
    for name, value in row.balanced_losses.items():
        if name == "z":
            assert route(router, hidden).losses[name].item() == pytest.approx(math.log(E) ** 2)
            assert float(value(torch.zeros(E))) == pytest.approx(math.log(E) ** 2)


# Randomness and state


@every_row
@pytest.mark.parametrize("final_rule", [False, True])
def test_evaluation_is_deterministic_and_draws_nothing(row, final_rule):
    router, hidden = row.build(D, E).eval(), draw(T, D)
    first = route(router, hidden, batch=BATCH, final_rule=final_rule, seed=1)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(1).get_state())
    assert_same(first, route(router, hidden, batch=BATCH, final_rule=final_rule, seed=2))


@every_row
def test_training_is_reproducible_by_its_seed(row):
    router, hidden = row.build(D, E), draw(T, D)
    assert_same(route(router, hidden, batch=BATCH, seed=3), route(router, hidden, batch=BATCH, seed=3))


@every_row
@every_mode
def test_routing_does_not_touch_its_input(row, train):
    router, hidden = row.build(D, E).train(train), draw(T, D)
    copy = hidden.clone()
    route(router, hidden, batch=BATCH)
    assert torch.equal(hidden, copy)


@every_row
@every_mode
def test_state_survives_a_checkpoint(row, train):
    router, hidden = row.build(D, E, seed=0).train(train), draw(T, D)
    file = io.BytesIO()
    torch.save(router.state_dict(), file)
    file.seek(0)
    restored = row.build(D, E, seed=1).train(train)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert_same(route(router, hidden, batch=BATCH), route(restored, hidden, batch=BATCH))


@every_row
def test_running_state_stays_in_fp32_where_weights_become_half_precision(row):
    router = row.build(D, E)
    before = {name: buffer.clone() for name, buffer in router.named_buffers(recurse=False)}
    router.to(torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in router.parameters())
    for name, buffer in router.named_buffers(recurse=False):
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])


@every_row
def test_parameters_are_drawn_from_the_global_generator(row):
    first, second = row.build(D, E, seed=5), row.build(D, E, seed=6)
    torch.manual_seed(5)
    second.reset_parameters()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


@every_row
def test_detached_routing_is_equal_and_has_no_graph(row):
    routing = route(row.build(D, E), draw(T, D), batch=BATCH)
    detached = routing.detach()
    assert_same(routing, detached)
    assert not any(value.requires_grad for value in (weights_of(detached), detached.scores, *detached.losses.values()))
