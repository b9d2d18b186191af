from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers.flops import flop_counter
from models.test_causality import all_routers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from evomoe.errors import ConfigError
from evomoe.models.transformer import Transformer
from evomoe.routing import ExpertChoice, ForcedBalance, HashLayer, Router, Switch

V, CONTEXT, D, L, HEADS = 37, 12, 16, 2, 4
SOURCE_VALID = torch.arange(9) < torch.tensor([[9], [5], [1]])
VALID = torch.arange(7) < torch.tensor([[7], [2], [6]])
DROPLESS = partial(Switch, capacity_factor=None)
KNOWN = {
    "vocab_size": V,
    "sequence_length": CONTEXT,
    "context": CONTEXT,
    # Tokens that compete for experts see one another, also across a batch: here each goes its own way, or that of its
    # sequence.
    "capacity_factor": None,
    "eval_capacity_factor": None,
    "pool": "sequence",
}


def alone(router: type[Router]) -> Callable[..., Router]:
    """A factory of it in which sequences do not see one another, where it has a choice."""
    options = {}
    for name, parameter in list(inspect.signature(router).parameters.items())[2:]:
        required = parameter.default is inspect.Parameter.empty
        optional = str(parameter.annotation).endswith("None") or name == "pool"
        if name in KNOWN and (required or optional):
            options[name] = KNOWN[name]
    return partial(router, **options)


def is_causal(router: Callable[..., Router]) -> bool:
    gate = router(D, 4)
    return gate.causal_in_train and gate.causal_in_eval


# The benchmark's router goes by the place of a token in the batch, which padding and caching change.
ROUTERS = {router.__name__: alone(router) for router in all_routers() if router is not ForcedBalance}
ROUTERS["HashLayer-bigram"] = partial(HashLayer, vocab_size=V, table="bigram")
ENCODER_ONLY = [router for router in ROUTERS.values() if not is_causal(router)]
of_all_routers = pytest.mark.parametrize("router", [None, *ROUTERS.values()], ids=["dense", *ROUTERS])


def build(router=None, **options) -> Transformer:
    torch.manual_seed(0)
    options = {"dropout": 0.0, "moe_every": 2 if router else 0, "num_experts": 4, **options}
    if router in ENCODER_ONLY:
        options["decoder_router"] = DROPLESS
    return Transformer(V, CONTEXT, D, L, HEADS, router=router, **options).eval()


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, V, (3, 9), generator=generator), torch.randint(0, V, (3, 7), generator=generator)


