from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.routing import LossFreeBias, RoutingInput, SparseRouting, StepStatistics
from evomoe.routing.metrics import load_max_violation


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss_free_for(logits: Tensor, **options) -> tuple[LossFreeBias, RoutingInput]:
    tokens, experts = logits.shape
    router = LossFreeBias(tokens, experts, **options)
    with torch.no_grad():
        router.gate.weight.copy_(logits.t())
    return router, RoutingInput(hidden=torch.eye(tokens), batch=1, sequence=tokens)


def step(router: LossFreeBias, load: list[int]) -> None:
    router.after_optimizer_step(
        StepStatistics(load=torch.tensor(load), tokens=torch.tensor(sum(load)), active_experts=torch.tensor(1.0))
    )


def chosen(routing: SparseRouting) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in routing.to_dense()]


# Choice and weights

SCORES = torch.tensor([[0.5, 0.4, 0.2], [0.9, 0.3, 0.6]])


def test_the_bias_decides_the_choice_and_not_the_weights():
    router, inputs = loss_free_for(torch.logit(SCORES))
    assert chosen(router(inputs)) == [[0, 1], [0, 2]]
    torch.testing.assert_close(router(inputs).weight, torch.tensor([5 / 9, 9 / 15, 4 / 9, 6 / 15]))
    router.bias.copy_(torch.tensor([-0.35, 0.0, 0.0]))  # .15, .4, .2 and .55, .3, .6
    routing = router(inputs)
    assert chosen(routing) == [[1, 2], [0, 2]]
    torch.testing.assert_close(routing.to_dense()[0], torch.tensor([0, 4 / 6, 2 / 6]))
    torch.testing.assert_close(routing.to_dense()[1], torch.tensor([9 / 15, 0, 6 / 15]))
    assert routing.metrics["bias_range"].item() == pytest.approx(0.35)
    torch.testing.assert_close(routing.scores, SCORES / SCORES.sum(dim=1, keepdim=True))


def test_weights_are_the_scores_where_they_are_not_renormalized():
    for scores, values in (("sigmoid", SCORES), ("softmax", torch.logit(SCORES).softmax(dim=1))):
        router, inputs = loss_free_for(
            torch.logit(SCORES), top_k=1, scores=scores, renormalize=False, scaling_factor=2.5
        )
        router.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
        torch.testing.assert_close(router(inputs).weight, 2.5 * values[:, 1])


def test_a_constant_added_to_all_biases_changes_nothing():
    router, inputs = loss_free_for(draw(20, 6))
    router.bias.copy_(0.2 * draw(6, seed=1))
    before = router(inputs).to_dense()
    router.bias += 3
    torch.testing.assert_close(router(inputs).to_dense(), before)


def test_all_experts_leave_nothing_to_choose():
    router, inputs = loss_free_for(draw(20, 4), top_k=4)
    before = router(inputs).to_dense()
    router.bias.copy_(draw(4, seed=1))
    torch.testing.assert_close(router(inputs).to_dense(), before)


def test_sigmoids_that_underflow_still_share_their_weight():
    logits = torch.tensor([[-1000.0, -1001.0, -1002.0]])
    router, inputs = loss_free_for(logits)
    router.bias.copy_(torch.tensor([0.2, 0.1, 0.0]))
    routing = router(inputs)
    torch.testing.assert_close(routing.to_dense()[0, :2], torch.tensor([0.0, -1.0]).softmax(dim=0))


