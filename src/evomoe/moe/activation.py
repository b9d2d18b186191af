"""The activations of an expert, each with the in-place steps that the fused loop takes.

Shapes: H expert hidden width; F width of the first matrix's output: H, or 2H for a gated activation; N rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Activation(ABC):
    """An elementwise function between the two matrices of an expert."""

    width_factor = 1
    """F / H."""

    @abstractmethod
    def __call__(self, pre: Tensor) -> Tensor:
        """Activation of rows, ``(..., F)`` to ``(..., H)``, differentiable."""

    @abstractmethod
    def forward(self, pre: Tensor, act: Tensor) -> None:
        """Write the activation of ``pre (F, N)`` to ``act (H, N)``, outside autograd."""

    @abstractmethod
    def backward(self, d_act: Tensor, pre: Tensor) -> Tensor:
        """Gradient at ``pre (F, N)`` from the gradient ``d_act (H, N)``, which is overwritten."""


class Gelu(Activation):
    """GELU with the error function."""

    def __call__(self, pre: Tensor) -> Tensor:  # noqa: D102
        return F.gelu(pre)

    def forward(self, pre: Tensor, act: Tensor) -> None:  # noqa: D102
        aten.gelu.out(pre, out=act)

    def backward(self, d_act: Tensor, pre: Tensor) -> Tensor:  # noqa: D102
        return aten.gelu_backward.grad_input(d_act, pre, grad_input=d_act)


class Relu(Activation):
    """ReLU."""

    def __call__(self, pre: Tensor) -> Tensor:  # noqa: D102
        return F.relu(pre)

    def forward(self, pre: Tensor, act: Tensor) -> None:  # noqa: D102
        torch.clamp_min(pre, 0, out=act)

    def backward(self, d_act: Tensor, pre: Tensor) -> Tensor:  # noqa: D102
        return aten.threshold_backward.grad_input(d_act, pre, 0, grad_input=d_act)


class SwiGlu(Activation):
    """``silu(gate) * up``, the two being the halves of ``pre`` (Shazeer, arXiv 2002.05202, equation 6)."""

    width_factor = 2

    def __call__(self, pre: Tensor) -> Tensor:  # noqa: D102
        gate, up = pre.chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, pre: Tensor, act: Tensor) -> None:  # noqa: D102
        gate, up = pre.chunk(2)
        aten.silu.out(gate, out=act)
        act.mul_(up)

    def backward(self, d_act: Tensor, pre: Tensor) -> Tensor:  # noqa: D102
        gate, up = pre.chunk(2)
        d_pre = torch.empty_like(pre)
        d_gate, d_up = d_pre.chunk(2)
        aten.silu.out(gate, out=d_up)
        d_up.mul_(d_act)
        aten.silu_backward.grad_input(d_act.mul_(up), gate, grad_input=d_gate)
        return d_pre


ACTIVATIONS: dict[str, Activation] = {"gelu": Gelu(), "relu": Relu(), "swiglu": SwiGlu()}