def copy_attention(ours: nn.Module, theirs: nn.MultiheadAttention) -> None:
    for name in ("weight", "bias"):
        whole = getattr(theirs, f"in_proj_{name}")
        if hasattr(ours, "qkv"):
            getattr(ours.qkv, name).copy_(whole)
        else:
            getattr(ours.query, name).copy_(whole[:D])
            getattr(ours.key_value, name).copy_(whole[D:])
    ours.output.load_state_dict(theirs.out_proj.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_dense_model_is_the_transformer_of_pytorch(norm_first):
    ours = build(norm_first=norm_first)
    torch.manual_seed(1)
    theirs = nn.Transformer(
        D, HEADS, L, L, 4 * D, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    ).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    if norm_first:
        ours.encoder_norm.load_state_dict(theirs.encoder.norm.state_dict())
        ours.decoder_norm.load_state_dict(theirs.decoder.norm.state_dict())
    else:
        theirs.encoder.norm = theirs.decoder.norm = None
    for blocks, layers in ((ours.encoder, theirs.encoder.layers), (ours.decoder, theirs.decoder.layers)):
        for block, layer in zip(blocks, layers, strict=True):
            copy_attention(block.attention, layer.self_attn)
            block.attention_norm.load_state_dict(layer.norm1.state_dict())
            last = layer.norm2
            if block.cross_attention is not None:
                copy_attention(block.cross_attention, layer.multihead_attn)
                block.cross_norm.load_state_dict(layer.norm2.state_dict())
                last = layer.norm3
            block.feed_forward_norm.load_state_dict(last.state_dict())
            sources = {"w_in": layer.linear1.weight, "b_in": layer.linear1.bias}
            sources |= {"w_out": layer.linear2.weight, "b_out": layer.linear2.bias}
            for name, parameter in block.feed_forward.experts.expert_parameters(0).items():
                source = sources[name]
                parameter.copy_(source if parameter.shape == source.shape else source.t())
    source, target = pair()
    expected = theirs(
        ours.token_embedding(source) + ours.source_positions.weight[:9],
        ours.token_embedding(target) + ours.target_positions.weight[:7],
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(7),
        src_key_padding_mask=~SOURCE_VALID,
        memory_key_padding_mask=~SOURCE_VALID,
    )
    logits, _ = ours(source, target, source_valid=SOURCE_VALID, valid=VALID)
    scores = (expected @ ours.token_embedding.weight.t())[..., :V]
    torch.testing.assert_close(logits[VALID], scores[VALID], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@of_all_routers
def test_padding_of_either_side_changes_nothing(router):
    model = build(router)
    (source, target), (other_source, other_target) = pair(), pair(1)
    logits, routings = model(source, target, source_valid=SOURCE_VALID, valid=VALID)
    changed, changed_routings = model(
        torch.where(SOURCE_VALID, source, other_source),
        torch.where(VALID, target, other_target),
        source_valid=SOURCE_VALID,
        valid=VALID,
    )
    assert torch.equal(logits[VALID], changed[VALID])
    counts = [SOURCE_VALID.sum(), VALID.sum()] if routings else []
    for routing, other, count in zip(routings, changed_routings, counts, strict=True):
        assert torch.equal(routing.load, other.load)
        assert routing.num_tokens == count
    alone, _ = model(source[1:2, :5], target[1:2, :2])
    torch.testing.assert_close(alone[0], logits[1, :2])


@torch.no_grad()
@of_all_routers
def test_the_decoder_never_sees_the_future_and_always_the_source(router):
    model = build(router)
    source, target = pair()
    logits, _ = model(source, target)
    later = target.clone()
    later[:, 4] = (later[:, 4] + 1) % V
    difference = (model(source, later)[0] - logits).abs().amax(dim=-1)
    assert (difference[:, :4] < 1e-6).all()  # batches of experts change, and with them the last digits
    assert (difference[:, 4:] > 1e-4).all()
    other = source.clone()
    other[:, -1] = (other[:, -1] + 1) % V
    assert ((model(other, target)[0] - logits).abs().amax(dim=-1) > 0).all()


def test_only_the_decoder_refuses_a_router_that_leaks():
    with pytest.raises(ConfigError, match="router ExpertChoice looks at later tokens"):
        build(ExpertChoice)
    model = build(ExpertChoice, allow_future_leak=True)
    assert list(model.moe_layers) == ["encoder_1", "decoder_1"]


@torch.no_grad()
def test_the_encoder_may_use_any_router():
    model = build(partial(ExpertChoice, pool="sequence"), decoder_router=DROPLESS)
    routers = [type(layer.router).__name__ for layer in model.moe_layers.values()]
    assert routers == ["ExpertChoice", "Switch"]
    source, target = pair()
    logits, _ = model(source, target, source_valid=SOURCE_VALID, valid=VALID)
    changed, _ = model(source, torch.where(VALID, target, 0), source_valid=SOURCE_VALID, valid=VALID)
    assert torch.equal(logits[VALID], changed[VALID])
    later = target.clone()
    later[:, 4] = (later[:, 4] + 1) % V
    assert ((model(source, later)[0] - model(source, target)[0])[:, :4].abs() < 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[7], [1] * 7, [3, 1, 3]], ids=str)
@of_all_routers
def test_cached_decoding_equals_the_whole(router, pieces):
    model = build(router)
    source, target = pair()
    whole, _ = model(source, target, source_valid=SOURCE_VALID)
    memories, _ = model.encode(source, valid=SOURCE_VALID)
    cache = model.new_cache(3)
    parts = [
        model.decode(piece, memories, source_valid=SOURCE_VALID, cache=cache)[0]
        for piece in target.split(pieces, dim=1)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("router", [None, DROPLESS])
def test_flops_are_those_that_are_counted(router):
    model = build(router)
    source, target = pair()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        model(source, target)
    assert counter.get_total_flops() == pytest.approx(model.forward_flops(3, 9, 7), rel=0.01)


def test_gradients_reach_every_parameter():
    model = build(DROPLESS, num_experts=1).train()
    source, target = pair()
    model(source, target)[0].logsumexp(dim=-1).sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_models_of_one_seed_share_their_weights():
    dense, sparse = build().state_dict(), build(Switch).state_dict()
    for name in dense:
        if "coder.1.feed_forward" not in name:
            assert torch.equal(dense[name], sparse[name]), name


@pytest.mark.parametrize(("lengths", "name"), [((13, 3), "source"), ((3, 13), "target")])
def test_long_sequences_are_refused(lengths, name):
    source, target = (torch.zeros(1, length, dtype=torch.long) for length in lengths)
    with pytest.raises(ConfigError, match=f"{name} of 13 tokens, but the model's context is 12"):
        build()(source, target)
