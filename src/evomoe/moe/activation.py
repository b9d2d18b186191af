"""The activations of an expert, each with the gradient that the fused loop applies by hand.

Shapes: H expert hidden width; F width of the first matrix's output: H, or 2H for a gated activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An elementwise function between the two matrices of an expert.

    Args:
        arguments: how many tensors of width H it reads (F / H): 1, or 2 for a gate and a value.
        function: from its arguments to the activation, all of one shape.
        gradient: from the gradient at the activation, which it may overwrite, and the arguments, to the gradients at
            the arguments.
    """

    arguments: int
    function: Callable[..., Tensor]
    gradient: Callable[..., tuple[Tensor, ...]]

    def __call__(self, pre: Tensor) -> Tensor:
        """Activation of rows, ``(..., F)`` to ``(..., H)``."""
        return self.function(*pre.chunk(self.arguments, dim=-1))


def _gelu_gradient(d_act: Tensor, pre: Tensor) -> tuple[Tensor, ...]:
    return (aten.gelu_backward.grad_input(d_act, pre, grad_input=d_act),)


def _relu_gradient(d_act: Tensor, pre: Tensor) -> tuple[Tensor, ...]:
    return (aten.threshold_backward.grad_input(d_act, pre, 0, grad_input=d_act),)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Shazeer, arXiv 2002.05202, equation 6."""
    return F.silu(gate) * up


def _swiglu_gradient(d_act: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    d_up = F.silu(gate).mul_(d_act)
    return aten.silu_backward.grad_input(d_act.mul_(up), gate, grad_input=d_act), d_up


ACTIVATIONS = {
    "gelu": Activation(1, F.gelu, _gelu_gradient),
    "relu": Activation(1, F.relu, _relu_gradient),
    "swiglu": Activation(2, _swiglu, _swiglu_gradient),
}
