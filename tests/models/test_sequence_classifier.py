from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers.flops import flop_counter
from torch.nn.attention import SDPBackend, sdpa_kernel

from evomoe.errors import ConfigError
from evomoe.models.roberta import RoBERTa
from evomoe.models.sequence_classifier import SequenceClassifier
from evomoe.routing import DTSGate, ExpertChoice, HashLayer, LossFreeBias, Switch

V, S, D, L, HEADS, C = 41, 10, 16, 2, 4, 3
VALID = torch.arange(S) < torch.tensor([[S], [6], [1]])


def sizes(router: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {"dropout": 0.0, "moe_every": 2 if router else 0, "num_experts": 4, "router": router, **options}


def build(router: Any = None, seed: int = 0, **options: Any) -> SequenceClassifier:
    torch.manual_seed(seed)
    classes = options.pop("num_classes", C)
    return SequenceClassifier(V, S, D, L, HEADS, num_classes=classes, **sizes(router, options)).eval()


def build_pretrained(router: Any = None, seed: int = 1, **options: Any) -> RoBERTa:
    torch.manual_seed(seed)
    return RoBERTa(V, S, D, L, HEADS, **sizes(router, options)).eval()


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (3, S), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_the_head_reads_the_first_token_of_the_encoder():
    model = build(Switch)
    outputs, routings = model(rows(), valid=VALID)
    states = model.encode(rows(), valid=VALID)[0][:, 0]
    pooled = torch.tanh(states @ model.dense.weight.T + model.dense.bias)
    torch.testing.assert_close(outputs, pooled @ model.out.weight.T + model.out.bias)
    assert outputs.shape == (3, C)
    assert len(routings) == 1


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("router", [None, Switch, DTSGate, partial(ExpertChoice, capacity_factor=4.0)])
def test_padding_changes_nothing(router, norm_first):
    model = build(router, norm_first=norm_first)
    tokens = rows()
    outputs, routings = model(tokens, valid=VALID)
    changed, _ = model(torch.where(VALID, tokens, rows(1)), valid=VALID)
    assert torch.equal(outputs, changed)
    assert all(routing.num_tokens == VALID.sum() for routing in routings)
    whole = torch.cat([tokens, rows(2)[:1]])  # and a sequence of padding
    valid = torch.cat([VALID, torch.zeros(1, S, dtype=torch.bool)])
    longer, routings = model(whole, valid=valid)
    torch.testing.assert_close(longer[:3], outputs)
    assert all(routing.num_tokens == VALID.sum() for routing in routings)
    if not isinstance(router, partial):  # there tokens compete with those of other rows
        torch.testing.assert_close(model(tokens[1:2, :6])[0][0], outputs[1])


@torch.no_grad()
def test_a_pretrained_encoder_is_taken_whole_and_the_head_stays():
    model, pretrained = build(Switch), build_pretrained(Switch)
    (layer,) = pretrained.moe_layers.values()
    layer.live_experts = 1
    head = {name: value.clone() for name, value in model.state_dict().items() if name.startswith(("dense.", "out."))}
    model.load_encoder(pretrained.state_dict())
    taken = model.state_dict()
    assert next(iter(model.moe_layers.values())).live_experts == 1
    assert all(torch.equal(taken[name], value) for name, value in head.items())
    assert torch.equal(model.encode(rows(), valid=VALID)[0], pretrained.encode(rows(), valid=VALID)[0])
    assert {name for name in pretrained.state_dict() if name not in taken} == {
        *("head.weight", "head.bias", "head_norm.weight", "head_norm.bias", "head_bias")
    }


@pytest.mark.parametrize(
    ("router", "name", "value"),
    [
        (partial(LossFreeBias, update_rate=0.1), "bias", torch.tensor([3.0, 1.0, 4.0, 1.0])),
        (partial(HashLayer, vocab_size=V, table="random"), "table", torch.arange(V)[None] % 4),
    ],
    ids=["bias", "table"],
)
def test_what_a_router_remembers_is_taken_too(router, name, value):
    model, pretrained = build(router), build_pretrained(router)
    (theirs,), (ours,) = (list(network.moe_layers.values()) for network in (pretrained, model))
    getattr(theirs.router, name).copy_(value)
    model.load_encoder(pretrained.state_dict())
    assert torch.equal(getattr(ours.router, name), value)


@pytest.mark.parametrize(
    ("router", "options"),
    [(None, {}), (Switch, {"num_experts": 2}), (Switch, {"d_expert": 8})],
    ids=["dense", "experts", "width"],
)
def test_another_encoder_is_refused(router, options):
    with pytest.raises(RuntimeError, match=r"missing|size mismatch"):
        build(Switch).load_encoder(build_pretrained(router, **options).state_dict())


def test_an_encoder_of_one_seed_starts_as_that_of_pretraining():
    model, pretrained = build(Switch, seed=1).state_dict(), build_pretrained(Switch).state_dict()
    assert all(torch.equal(model[name], pretrained[name]) for name in model.keys() & pretrained.keys())
    assert len(model.keys() & pretrained.keys()) == len(model) - 4


def test_dropout_of_the_head_is_its_own():
    for head_dropout, alike in ((0.0, True), (0.5, False)):
        model = build(head_dropout=head_dropout).train()
        assert torch.equal(model(rows())[0], model(rows())[0]) is alike


def test_flops_are_those_that_are_counted():
    model = build(partial(Switch, capacity_factor=None))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        model(rows())
    assert counter.get_total_flops() == pytest.approx(model.forward_flops(3, S, 1.0), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes=0: expected at least 1"),
        ({"head_dropout": 1.0}, "head_dropout=1.0: expected a probability"),
        ({"head_dropout": -0.1}, "head_dropout=-0.1: expected a probability"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        build(**options)
    assert message in str(caught.value)
