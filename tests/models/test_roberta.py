from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.flops import flop_counter
from torch.nn.attention import SDPBackend, sdpa_kernel

from evomoe.errors import ConfigError
from evomoe.models.roberta import RoBERTa
from evomoe.routing import DTSGate, ExpertChoice, Switch

V, S, D, L, HEADS = 41, 10, 16, 2, 4


def build(router=None, **options) -> RoBERTa:
    torch.manual_seed(0)
    options = {"dropout": 0.0, "moe_every": 2 if router else 0, "num_experts": 4, **options}
    return RoBERTa(V, S, D, L, HEADS, router=router, **options).eval()


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (3, S), generator=torch.Generator().manual_seed(seed))


VALID = torch.arange(S) < torch.tensor([[S], [6], [1]])


@torch.no_grad()
def test_the_dense_model_is_bert():
    """With the weights of Hugging Face's BERT, which is the same network, and with its padding."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=HEADS,
        intermediate_size=4 * D,
        max_position_embeddings=S,
        layer_norm_eps=1e-5,
        type_vocab_size=1,
    )
    torch.manual_seed(1)
    theirs = transformers.BertForMaskedLM(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.bert.embeddings.token_type_embeddings.weight.zero_()
    ours, head = build(), theirs.cls.predictions
    ours.token_embedding.weight[:V] = theirs.bert.embeddings.word_embeddings.weight
    ours.position_embedding.weight.copy_(theirs.bert.embeddings.position_embeddings.weight)
    ours.norm.load_state_dict(theirs.bert.embeddings.LayerNorm.state_dict())
    ours.head.load_state_dict(head.transform.dense.state_dict())
    ours.head_norm.load_state_dict(head.transform.LayerNorm.state_dict())
    ours.head_bias[:V] = head.bias
    for block, layer in zip(ours.blocks, theirs.bert.encoder.layer, strict=True):
        attention = layer.attention.self
        for name in ("weight", "bias"):
            parts = [getattr(part, name) for part in (attention.query, attention.key, attention.value)]
            getattr(block.attention.qkv, name).copy_(torch.cat(parts))
        block.attention.output.load_state_dict(layer.attention.output.dense.state_dict())
        block.attention_norm.load_state_dict(layer.attention.output.LayerNorm.state_dict())
        block.feed_forward_norm.load_state_dict(layer.output.LayerNorm.state_dict())
        into, out = layer.intermediate.dense, layer.output.dense
        for name, parameter in block.feed_forward.experts.expert_parameters(0).items():
            source = {"w_in": into.weight, "b_in": into.bias, "w_out": out.weight, "b_out": out.bias}[name]
            parameter.copy_(source if parameter.shape == source.shape else source.t())
    tokens = rows()
    expected = theirs(input_ids=tokens, attention_mask=VALID.long()).logits
    logits, _ = ours(tokens, valid=VALID)
    torch.testing.assert_close(logits[VALID], expected[VALID], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("router", [None, Switch, DTSGate, partial(ExpertChoice, capacity_factor=4.0)])
def test_padding_changes_nothing(router, norm_first):
    model = build(router, norm_first=norm_first)
    tokens = rows()
    other = torch.where(VALID, tokens, rows(1))
    logits, routings = model(tokens, valid=VALID)
    changed, changed_routings = model(other, valid=VALID)
    assert torch.equal(logits[VALID], changed[VALID])
    for routing, other_routing in zip(routings, changed_routings, strict=True):
        assert torch.equal(routing.tokens_per_expert, other_routing.tokens_per_expert)
        assert routing.num_tokens == VALID.sum()
    if router is not None and not isinstance(router, partial):  # there tokens compete with those of other rows
        alone, _ = model(tokens[1:2, :6])
        torch.testing.assert_close(alone[0], logits[1, :6])


@torch.no_grad()
def test_every_token_sees_later_ones():
    model = build(Switch, norm_first=True)
    tokens = rows()[:1]
    changed = tokens.clone()
    changed[0, -1] = (tokens[0, -1] + 1) % V
    difference = (model(tokens)[0] - model(changed)[0]).abs().amax(dim=-1)
    assert (difference > 0).all()


@torch.no_grad()
def test_scored_positions_are_those_of_the_whole():
    model = build(Switch)
    tokens, at = rows(), torch.rand(3, S, generator=torch.Generator().manual_seed(2)) < 0.3
    torch.testing.assert_close(model(tokens, at=at)[0], model(tokens)[0][at])


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_flops_are_those_that_are_counted(share):
    model = build(partial(Switch, capacity_factor=None))
    tokens = rows()
    at = torch.zeros(3, S, dtype=torch.bool)
    at.view(-1)[: round(share * at.numel())] = True
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        model(tokens, at=at)
    charged = model.flops_per_token(S, 1.0, scored=share) * tokens.numel()
    assert counter.get_total_flops() == pytest.approx(charged, rel=0.01)


def test_models_of_one_seed_share_their_weights():
    dense, sparse = build().state_dict(), build(Switch).state_dict()
    for name in dense:
        if "blocks.1.feed_forward" not in name:
            assert torch.equal(dense[name], sparse[name]), name


def test_a_long_sequence_is_refused():
    with pytest.raises(ConfigError, match="sequence of 11 tokens, but the model's context is 10"):
        build()(torch.zeros(1, 11, dtype=torch.long))
