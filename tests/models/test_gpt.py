from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from evomoe.errors import ConfigError
from evomoe.models.gpt import GPT
from evomoe.routing import Router, RoutingInput, SparseRouting
from evomoe.routing.methods.dts import DTSGate
from evomoe.routing.methods.switch import Switch
from evomoe.routing.methods.topk import TopK

Build = Callable[..., GPT]


class EvalLeaker(TopK):
    causal_in_eval = True

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        self.causal_in_eval = False


class TrainLeaker(TopK):
    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        self.causal_in_train = False


def language_loss(model: GPT, tokens: Tensor) -> Tensor:
    logits, routings = model(tokens[:, :-1])
    balance = sum(routing.losses["balance"] for routing in routings)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + 0.01 * balance


@pytest.mark.parametrize(("moe_every", "names"), [(0, []), (1, ["block_0", "block_1", "block_2", "block_3"])])
def test_every_nth_block_is_moe(build: Build, moe_every: int, names: list[str]) -> None:
    assert list(build(num_layers=4, moe_every=moe_every).moe_layers) == names


def test_moe_blocks_of_every_second_and_third(build: Build) -> None:
    assert list(build(num_layers=4, moe_every=2).moe_layers) == ["block_1", "block_3"]
    assert list(build(num_layers=4, moe_every=3).moe_layers) == ["block_2"]


def test_one_routing_per_moe_layer_and_one_logit_per_word(build: Build, tokens: Tensor) -> None:
    model = build(num_layers=4)
    logits, routings = model(tokens)
    assert logits.shape == (3, 12, 50)
    assert [routing.tokens_per_expert.sum().item() for routing in routings] == [72, 72]  # 36 tokens, top 2
    assert model.token_embedding.weight.shape == (64, 32)


def test_extra_vocabulary_rows_are_never_trained(build: Build, tokens: Tensor) -> None:
    model = build()
    language_loss(model, tokens).backward()
    gradient = model.token_embedding.weight.grad
    assert gradient is not None
    assert torch.count_nonzero(gradient[50:]) == 0
    assert torch.count_nonzero(gradient[:50].abs().sum(dim=1)) == 50


@torch.no_grad()
@pytest.mark.parametrize("moe_every", [0, 1])
def test_padding_changes_nothing(build: Build, tokens: Tensor, moe_every: int) -> None:
    model = build(moe_every=moe_every, router=functools.partial(Switch, capacity_factor=None)).eval()
    valid = torch.arange(12) < torch.tensor([[12], [7], [1]])
    padded = torch.where(valid, tokens, 49)
    logits, routings = model(padded, valid=valid)
    other, _ = model(torch.where(valid, tokens, 3), valid=valid)
    assert torch.equal(logits[valid], other[valid])
    for row, length in enumerate([12, 7, 1]):
        alone, _ = model(tokens[row : row + 1, :length])
        torch.testing.assert_close(logits[row, :length], alone[0])
    assert all(routing.num_tokens == 20 and routing.tokens_per_expert.sum() == 20 for routing in routings)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 6]])
@pytest.mark.parametrize("router", [TopK, Switch, DTSGate])
def test_cached_logits_equal_uncached_ones(
    build: Build, tokens: Tensor, router: type[Router], pieces: list[int]
) -> None:
    model = build(num_layers=4, router=router).eval()
    cache = model.new_cache(batch=3)
    logits = torch.cat([model(piece, cache=cache)[0] for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens)[0])


@pytest.mark.parametrize("router", [TopK, DTSGate])
def test_recomputed_activations_give_the_same_gradients(build: Build, tokens: Tensor, router: type[Router]) -> None:
    gradients = []
    for checkpoint_activations in (False, True):
        model = build(router=router, dropout=0.2, attention_dropout=0.2, checkpoint_activations=checkpoint_activations)
        torch.manual_seed(7)
        language_loss(model, tokens).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)


