"""The activations' values, and their hand-written gradients against autograd."""

from __future__ import annotations

import pytest
import torch

from evomoe.moe.activation import ACTIVATIONS


def test_values() -> None:
    # Phi(1) = 0.8413447; 2 / (1 + exp(-2)) = 1.7615942.
    assert ACTIVATIONS["gelu"](torch.tensor([1.0, 0.0])).tolist() == pytest.approx([0.8413447, 0.0])
    assert ACTIVATIONS["relu"](torch.tensor([1.5, -1.0])).tolist() == [1.5, 0.0]
    assert ACTIVATIONS["swiglu"](torch.tensor([[2.0, 0.0, 3.0, 5.0]])).tolist() == [pytest.approx([5.2847825, 0.0])]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradient_equals_autograd(name: str) -> None:
    activation = ACTIVATIONS[name]
    arguments = [torch.randn(50, dtype=torch.float64, requires_grad=True) for _ in range(activation.arguments)]
    d_act = torch.randn(50, dtype=torch.float64)
    expected = torch.autograd.grad(activation.function(*arguments), arguments, d_act)
    detached = [argument.detach() for argument in arguments]
    torch.testing.assert_close(activation.gradient(d_act.clone(), *detached), expected)
