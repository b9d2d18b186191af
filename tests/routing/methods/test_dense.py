from __future__ import annotations

import functools

import pytest
import torch

from evomoe.routing import DenseMoE, DTSGate, Router, RoutingInput, ScheduleValues, Switch, TopK

INPUTS = RoutingInput(hidden=torch.randn(9, 16, generator=torch.Generator().manual_seed(0)), batch=1, sequence=9)


def test_every_expert_with_its_probability():
    dense = DenseMoE(16, 5)
    routing = dense(INPUTS)
    assert routing.tokens_per_expert.tolist() == [9] * 5
    torch.testing.assert_close(routing.to_dense(), torch.softmax(INPUTS.hidden @ dense.gate.weight.t(), dim=1))
    assert routing.losses == {}


@pytest.mark.parametrize(
    ("router", "experts"),
    [
        (functools.partial(TopK, top_k=5, renormalize=False), 5),
        (functools.partial(TopK, top_k=5, renormalize=True), 5),
        (functools.partial(DTSGate, threshold=1e-6), 5),
        (functools.partial(DTSGate, final_top_k=5), 5),
        (Switch, 1),
        (functools.partial(TopK, top_k=1), 1),
    ],
)
def test_choosing_all_experts_is_the_dense_mixture(router, experts):
    dense, chooser = DenseMoE(16, experts), router(16, experts)
    assert isinstance(chooser, Router)
    chooser.load_state_dict(dense.state_dict())
    chooser.eval().set_schedule(ScheduleValues(hardened="final_top_k" in getattr(router, "keywords", {})))
    torch.testing.assert_close(chooser(INPUTS).to_dense(), dense(INPUTS).to_dense())