def test_recomputation_routes_once_for_the_caller(build: Build, tokens: Tensor) -> None:
    model = build(checkpoint_activations=True)
    calls = []
    model.blocks[1].feed_forward.router.register_forward_hook(lambda *_: calls.append(1))
    logits, routings = model(tokens)
    weights = [routing.weight.clone() for routing in routings]
    logits.sum().backward()
    assert len(calls) == 2  # forward and recomputation
    assert len(routings) == 1
    assert torch.equal(routings[0].weight, weights[0])


@pytest.mark.parametrize("moe_every", [0, 1])
def test_total_dropout_leaves_the_residual_stream_alone(build: Build, moe_every: int) -> None:
    """Dense and sparse branches are dropped alike; with the embeddings dropped too, all tokens look the same."""
    model = build(moe_every=moe_every, dropout=1 - 1e-9)
    hidden = torch.randn(3, 12, 32)
    output, _ = model.blocks[0](hidden, token_ids=torch.zeros(3, 12, dtype=torch.long))
    assert torch.equal(output, hidden)
    logits, _ = model(torch.arange(12)[None])
    assert torch.equal(logits, logits[:, :1].expand_as(logits))


def test_one_living_expert_computes_what_the_dense_model_computes(build: Build, tokens: Tensor) -> None:
    sparse, dense = build(), build(moe_every=0)
    for layer in sparse.moe_layers.values():
        layer.live_experts = 1
    torch.testing.assert_close(sparse(tokens)[0], dense(tokens)[0])
    language_loss(dense, tokens).backward()
    logits, _ = sparse(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.testing.assert_close(sparse.blocks[0].attention.qkv.weight.grad, dense.blocks[0].attention.qkv.weight.grad)


def test_bf16_autocast_keeps_the_router_in_fp32(build: Build, tokens: Tensor) -> None:
    model = build(num_layers=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, routings = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert all(routing.weight.dtype == torch.float32 for routing in routings)
    exact, _ = model(tokens)
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
    logits.float().logsumexp(dim=-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks[1].attention.parameters())


@torch.no_grad()
def test_cache_works_under_autocast(build: Build, tokens: Tensor) -> None:
    model = build(moe_every=0).eval()
    cache = model.new_cache(batch=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.cat([model(piece, cache=cache)[0] for piece in tokens.split(4, dim=1)], dim=1)
        whole, _ = model(tokens)
    torch.testing.assert_close(logits, whole, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("moe_every", [0, 2])
def test_compiled_model_equals_eager(build: Build, tokens: Tensor, moe_every: int) -> None:
    model = build(moe_every=moe_every)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    loss = language_loss(model, tokens)
    (expected,) = torch.autograd.grad(loss, [model.token_embedding.weight])
    compiled_loss = language_loss(compiled, tokens)
    (gradient,) = torch.autograd.grad(compiled_loss, [model.token_embedding.weight])
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": 30, "num_heads": 4}, "d_model=30 is not divisible by num_heads=4"),
        ({"num_heads": 0}, "num_heads=0: expected at least 1"),
        ({"num_experts": 0}, "num_experts=0: expected at least 1"),
        ({"moe_every": 3}, "moe_every=3 leaves no MoE layer among num_layers=2"),
        ({"moe_every": -1}, "moe_every=-1"),
        ({"router": None}, "router=None with moe_every=2"),
        ({"vocab_size": 0}, "vocab_size=0: expected at least 1"),
        ({"context": 0}, "context=0: expected at least 1"),
        ({"num_layers": 0}, "num_layers=0: expected at least 1"),
        ({"d_ff": 0}, "d_ff=0: expected at least 1"),
        ({"dropout": 1.0}, r"dropout=1.0: expected a probability in \[0, 1\)"),
        ({"attention_dropout": -0.1}, "attention_dropout=-0.1: expected a probability"),
        ({"activation": "sine"}, "sine"),
        ({"router": TrainLeaker}, "TrainLeaker looks at later tokens in training, "),
        ({"router": EvalLeaker}, "EvalLeaker looks at later tokens in evaluation, .*model.allow_future_leak=true"),
    ],
)
def test_impossible_settings_are_refused(build: Build, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        build(**settings)
    assert "\n" not in str(error.value)


def test_leaking_router_is_accepted_on_request(build: Build) -> None:
    assert list(build(router=EvalLeaker, allow_future_leak=True).moe_layers) == ["block_1"]


def test_dense_model_needs_no_router(build: Build) -> None:
    assert build(moe_every=0, router=None).moe_layers == {}


def test_sequence_longer_than_the_context_is_an_error(build: Build) -> None:
    with pytest.raises(ConfigError, match="sequence of 17 tokens, but the model's context is 16"):
        build()(torch.zeros(1, 17, dtype=torch.long))


class Witness(TopK):
    """Keeps what it is asked, and passes its logits on to the next MoE layer."""

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        self.inputs = inputs
        routing = super().forward(inputs)
        return replace(routing, logits=self.gate(inputs.hidden))


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_routers_see_words_and_the_logits_of_the_layer_before(
    build: Build, tokens: Tensor, checkpoint_activations: bool
) -> None:
    model = build(num_layers=4, router=Witness, checkpoint_activations=checkpoint_activations)
    _, routings = model(tokens)
    first, second = (layer.router.inputs for layer in model.moe_layers.values())
    assert torch.equal(first.token_ids, tokens.flatten())
    assert torch.equal(first.previous_ids.view_as(tokens)[:, 1:], tokens[:, :-1])
    assert (first.previous_ids.view_as(tokens)[:, 0] == -1).all()
    assert first.previous_logits is None
    assert torch.equal(second.previous_logits, routings[0].logits)


def test_words_before_a_cached_chunk_are_remembered(build: Build, tokens: Tensor) -> None:
    model = build(router=Witness).eval()
    (layer,) = model.moe_layers.values()
    with torch.no_grad():
        cache = model.new_cache(tokens.shape[0])
        for begin, end in ((0, 5), (5, 6), (6, 9)):
            model(tokens[:, begin:end], cache=cache)
            expected = torch.nn.functional.pad(tokens, (1, 0), value=-1)[:, begin:end]
            assert torch.equal(layer.router.inputs.previous_ids.view_as(expected), expected)


@torch.no_grad()
def test_padding_takes_no_place_in_the_cache(build: Build, tokens: Tensor) -> None:
    model = build(router=TopK).eval()
    lengths = torch.tensor([3, 5])
    valid = torch.arange(model.context) < lengths[:, None]
    padded = torch.where(valid, tokens[:2, :1].expand_as(valid), 0)
    cache = model.new_cache(2)
    model(padded, valid=valid, cache=cache)
    for _ in range(3):
        logits, _ = model(torch.tensor([[1], [2]]), cache=cache)
    for row, length in enumerate(lengths.tolist()):
        whole = torch.tensor([[*padded[row, :length].tolist(), *[row + 1] * 3]])
        assert torch.allclose(logits[row, -1], model(whole)[0][0, -1], atol=1e-5)


def test_fine_grained_and_shared_experts_have_the_size_that_was_asked_for(build: Build, tokens: Tensor) -> None:
    model = build(d_ff=64, d_expert=16, shared_experts=3, num_experts=5)
    (layer,) = model.moe_layers.values()
    assert layer.experts.w_in[4].shape == (16, 32)
    assert layer.shared.w_in[0].shape == (48, 32)
    assert model.blocks[0].feed_forward.experts.w_in[0].shape == (64, 32)
    assert layer.shared.w_in[0].std().item() == pytest.approx(0.02, rel=0.1)
    other = build(d_ff=64, d_expert=16, shared_experts=3, num_experts=5)
    assert torch.equal(model(tokens)[0], other(tokens)[0]), "drawn from the seed and the name"
