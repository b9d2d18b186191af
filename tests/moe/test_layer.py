"""The MoE layer against a dense oracle: every expert computes every token, and the routing's weights mix the outputs.

Shapes: B batch, S sequence, T = B * S tokens, D model width, H expert hidden width, E experts, C capacity.
"""

from __future__ import annotations

import functools
import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.flops import flop_counter
from routing.registry import ROWS
from routing.rows import VOCABULARY
from torch import Tensor, nn

from evomoe.errors import ConfigError
from evomoe.models.flops import layer_flops
from evomoe.moe import MoELayer
from evomoe.routing import RoutingInput, SoftMoE, SoftRouting, SparseRouting, TopK

B, S, D, H, E = 3, 5, 16, 24, 4
T = B * S

every_row = pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS])
every_mode = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
every_backend = pytest.mark.parametrize("backend", ["loop", "grouped_mm"])

TOKEN_IDS = torch.randint(VOCABULARY, (B, S), generator=torch.Generator().manual_seed(3))
PREVIOUS_IDS = F.pad(TOKEN_IDS[:, :-1], (1, 0), value=-1)
VALID = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 5])


def make(router, backend: str = "loop", num_experts: int = E) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(D, H, num_experts, router, backend=backend, init_std=0.3)
    for name, parameter in layer.experts.named_parameters():
        if name.startswith("b_"):
            nn.init.normal_(parameter)
    return layer


def make_row(row, backend: str = "loop") -> MoELayer:
    layer = make(row.factory, backend)
    layer.router.set_schedule(row.schedule)
    return layer


