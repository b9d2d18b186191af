"""No router may carry the future into the past, in training or in evaluation."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import evomoe.routing
from evomoe.errors import ConfigError
from evomoe.models.gpt import GPT
from evomoe.routing import Router
from evomoe.routing.methods.topk import TopK


def all_routers() -> list[type[Router]]:
    found = set()
    for module in pkgutil.iter_modules(evomoe.routing.__path__):
        members = vars(importlib.import_module(f"evomoe.routing.{module.name}")).values()
        found |= {m for m in members if inspect.isclass(m) and issubclass(m, Router) and not inspect.isabstract(m)}
    return sorted(found, key=lambda router: router.__name__)


def required(router: type[Router]) -> dict[str, int]:
    """What routers by word need to be told beyond ``(d_model, num_experts)``."""
    known = {"vocab_size": 50, "sequence_length": 16, "context": 16}
    missing = [
        name
        for name, parameter in list(inspect.signature(router).parameters.items())[2:]
        if parameter.default is inspect.Parameter.empty
    ]
    return {name: known[name] for name in missing}


@pytest.mark.parametrize("final_rule", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("router", all_routers(), ids=lambda router: router.__name__)
def test_changing_the_future_leaves_past_logits_alone(
    build: Callable[..., GPT], tokens: Tensor, router: type[Router], mode: str, final_rule: bool
) -> None:
    factory = functools.partial(router, **required(router))
    gate = factory(32, 4)
    if not (gate.causal_in_train and gate.causal_in_eval):
        with pytest.raises(ConfigError, match=f"{router.__name__} looks at later tokens"):
            build(router=factory)
    model = build(router=factory, moe_every=1, allow_future_leak=True).train(mode == "train")
    if not (gate.causal_in_train if mode == "train" else gate.causal_in_eval):
        return
    # One sequence: where a capacity binds, sequences that stand earlier in the batch may rightly displace later ones.
    tokens = tokens[:1]
    cut = 7
    future = tokens.clone()
    future[:, cut:] = (future[:, cut:] + 13) % 50
    logits = []
    for inputs in (tokens, future):
        torch.manual_seed(3)  # the same exploration noise
        logits.append(model(inputs, final_rule=final_rule)[0].detach())
    torch.testing.assert_close(logits[0][:, :cut], logits[1][:, :cut])
    assert not torch.allclose(logits[0][:, cut:], logits[1][:, cut:])


def test_the_check_sees_a_leak(build: Callable[..., GPT], tokens: Tensor) -> None:
    router = functools.partial(TopK, top_k=2, capacity_factor=0.5, priority="choice")
    model = build(router=router, moe_every=1, allow_future_leak=True)
    logits, _ = model(tokens[:1])
    past = set()
    for shift in range(1, 50):
        future = tokens[:1].clone()
        future[:, 7:] = (future[:, 7:] + shift) % 50
        past.add(torch.allclose(model(future)[0][:, :7], logits[:, :7]))
    assert False in past
