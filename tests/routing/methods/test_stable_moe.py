"""StableMoE routing. Shapes: T tokens, D model width, E experts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.routing import RoutingInput, ScheduleValues, SparseRouting, StableMoE

T, D, E, WORDS = 12, 8, 3, 20
STAGE_2 = ScheduleValues(hardened=True)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(values: ScheduleValues | None = None) -> StableMoE:
    torch.manual_seed(0)
    router = StableMoE(D, E, vocab_size=WORDS, light_dim=5)
    router.set_schedule(values or ScheduleValues())
    return router


def ids(seed: int = 0) -> Tensor:
    return torch.randint(WORDS, (T,), generator=torch.Generator().manual_seed(seed))


def route(
    router: StableMoE, hidden: Tensor, words: Tensor, final_rule: bool = False, valid: Tensor | None = None
) -> SparseRouting:
    return router(
        RoutingInput(
            hidden=hidden, batch=1, sequence=hidden.shape[0], token_ids=words, final_rule=final_rule, valid=valid
        )
    )


def expert_of(routing: SparseRouting) -> Tensor:
    return routing.expert[routing.token.argsort()]


def light_choice(router: StableMoE, words: Tensor) -> Tensor:
    return (router.words.weight[words] @ router.light_gate.weight.t()).argmax(dim=1)


def set_affinities(router: StableMoE, affinity: Tensor) -> Tensor:
    """Token states ``(T, D)`` with these affinities ``(T, E)``."""
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(E, D))
    return F.pad(affinity, (0, D - E))


def test_stage_1_is_greedy_and_stage_2_follows_the_word():
    router, hidden, words = make(), 3 * draw(T, D), ids()
    greedy = (hidden @ router.gate.weight.t()).argmax(dim=1)
    by_word = light_choice(router, words)
    assert not torch.equal(greedy, by_word)
    assert torch.equal(expert_of(route(router, hidden, words)), greedy)
    assert torch.equal(expert_of(route(router, hidden, words, final_rule=True)), by_word)
    router.set_schedule(STAGE_2)
    assert torch.equal(expert_of(route(router, hidden, words)), by_word)
    assert torch.equal(expert_of(route(router, draw(T, D, seed=1), words)), by_word), "whatever the states are"


@pytest.mark.parametrize("values", [ScheduleValues(), STAGE_2], ids=["stage_1", "stage_2"])
def test_weight_is_the_sigmoid_of_the_affinity_to_the_chosen_expert(values):
    router, hidden = make(values), draw(T, D)
    routing = route(router, hidden, ids())
    affinity = (hidden @ router.gate.weight.t())[routing.token, routing.expert]
    torch.testing.assert_close(routing.weight, 1 / (1 + torch.exp(-affinity)))
    assert torch.autograd.grad(routing.weight.sum(), router.gate.weight)[0].abs().max() > 0.01


def test_hand_typed_balance_loss():
    """Loads 2, 1, 0 of 3 tokens: relative excess 1, 0, -1, of which the last has no token."""
    router = make()
    hidden = set_affinities(router, torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))
    loss = route(router, hidden, torch.tensor([1, 2, 3])).losses["balance"]
    sigmoid = torch.sigmoid(torch.tensor([2.0, 1.0]))
    assert loss.item() == pytest.approx(sigmoid.sum().item() / 3)


def test_balance_pushes_tokens_off_overloaded_experts_and_pulls_them_to_others():
    affinity = torch.tensor([[1.0, 0.0, 0.0]] * 5 + [[0.0, 1.0, 0.0]] * 4 + [[0.0, 0.0, 1.0]] * 3)  # loads 5, 4, 3
    router = make()
    hidden = set_affinities(router, affinity).requires_grad_()
    (gradient,) = torch.autograd.grad(route(router, hidden, ids()).losses["balance"], hidden)
    slope = torch.sigmoid(torch.tensor(1.0)) * (1 - torch.sigmoid(torch.tensor(1.0))) / T
    expected = [slope.item() * (load / 4 - 1) for load in (5, 4, 3)]
    found = [gradient[token, expert].item() for token, expert in ((0, 0), (5, 1), (9, 2))]
    assert found == pytest.approx(expected, abs=1e-8)


def test_distillation_teaches_the_light_router_alone():
    router, words = make(), ids()
    hidden = draw(T, D).requires_grad_()
    loss = route(router, hidden, words).losses["distill"]
    light = router.words.weight[words] @ router.light_gate.weight.t()
    target = (hidden @ router.gate.weight.t()).argmax(dim=1)
    torch.testing.assert_close(loss, -light.log_softmax(dim=1)[torch.arange(T), target].mean())
    parameters = [hidden, router.gate.weight, router.words.weight, router.light_gate.weight]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert gradients[0] is None
    assert gradients[1] is None
    assert all(gradient.abs().max() > 0 for gradient in gradients[2:])


def train(router: StableMoE, steps: int) -> list[float]:
    """Steps of AdamW with weight decay on all losses; the agreement after each."""
    light = [*router.words.parameters(), *router.light_gate.parameters()]
    groups = [{"params": light, "lr": 0.05}, {"params": router.gate.parameters(), "lr": 1e-5}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    words, hidden = ids(), draw(WORDS, D)[ids()]  # a word's state is always the same
    agreement = []
    for _ in range(steps):
        optimizer.zero_grad()
        routing = route(router, hidden, words)
        (routing.weight.square().sum() + sum(routing.losses.values())).backward()
        optimizer.step()
        agreement.append(routing.metrics["light_agreement"].item())
        if len(agreement) == steps // 2:
            router.set_schedule(STAGE_2)
    return agreement


def test_the_light_router_learns_in_stage_1_and_no_optimizer_moves_it_in_stage_2():
    router = make()
    seen: list[dict[str, Tensor]] = []
    set_schedule = router.set_schedule
    router.set_schedule = lambda values: (
        set_schedule(values),
        seen.append({k: v.clone() for k, v in router.state_dict().items()}),
    )
    agreement = train(router, 60)
    assert agreement[0] < agreement[29] == 1.0
    (at_switch,) = seen
    for name, value in router.state_dict().items():
        assert torch.equal(value, at_switch[name]) == (not name.startswith("gate.")), name


def test_losses_are_zero_in_stage_2():
    routing = route(make(STAGE_2), draw(T, D), ids())
    assert {name: loss.item() for name, loss in routing.losses.items()} == {"balance": 0.0, "distill": 0.0}


def test_padding_counts_nowhere():
    router, hidden, words = make(), draw(T, D), ids()
    valid = torch.arange(T) < 9
    padded, packed = route(router, hidden, words, valid=valid), route(router, hidden[:9], words[:9])
    for name, loss in packed.losses.items():
        torch.testing.assert_close(padded.losses[name], loss)
    torch.testing.assert_close(padded.metrics["light_agreement"], packed.metrics["light_agreement"])


def test_flops_leave_the_embedding_out():
    assert make().flops_per_token() == 2 * (D * E + 5 * E)


def test_words_are_needed():
    with pytest.raises(ConfigError, match="the model passed no token_ids"):
        make()(RoutingInput(hidden=draw(T, D), batch=1, sequence=T))


@pytest.mark.parametrize("options", [{"vocab_size": 0}, {"vocab_size": 9, "light_dim": 0}])
def test_sizes_are_checked(options):
    with pytest.raises(ConfigError, match="=0: expected at least 1"):
        StableMoE(D, E, **options)