@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2), (4, 4), (2, 1)])
def test_against_deepseek_v3_of_transformers(groups, top_groups):
    peer = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    tokens, width, experts, top_k = 50, 16, 12, 3
    config = DeepseekV3Config(
        hidden_size=width,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    theirs = peer.DeepseekV3TopkRouter(config)
    router = LossFreeBias(width, experts, top_k=top_k, num_groups=groups, top_groups=top_groups, scaling_factor=2.5)
    router.bias.copy_(draw(experts, seed=1) - 1)  # mostly negative: a masked score of 0 would win
    with torch.no_grad():
        theirs.weight.copy_(router.gate.weight)
        theirs.e_score_correction_bias.copy_(router.bias)
    hidden = draw(tokens, width)
    _, weight, expert = theirs(hidden)
    routing = router(RoutingInput(hidden=hidden, batch=1, sequence=tokens))
    torch.testing.assert_close(routing.to_dense(), torch.zeros(tokens, experts).scatter(1, expert, weight))


def test_experts_come_from_the_groups_with_the_best_pairs():
    # Best pairs: .9 + .1 and .6 + .5, so that the best single expert stays unused.
    router, inputs = loss_free_for(torch.logit(torch.tensor([[0.9, 0.1, 0.6, 0.5]])), num_groups=2)
    assert chosen(router(inputs)) == [[2, 3]]


# The bias


def test_the_bias_moves_by_the_update_rate_towards_balance():
    router = LossFreeBias(8, 4, update_rate=0.25)
    step(router, [5, 1, 0, 2])
    assert router.bias.tolist() == [-0.25, 0.25, 0.25, 0]
    step(router, [5, 1, 4, 2])
    assert router.bias.tolist() == [-0.5, 0.5, 0, 0.25]
    step(router, [3, 3, 3, 3])
    assert router.bias.tolist() == [-0.5, 0.5, 0, 0.25]
    step(router, [0, 0, 0, 0])
    assert router.bias.tolist() == [-0.5, 0.5, 0, 0.25]


def test_loads_beyond_the_precision_of_fp32_are_compared_exactly():
    router = LossFreeBias(8, 2, update_rate=1.0)
    step(router, [2**30, 2**30 + 2])
    assert router.bias.tolist() == [1, -1]


def test_routing_leaves_the_bias_alone():
    router, inputs = loss_free_for(draw(20, 4))
    router.bias.copy_(draw(4, seed=1))
    before = router.bias.clone()
    router(inputs).weight.sum().backward()
    router.eval()(inputs)
    assert torch.equal(router.bias, before)
    assert dict(router.named_parameters()).keys() == {"gate.weight"}
    assert "bias" in router.state_dict()


def test_a_skewed_gate_becomes_balanced():
    logits = draw(400, 8) + torch.linspace(0, 3, 8)
    router, inputs = loss_free_for(logits, update_rate=0.005)
    first = load_max_violation(router(inputs).load).item()
    for _ in range(300):
        step(router, router(inputs).load.tolist())
    assert first > 1.5
    assert load_max_violation(router(inputs).load).item() < 0.15


def test_drawn_anew_it_begins_without_bias():
    router = LossFreeBias(8, 4)
    step(router, [5, 1, 0, 2])
    router.reset_parameters()
    assert router.bias.tolist() == [0] * 4


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": "relu"}, "router scores='relu' is unknown: expected sigmoid or softmax"),
        ({"top_k": 1}, "router renormalize=true with top_k=1 leaves the gate without gradient: set renormalize=false"),
        ({"scaling_factor": 0.0}, "router scaling_factor=0.0: expected a finite value above 0"),
        ({"update_rate": -0.1}, "router update_rate=-0.1: expected a finite value of 0 or above"),
        ({"num_groups": 3}, "router num_groups=3: expected a divisor of the number of experts, 8"),
        (
            {"num_groups": 4, "top_groups": 5},
            "router top_groups=5 of 4 groups of 2 experts: expected 1 to 4 groups that hold at least top_k=2 experts",
        ),
        (
            {"num_groups": 8, "top_groups": 1},
            "router top_groups=1 of 8 groups of 1 experts: expected 1 to 8 groups that hold at least top_k=2 experts",
        ),
    ],
)
def test_errors_name_the_value_and_the_remedy(options, message):
    with pytest.raises(ConfigError) as error:
        LossFreeBias(4, 8, **options)
    assert str(error.value) == message


def test_the_loss_of_each_sequence_by_hand():
    scores = torch.tensor([[0.6, 0.2, 0.2], [0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    router, _ = loss_free_for(torch.logit(scores), top_k=1, renormalize=False)
    router.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))  # decides about the experts, not about the loss
    hidden = torch.eye(4)
    alike = router(RoutingInput(hidden=hidden, batch=2, sequence=2))
    # E sum f P: 3 * (1 * 0.55), and 3 * (0.5 * 0.5 + 0.5 * 0.35)
    assert alike.losses["sequence_balance"].item() == pytest.approx((1.65 + 1.275) / 2)
    valid = torch.tensor([True, True, True, False])
    padded = router(RoutingInput(hidden=hidden, batch=2, sequence=2, valid=valid))
    assert padded.losses["sequence_balance"].item() == pytest.approx((1.65 + 2.4) / 2)
    valid = torch.tensor([True, True, False, False])
    empty = router(RoutingInput(hidden=hidden, batch=2, sequence=2, valid=valid))
    assert empty.losses["sequence_balance"].item() == pytest.approx(1.65)


def test_a_rate_of_0_holds_the_bias():
    router, _ = loss_free_for(torch.zeros(3, 4), update_rate=0.0)
    router.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    step(router, [4, 0, 0, 0])
    assert router.bias.tolist() == [1.0, 2.0, 3.0, 4.0]
