"""The Dense-to-Sparse gate against its definition: EvoMoE, arXiv 2112.14397."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from evomoe.errors import ConfigError
from evomoe.routing import DTSGate, RoutingInput, ScheduleValues, SparseRouting

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.5, 0.4, 0.6, 0.3], [-3.0, 4.0, 0.0, 1.0]])  # (T, E)


def gate_for(logits: torch.Tensor, **options: object) -> tuple[DTSGate, RoutingInput]:
    """A gate in eval mode, and an input for which its logits are ``logits (T, E)``."""
    tokens, experts = logits.shape
    gate = DTSGate(tokens, experts, **options).eval()
    with torch.no_grad():
        gate.gate.weight.copy_(logits.t())
    return gate, RoutingInput(hidden=torch.eye(tokens), batch=1, sequence=tokens)


def repeated(logits: list[float], tokens: int) -> tuple[DTSGate, RoutingInput]:
    """A gate in training mode, and ``tokens`` equal tokens with these logits."""
    gate = DTSGate(1, len(logits)).train()
    with torch.no_grad():
        gate.gate.weight.copy_(torch.tensor(logits)[:, None])
    return gate, RoutingInput(hidden=torch.ones(tokens, 1), batch=1, sequence=tokens)


def final(inputs: RoutingInput) -> RoutingInput:
    return RoutingInput(hidden=inputs.hidden, batch=inputs.batch, sequence=inputs.sequence, final_rule=True)


def at(gate: DTSGate, temperature: float = 1.0, noise_scale: float = 1.0, hardened: bool = False) -> DTSGate:
    gate.set_schedule(ScheduleValues(temperature=temperature, noise_scale=noise_scale, hardened=hardened))
    return gate


def active_sets(routing: SparseRouting) -> list[list[int]]:
    sets: list[list[int]] = [[] for _ in range(routing.scores.shape[0])]
    for token, expert in zip(routing.token.tolist(), routing.expert.tolist(), strict=True):
        sets[token].append(expert)
    return sets


# Scores


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("train", [True, False])
def test_scores_are_a_tempered_softmax_when_there_is_no_noise(temperature, train):
    gate, inputs = gate_for(LOGITS)
    at(gate, temperature, noise_scale=0.0).train(train)
    torch.testing.assert_close(gate(inputs).scores, torch.softmax(LOGITS / temperature, dim=1))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("hardened", [False, True])
def test_noisy_argmax_is_a_sample_of_the_softmax_at_any_temperature(temperature, hardened):
    logits, tokens = [1.0, 0.0, -0.5, 2.0, 0.3], 20_000
    gate, inputs = repeated(logits, tokens)
    torch.manual_seed(1)
    best = at(gate, temperature, hardened=hardened)(inputs).scores.argmax(dim=1)
    expected = torch.softmax(torch.tensor(logits, dtype=torch.float64), dim=0) * tokens
    assert stats.chisquare(torch.bincount(best, minlength=5), expected.numpy()).pvalue > 0.001


@pytest.mark.parametrize("noise_scale", [0.5, 2.0])
def test_noise_scale_is_the_temperature_of_the_sampling(noise_scale):
    logits, tokens = [1.0, 0.0, -0.5, 2.0], 20_000
    gate, inputs = repeated(logits, tokens)
    torch.manual_seed(2)
    best = at(gate, 1.0, noise_scale=noise_scale)(inputs).scores.argmax(dim=1)
    expected = torch.softmax(torch.tensor(logits, dtype=torch.float64) / noise_scale, dim=0) * tokens
    assert stats.chisquare(torch.bincount(best, minlength=4), expected.numpy()).pvalue > 0.001


TEMPERATURES = (10.0, 2.0, 1.5, 1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
# Mean number of active experts at threshold 1e-3, by (experts, standard deviation of the logits) and temperature.
ACTIVE_EXPERTS = {
    (4, 0.0): (4.00, 4.00, 4.00, 3.99, 3.90, 3.64, 2.88, 2.27, 1.59, 1.28),
    (4, 1.0): (4.00, 4.00, 4.00, 3.97, 3.77, 3.33, 2.50, 1.98, 1.47, 1.22),
    (8, 0.0): (8.00, 8.00, 8.00, 7.94, 7.54, 6.40, 4.08, 2.83, 1.76, 1.34),
    (8, 1.0): (8.00, 8.00, 7.99, 7.82, 6.96, 5.50, 3.46, 2.47, 1.63, 1.29),
    (16, 0.0): (16.0, 16.0, 16.0, 15.7, 13.9, 10.1, 5.16, 3.22, 1.86, 1.37),
    (16, 1.0): (16.0, 16.0, 16.0, 15.1, 12.0, 8.28, 4.40, 2.88, 1.76, 1.33),
}


@pytest.mark.parametrize(("experts", "deviation"), ACTIVE_EXPERTS)
def test_mean_number_of_active_experts(experts, deviation):
    tokens = 10_000
    generator = torch.Generator().manual_seed(experts)
    gate = DTSGate(experts, experts).train()
    with torch.no_grad():
        gate.gate.weight.copy_(torch.eye(experts))
    logits = deviation * torch.randn(tokens, experts, generator=generator)
    torch.manual_seed(experts)
    for temperature, expected in zip(TEMPERATURES, ACTIVE_EXPERTS[experts, deviation], strict=True):
        at(gate, temperature)
        routing = gate(RoutingInput(hidden=logits, batch=1, sequence=tokens))
        per_token = torch.bincount(routing.token, minlength=tokens).double()
        error = float(per_token.std()) / tokens**0.5
        rounding = 0.05 if expected >= 10 else 0.005
        assert abs(float(routing.active_experts) - expected) < rounding + 6 * error


def test_three_regimes():
    gate, inputs = gate_for(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)))
    gate.train()
    torch.manual_seed(0)
    assert float(at(gate, 10.0)(inputs).active_experts) == 8
    adaptive = torch.bincount(at(gate, 0.3)(inputs).token)
    assert set(adaptive.tolist()) >= {1, 2, 3, 4, 5}
    assert torch.bincount(at(gate, 0.3, hardened=True)(inputs).token).tolist() == [1] * 200


# Selection


def test_threshold_is_strict():
    quarters = torch.zeros(1, 4)
    gate, inputs = gate_for(quarters, threshold=0.25)
    assert active_sets(gate(inputs)) == [[0]]  # no score exceeds 0.25; the best one works all the same
    gate, inputs = gate_for(quarters, threshold=0.2499)
    assert active_sets(gate(inputs)) == [[0, 1, 2, 3]]


def test_hand_typed_selection():
    # softmax of the rows: [.644 .237 .087 .032], [.262 .237 .289 .214], [.001 .935 .017 .047]
    gate, inputs = gate_for(LOGITS, threshold=0.23)
    assert active_sets(gate(inputs)) == [[0, 1], [0, 1, 2], [1]]
    assert gate(inputs).tokens_per_expert.tolist() == [2, 3, 1, 0]


def test_a_threshold_above_every_score_leaves_each_token_its_best_expert():
    gate, inputs = gate_for(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), threshold=0.9)
    routing = at(gate.train(), 10.0)(inputs)
    assert torch.bincount(routing.token).tolist() == [1] * 50
    order = routing.token.argsort()
    assert torch.equal(routing.expert[order], routing.scores.argmax(dim=1))


def test_underflowing_scores_keep_their_order():
    gate, inputs = gate_for(torch.tensor([[300.0, -5.0, 0.0]]), final_top_k=2)
    routing = at(gate, 1.0)(final(inputs))
    assert active_sets(routing) == [[0, 2]]
    assert routing.weight.tolist() == [1.0, 0.0]


# Weights


def test_noisy_weights_are_the_scores_and_are_not_renormalized():
    gate, inputs = gate_for(LOGITS, threshold=0.1)
    routing = at(gate.train(), 0.5)(inputs)
    torch.testing.assert_close(routing.weight, routing.scores[routing.token, routing.expert])
    kept = routing.scores * (routing.scores > 0.1)
    torch.testing.assert_close(routing.to_dense(), kept)
    assert (kept.sum(dim=1) < 1).all()


def test_clean_weights_know_neither_noise_nor_temperature():
    gate, inputs = gate_for(LOGITS, weights="clean", threshold=0.1)
    clean = torch.softmax(LOGITS, dim=1)
    routing = at(gate.train(), 0.3)(inputs)
    torch.testing.assert_close(routing.weight, clean[routing.token, routing.expert])
    assert not torch.allclose(routing.scores, clean, atol=0.1)


def test_weights_of_the_final_rule_have_their_own_choice():
    gate, inputs = gate_for(LOGITS, weights="noisy", hardened_weights="clean")
    at(gate, 0.5)
    torch.testing.assert_close(gate(inputs).to_dense().sum(dim=1), torch.ones(3), atol=0.01, rtol=0)
    clean = torch.softmax(LOGITS, dim=1)
    best = clean.max(dim=1).values
    torch.testing.assert_close(gate(final(inputs)).to_dense().sum(dim=1), best)
    torch.testing.assert_close(at(gate, 0.5, hardened=True)(inputs).to_dense().sum(dim=1), best)


@pytest.mark.parametrize("weights", ["noisy", "clean"])
@pytest.mark.parametrize("final_rule", [False, True])
def test_renormalized_weights_sum_to_one(weights, final_rule):
    gate, inputs = gate_for(LOGITS, weights=weights, renormalize=True, threshold=0.2, final_top_k=2)
    routing = at(gate.train(), 0.7)(final(inputs) if final_rule else inputs)
    torch.testing.assert_close(routing.to_dense().sum(dim=1), torch.ones(3))
    source = routing.scores if weights == "noisy" else torch.softmax(LOGITS, dim=1)
    kept = torch.where(routing.to_dense() > 0, source, 0)
    torch.testing.assert_close(routing.to_dense(), kept / kept.sum(dim=1, keepdim=True))


def test_the_choice_itself_has_no_gradient():
    gate, inputs = gate_for(LOGITS, threshold=0.2)
    routing = at(gate, 1.0)(inputs)
    (gradient,) = torch.autograd.grad(routing.weight.sum(), gate.gate.weight)
    logits = LOGITS.clone().requires_grad_()
    scores = torch.softmax(logits, dim=1)
    (expected,) = torch.autograd.grad(scores[scores > 0.2].sum(), logits)
    torch.testing.assert_close(gradient.t(), expected)


@pytest.mark.parametrize("final_rule", [False, True])
def test_gradient_of_renormalized_weights_includes_their_sum(final_rule):
    gate, inputs = gate_for(LOGITS, renormalize=True, threshold=0.2, final_top_k=2)
    routing = at(gate, 0.7)(final(inputs) if final_rule else inputs)
    direction = torch.randn(LOGITS.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((routing.to_dense() * direction).sum(), gate.gate.weight)
    logits = LOGITS.clone().requires_grad_()
    kept = torch.where(routing.to_dense() > 0, torch.softmax(logits / 0.7, dim=1), 0)
    (expected,) = torch.autograd.grad((kept / kept.sum(dim=1, keepdim=True) * direction).sum(), logits)
    torch.testing.assert_close(gradient.t(), expected)


@pytest.mark.parametrize("balance_probability", ["kept", "full"])
def test_a_single_renormalized_expert_leaves_the_gate_as_it_is(balance_probability):
    """Neither the weights nor a balance loss of kept weights teach it; a balance loss of all weights does."""
    gate, inputs = gate_for(LOGITS, renormalize=True, balance_probability=balance_probability)
    routing = at(gate, 0.7, hardened=True)(inputs)
    assert torch.equal(routing.weight, torch.ones_like(routing.weight))
    direction = torch.randn(routing.weight.shape, generator=torch.Generator().manual_seed(0))
    for value, teaches in (((routing.weight * direction).sum(), False), (routing.losses["balance"], None)):
        (gradient,) = torch.autograd.grad(value, gate.gate.weight, retain_graph=True)
        teaches = balance_probability == "full" if teaches is None else teaches
        assert (gradient.abs().max() > 1e-3) == teaches
        assert teaches or gradient.abs().max() < 1e-6


# Final rule


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_final_rule_in_evaluation_takes_the_best_scores(top_k):
    gate, inputs = gate_for(LOGITS, final_top_k=top_k)
    at(gate, 0.5)
    assert gate.rules_differ
    routing = gate(final(inputs))
    ranked = LOGITS.argsort(dim=1, descending=True)[:, :top_k]
    assert active_sets(routing) == [sorted(row) for row in ranked.tolist()]
    scores = torch.softmax(LOGITS / 0.5, dim=1)
    torch.testing.assert_close(routing.weight, scores[routing.token, routing.expert])


def test_hardened_gate_has_one_rule():
    gate, inputs = gate_for(LOGITS)
    at(gate, 0.5, hardened=True)
    assert not gate.rules_differ
    assert torch.equal(gate(inputs).to_dense(), gate(final(inputs)).to_dense())
    at(gate, 0.5)
    assert gate.rules_differ


def test_noise_after_hardening_is_an_option():
    explores, inputs = repeated([0.0, 0.1, 0.0], 200)
    torch.manual_seed(0)
    assert (at(explores, 0.5, hardened=True)(inputs).tokens_per_expert > 30).all()
    silent, inputs = gate_for(LOGITS, noise_after_hardening=False)
    silent.train()
    torch.testing.assert_close(at(silent, 0.5, hardened=True)(inputs).scores, torch.softmax(LOGITS / 0.5, dim=1))
    assert not torch.allclose(at(silent, 0.5)(inputs).scores, torch.softmax(LOGITS / 0.5, dim=1), atol=0.05)


# Balance loss


@pytest.mark.parametrize("balance_probability", ["kept", "full"])
def test_balance_loss_is_constant_while_every_expert_works(balance_probability):
    gate, inputs = gate_for(LOGITS, balance_probability=balance_probability)
    loss = at(gate.train(), 10.0)(inputs).losses["balance"]
    assert loss.item() == pytest.approx(4, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, gate.gate.weight)
    assert float(gradient.abs().max()) < 1e-6


def test_hand_typed_balance_loss():
    scores = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
    # Active are {0} and {0, 1}: c = (1, 1/2, 0). Mean kept weights (.65, .15, 0): 3 * (.65 + .075) = 2.175;
    # mean probabilities (.65, .25, .1): 3 * (.65 + .125) = 2.325.
    for balance_probability, expected in (("kept", 2.175), ("full", 2.325)):
        gate, inputs = gate_for(scores.log(), threshold=0.25, balance_probability=balance_probability)
        assert gate(inputs).losses["balance"].item() == pytest.approx(expected)


def test_hand_typed_balance_loss_of_the_hardened_gate():
    scores = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1]])
    # c = (1/2, 1/2, 0). Kept (.35, .3, 0): 3 * .325 = .975; full (.5, .4, .1): 3 * .45 = 1.35.
    for balance_probability, expected in (("kept", 0.975), ("full", 1.35)):
        gate, inputs = gate_for(scores.log(), balance_probability=balance_probability)
        loss = at(gate, 1.0, hardened=True)(inputs).losses["balance"]
        assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize(("margin", "confidence"), [(4.0, 0.98201), (0.4, 0.59869)])
def test_at_balance_the_kept_loss_of_one_expert_is_the_confidence_and_the_full_one_is_1(margin, confidence):
    for balance_probability, expected in (("kept", confidence), ("full", 1.0)):
        gate, inputs = gate_for(torch.eye(2) * margin, balance_probability=balance_probability)
        loss = at(gate, 1.0, hardened=True)(inputs).losses["balance"]
        assert loss.item() == pytest.approx(expected, rel=1e-4)


# Schedule and errors


def test_schedule_values_are_not_part_of_the_checkpoint():
    gate, _ = gate_for(LOGITS)
    at(gate, 0.123, hardened=True)
    assert list(gate.state_dict()) == ["gate.weight"]


def test_set_schedule_takes_effect_at_the_next_routing():
    gate, inputs = gate_for(LOGITS)
    for temperature in (2.0, 0.5, 2.0):
        torch.testing.assert_close(at(gate, temperature)(inputs).scores, torch.softmax(LOGITS / temperature, dim=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "router threshold=0.0: expected a score in (0, 1), the published value is 0.001"),
        ({"threshold": 1.0}, "router threshold=1.0: expected a score in (0, 1), the published value is 0.001"),
        ({"weights": "gumbel"}, "router weights='gumbel' is unknown: expected noisy or clean"),
        ({"hardened_weights": "soft"}, "router hardened_weights='soft' is unknown: expected noisy or clean"),
        ({"balance_probability": "all"}, "router balance_probability='all' is unknown: expected kept or full"),
        ({"final_top_k": 5}, "router final_top_k=5: expected 1 to 4, the number of experts"),
        ({"init": "xavier"}, "gate init='xavier' is unknown: expected one of scaled, small, zeros, orthogonal"),
    ],
)
def test_errors_name_the_value_and_the_remedy(options, message):
    with pytest.raises(ConfigError) as error:
        DTSGate(8, 4, **options)
    assert str(error.value) == message


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_above_zero(temperature):
    with pytest.raises(ConfigError, match=f"temperature={temperature}: expected a value above 0"):
        at(DTSGate(8, 4), temperature)
