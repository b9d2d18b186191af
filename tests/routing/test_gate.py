from __future__ import annotations

import pytest
import torch

from evomoe.errors import ConfigError
from evomoe.routing.gate import LinearGate


@pytest.mark.parametrize(("init", "deviation"), [("scaled", 1.0), ("small", 0.1**0.5), ("zeros", 0.0)])
def test_initial_logits_of_unit_variance_states(init, deviation):
    torch.manual_seed(0)
    logits = LinearGate(400, 100, init)(torch.randn(100, 400))
    assert logits.std().item() == pytest.approx(deviation, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_are_computed_in_fp32(dtype):
    gate, hidden = LinearGate(32, 4), torch.randn(5, 32).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = gate(hidden)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, hidden.float() @ gate.weight.t())


def test_a_gate_cast_to_bf16_still_computes_in_fp32():
    gate, hidden = LinearGate(32, 4).bfloat16(), torch.randn(5, 32)
    assert torch.equal(gate(hidden), hidden @ gate.weight.float().t())


def test_unknown_init():
    with pytest.raises(ConfigError, match="gate init='xavier' is unknown: expected one of scaled, small, zeros, orth"):
        LinearGate(8, 4, "xavier")