def states(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def feed_forward(layer: MoELayer, expert: int, rows: Tensor) -> Tensor:
    weights = layer.experts.expert_parameters(expert)
    return F.gelu(rows @ weights["w_in"].t() + weights["b_in"]) @ weights["w_out"].t() + weights["b_out"]


def oracle(layer: MoELayer, hidden: Tensor, valid: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """Output ``(B, S, D)`` and combine weights ``(T, E)``, with the random numbers that ``seed`` gives."""
    torch.manual_seed(seed)
    flat = hidden.flatten(0, 1)
    flat_valid = None if valid is None else valid.flatten()
    inputs = RoutingInput(
        hidden=flat,
        batch=B,
        sequence=S,
        token_ids=TOKEN_IDS.flatten(),
        previous_ids=PREVIOUS_IDS.flatten(),
        valid=flat_valid,
    )
    routing = layer.router(inputs)
    dense = routing.to_dense()
    if isinstance(routing, SoftRouting):
        return mix_slots(layer, flat, routing).view_as(hidden), dense
    outputs = torch.stack([feed_forward(layer, expert, flat) for expert in range(E)])  # (E, T, D)
    mixed = torch.einsum("te,etd->td", dense, outputs)
    if routing.bypass is not None:
        mixed = mixed + routing.bypass
    return mixed.view_as(hidden), dense


def mix_slots(layer: MoELayer, flat: Tensor, routing: SoftRouting) -> Tensor:
    """The unified formulation (arXiv 2401.15969), ``(T, D)`` to ``(T, D)``: dispatch, experts, combine."""
    grouped = flat.view(*routing.dispatch.shape[:2], -1)  # (G, S, D)
    slots = torch.einsum("gsec,gsd->gecd", routing.dispatch, grouped)
    outputs = torch.stack([feed_forward(layer, expert, slots[:, expert]) for expert in range(E)], dim=1)
    return torch.einsum("gsec,gecd->gsd", routing.combine, outputs).reshape(flat.shape)


def gradients(layer: MoELayer, hidden: Tensor, output: Tensor) -> list[Tensor]:
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(
        (output * direction).sum(), [hidden, *layer.parameters()], retain_graph=True, materialize_grads=True
    )
    return list(found)


@every_row
@every_mode
@every_backend
@pytest.mark.parametrize("valid", [None, VALID], ids=["", "padding"])
def test_output_and_gradients_equal_the_dense_oracle(row, train, backend, valid):
    layer = make_row(row, backend).train(train)
    hidden = states().requires_grad_()
    torch.manual_seed(5)
    output, routing = layer(hidden, token_ids=TOKEN_IDS, previous_ids=PREVIOUS_IDS, valid=valid)
    expected, dense = oracle(layer, hidden, valid, seed=5)
    torch.testing.assert_close(routing.to_dense(), dense)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    for found, wanted in zip(gradients(layer, hidden, output), gradients(layer, hidden, expected), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    if valid is not None:
        assert torch.equal(output[~valid], torch.zeros_like(output[~valid]))


@every_row
@every_mode
@pytest.mark.parametrize("valid", [None, VALID], ids=["", "padding"])
def test_every_router_is_a_pair_of_dispatch_and_combine_tensors(row, train, valid):
    layer = make_row(row).train(train)
    hidden = states().requires_grad_()
    torch.manual_seed(5)
    output, routing = layer(hidden, token_ids=TOKEN_IDS, previous_ids=PREVIOUS_IDS, valid=valid)
    mixed = output
    slots = routing
    if isinstance(routing, SparseRouting):
        slots = routing.to_slots()
        assert not slots.dispatch.requires_grad
        assert set(slots.dispatch.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(slots.dispatch.sum(dim=(0, 1, 3)).long(), routing.tokens_per_expert)
        assert slots.dispatch.sum(dim=1).max() == 1, "one token a slot"
        torch.testing.assert_close(slots.combine, slots.dispatch * routing.to_dense()[None, :, :, None])
        torch.testing.assert_close(slots.load, routing.to_dense().sum(dim=0))
        if routing.bypass is not None:
            mixed = output - routing.bypass.view_as(output)
    expected = mix_slots(layer, hidden.flatten(0, 1), slots).view_as(hidden)
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)
    for found, wanted in zip(gradients(layer, hidden, mixed), gradients(layer, hidden, expected), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def matrix_flops(call) -> int:
    """Floating-point operations of the matrix products that really run."""
    with flop_counter() as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS if not row.soft])
@every_backend
@pytest.mark.parametrize("valid", [None, VALID], ids=["", "padding"])
def test_experts_process_one_row_per_assignment(row, backend, valid):
    layer = make_row(row, backend)
    hidden = states()
    inputs = RoutingInput(
        hidden=hidden.flatten(0, 1),
        batch=B,
        sequence=S,
        token_ids=TOKEN_IDS.flatten(),
        previous_ids=PREVIOUS_IDS.flatten(),
        valid=None if valid is None else valid.flatten(),
    )
    seen: list[SparseRouting] = []
    torch.manual_seed(5)
    gate = matrix_flops(lambda: layer.router(inputs))
    torch.manual_seed(5)
    total = matrix_flops(
        lambda: seen.append(layer(hidden, token_ids=TOKEN_IDS, previous_ids=PREVIOUS_IDS, valid=valid)[1])
    )
    of_one_row = 2 * (D * H + H * D)
    assert (total - gate) / of_one_row == seen[0].tokens_per_expert.sum().item() > 0


def test_rows_of_the_backward_pass():
    layer = make(functools.partial(TopK, top_k=2))
    hidden = states().requires_grad_()
    output, routing = layer(hidden)
    backward = matrix_flops(output.sum().backward)
    gate = 2 * (2 * T * D * E)
    assert (backward - gate) / (2 * 2 * (D * H + H * D)) == routing.tokens_per_expert.sum().item() == 2 * T


def test_a_batch_of_padding():
    layer = make(functools.partial(TopK, top_k=2))
    hidden = states().requires_grad_()
    output, routing = layer(hidden, valid=torch.zeros(B, S, dtype=torch.bool))
    assert torch.equal(output, torch.zeros_like(output))
    assert routing.num_tokens.item() == routing.tokens_per_expert.sum().item() == 0
    output.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


@every_row
@every_mode
def test_a_batch_of_nothing(row, train):
    layer = make_row(row).train(train)
    hidden = torch.zeros(0, S, D, requires_grad=True)
    output, routing = layer(hidden, token_ids=TOKEN_IDS[:0], previous_ids=PREVIOUS_IDS[:0])
    assert output.shape == hidden.shape
    assert routing.num_tokens.item() == 0
    if not row.soft:
        assert routing.tokens_per_expert.sum().item() == 0


@every_row
def test_what_was_built_without_memory_is_whole_once_drawn(row):
    """A model may be built on the meta device, and get its memory and its weights later."""
    with torch.device("meta"):
        router = row.factory(D, E)
    router.to_empty(device="cpu")
    usual = row.factory(D, E)
    for drawn in (usual, router):
        torch.manual_seed(0)
        drawn.reset_parameters()
    found = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    for name, tensor in (*usual.named_parameters(), *usual.named_buffers()):
        assert torch.equal(found[name], tensor), name


def test_a_number_of_live_experts_that_cannot_be_is_not_loaded():
    state = make(TopK).state_dict()
    state["born"].fill_(E + 1)
    with pytest.raises(ValueError, match=f"live_experts={E + 1}: expected 1 or {E}"):
        make(TopK).load_state_dict(state)


# While one expert lives


def young(backend: str = "loop") -> MoELayer:
    layer = make(functools.partial(TopK, top_k=2), backend)
    layer.live_experts = 1
    return layer


@every_mode
@pytest.mark.parametrize("valid", [None, VALID], ids=["", "padding"])
def test_young_layer_is_the_feed_forward_of_expert_0(train, valid):
    layer = young().train(train)
    hidden = states().requires_grad_()
    output, routing = layer(hidden, valid=valid)
    expected = feed_forward(layer, 0, hidden)
    if valid is not None:
        expected = expected * valid[..., None]
    torch.testing.assert_close(output, expected)
    for found, wanted in zip(gradients(layer, hidden, output), gradients(layer, hidden, expected), strict=True):
        torch.testing.assert_close(found, wanted)

    real = T if valid is None else int(valid.sum())
    assert routing.tokens_per_expert.tolist() == [real, 0, 0, 0]
    assert routing.num_tokens.item() == real
    assert routing.losses == {}
    one_hot = torch.zeros(T, E)
    one_hot[:, 0] = 1 if valid is None else valid.flatten()
    assert torch.equal(routing.to_dense(), one_hot)
    assert torch.equal(routing.scores, one_hot)


@every_backend
def test_young_layer_costs_one_feed_forward_and_leaves_the_others_alone(backend):
    layer = young(backend)
    for valid, real in ((None, T), (VALID, 8)):
        flops = matrix_flops(lambda valid=valid: layer(states(), valid=valid))
        assert flops == real * 2 * (D * H + H * D)
    state = torch.get_rng_state()
    output, _ = layer(states())
    assert torch.equal(torch.get_rng_state(), state), "no router runs"
    output.sum().backward()
    base = set(layer.experts.expert_parameters(0).values())
    for parameter in layer.parameters():
        assert (parameter.grad is not None) == (parameter in base)


def test_an_optimizer_leaves_the_unborn_experts_and_the_router_alone():
    layer = young()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    layer(states())[0].sum().backward()
    optimizer.step()
    changed = {name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"experts.w_in.0", "experts.w_out.0", "experts.b_in.0", "experts.b_out.0"}


def test_number_of_live_experts_is_saved_with_the_weights():
    for live in (1, E):
        layer = make(TopK)
        layer.live_experts = live
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        restored = make(TopK)
        restored.live_experts = 1 if live == E else E
        restored.load_state_dict(torch.load(file, weights_only=True))
        assert restored.live_experts == live
        assert torch.equal(restored(states())[0], layer(states())[0])


@pytest.mark.parametrize("number", [0, 2, E + 1])
def test_only_one_or_all_experts_live(number):
    with pytest.raises(ValueError, match=f"live_experts={number}: expected 1 or {E}"):
        make(TopK).live_experts = number


def test_a_layer_of_one_expert_is_always_routed():
    layer = make(functools.partial(TopK, top_k=1), num_experts=1)
    layer.live_experts = 1
    output, routing = layer(states())
    torch.testing.assert_close(output, feed_forward(layer, 0, states()))
    assert sorted(routing.losses) == ["balance", "z"]


def test_no_expert_is_refused():
    with pytest.raises(ConfigError, match="num_experts=0: expected at least 1"):
        MoELayer(D, H, 0, TopK)


# What the router sees


class Spy(TopK):
    """Keeps what it is asked."""

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        self.inputs = inputs
        return super().forward(inputs)


def test_router_receives_the_flattened_batch():
    layer, hidden = make(Spy), states()
    token_ids = torch.arange(T).view(B, S)
    layer(hidden, token_ids=token_ids, valid=VALID, final_rule=True)
    seen = layer.router.inputs
    assert torch.equal(seen.hidden, hidden.view(T, D))
    assert torch.equal(seen.token_ids, token_ids.flatten())
    assert torch.equal(seen.valid, VALID.flatten())
    assert (seen.batch, seen.sequence, seen.final_rule) == (B, S, True)
    layer(hidden)
    assert layer.router.inputs.token_ids is layer.router.inputs.valid is None
    assert layer.router.inputs.final_rule is False


def test_states_need_not_be_contiguous():
    layer = make(TopK)
    hidden = states().transpose(0, 1)
    torch.testing.assert_close(layer(hidden)[0], layer(hidden.contiguous())[0])


# Soft routing


@pytest.mark.parametrize(("backend", "backward"), [("loop", False), ("loop", True), ("grouped_mm", False)])
@pytest.mark.parametrize("slots", [1, 2])
def test_soft_routing_costs_what_is_counted(backend, slots, backward):
    layer, hidden = make(functools.partial(SoftMoE, slots=slots), backend), states().requires_grad_()

    def run() -> Tensor:
        output, routing = layer(hidden)
        assert routing.rows == B * E * slots
        return output

    flops = matrix_flops(lambda: run().sum().backward() if backward else run())
    of_slots = B * E * slots * 2 * (D * H + H * D)
    assert flops == (3 if backward else 1) * (of_slots + T * layer.router.flops_per_token())
    assert flops == pytest.approx((3 if backward else 1) * T * layer_flops(layer, B * E * slots / T))


# Types


@pytest.mark.parametrize("router", [TopK, SoftMoE])
@pytest.mark.parametrize("live", [1, E])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_backend
def test_output_has_the_type_of_the_states_under_autocast(router, live, dtype, backend):
    layer = make(router, backend)
    layer.live_experts = live
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = layer(states(dtype))
        masked, _ = layer(states(dtype), valid=VALID)
    assert output.dtype == masked.dtype == dtype
    exact, _ = layer(states())
    torch.testing.assert_close(output.float(), exact, atol=0.15, rtol=0.05)


# Shared experts and experts without computation


@every_mode
@pytest.mark.parametrize("valid", [None, VALID], ids=["", "padding"])
@pytest.mark.parametrize("live", [1, E])
def test_shared_experts_work_for_every_token_beside_the_routed_ones(train, valid, live):
    torch.manual_seed(0)
    layer = MoELayer(D, H, E, functools.partial(TopK, top_k=2), init_std=0.3, shared_experts=2).train(train)
    layer.live_experts = live
    output, _ = layer(states(), valid=valid)
    shared, layer.shared = layer.shared, None
    routed, _ = layer(states(), valid=valid)
    weights = shared.expert_parameters(0)
    assert weights["w_in"].shape == (2 * H, D)
    of_all = F.gelu(states() @ weights["w_in"].t()) @ weights["w_out"].t()
    expected = of_all if valid is None else of_all * valid[..., None]
    torch.testing.assert_close(output - routed, expected, atol=1e-5, rtol=1e-4)


def test_a_shared_expert_of_double_width_is_the_sum_of_two():
    torch.manual_seed(0)
    layer = MoELayer(D, H, E, TopK, init_std=0.3, shared_experts=2, bias=False)
    weights = layer.shared.expert_parameters(0)
    halves = [
        F.gelu(states() @ weights["w_in"][part].t()) @ weights["w_out"][:, part].t()
        for part in (slice(0, H), slice(H, 2 * H))
    ]
    together = layer.shared.base(states().flatten(0, 1)).view(B, S, D)
    torch.testing.assert_close(together, halves[0] + halves[1], atol=1e-5, rtol=1e-4)


def test_less_than_no_shared_expert_is_refused():
    with pytest.raises(ConfigError, match="shared_experts=-1: expected 0 or more"):
        MoELayer(D, H, E, TopK, shared_experts=-1)


class Copying(TopK):
    """Adds half of each token, as an expert that copies would."""

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        return replace(super().forward(inputs), bypass=0.5 * inputs.hidden)


def test_what_experts_without_computation_add_reaches_output_and_gradient():
    hidden = states().requires_grad_()
    plain, copying = make(TopK)(hidden)[0], make(Copying)(hidden)[0]
    torch.testing.assert_close(copying - plain, 0.5 * hidden)
    gradients = [torch.autograd.grad(output.sum(), hidden)[0] for output in (plain, copying)]
    torch.testing.assert_close(gradients[1] - gradients[0], torch.full_like(hidden, 0.5))
