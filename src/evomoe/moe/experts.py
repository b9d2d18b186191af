"""The experts of one layer: their weights and the choice of the kernel that computes them.

Shapes: T tokens, D model width, H expert hidden width, E experts, A assignments (chosen token-expert pairs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomoe.errors import ConfigError
from evomoe.moe.activation import ACTIVATIONS
from evomoe.moe.kernels import Weights, compute_dtype, grouped_experts, grouped_mix, loop_experts, loop_mix
from evomoe.routing.contract import SparseRouting

BACKENDS = ("auto", "loop", "grouped_mm")
GROUPED_MULTIPLE = 8
"""``grouped_mm`` wants rows of a multiple of 16 bytes: 8 elements of bf16."""


class Experts(nn.Module):
    """E feed-forward networks of equal shape, ``w_out act(w_in x + b_in) + b_out`` each.

    Every expert's matrices are Parameters of their own, so that experts which do not compute have no gradient at all
    (``.grad`` None: no memory, no optimizer work), while shapes and checkpoints never change.

    Args:
        num_experts: number of experts E.
        d_model: width D of the token states.
        d_expert: hidden width H.
        activation: ``gelu``, ``relu``, or ``swiglu`` (``w_in`` then has 2H rows: gate, then up).
        bias: whether both layers of an expert have a bias.
        backend: ``loop`` over the experts' contiguous slices, ``grouped_mm`` (one kernel for all experts, without
            waiting for the device), or ``auto``: ``grouped_mm`` for bf16 on CUDA where the widths allow it, else
            ``loop``, which is the faster one on CPU.
        init_std: standard deviation of the initial weights; biases start at zero.
        output_std: the same for ``w_out``; None for ``init_std``.

    Raises:
        ConfigError: an unknown activation or backend, or widths that the backend cannot do.
    """

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_expert: int,
        *,
        activation: str = "gelu",
        bias: bool = True,
        backend: str = "auto",
        init_std: float = 0.02,
        output_std: float | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation={activation!r} is unknown: expected one of {', '.join(ACTIVATIONS)}")
        if backend not in BACKENDS:
            raise ConfigError(f"backend={backend!r} is unknown: expected one of {', '.join(BACKENDS)}")
        self.aligned = d_model % GROUPED_MULTIPLE == 0 and d_expert % GROUPED_MULTIPLE == 0
        if backend == "grouped_mm" and not self.aligned:
            raise ConfigError(
                f"backend='grouped_mm' with d_model={d_model}, d_expert={d_expert}: expected multiples of "
                f"{GROUPED_MULTIPLE}; change the widths or use backend='loop'"
            )
        self.num_experts = num_experts
        self.activation = ACTIVATIONS[activation]
        self.backend = backend
        self.init_std = init_std
        self.output_std = init_std if output_std is None else output_std

        def parameters(*shape: int) -> nn.ParameterList:
            return nn.ParameterList(nn.Parameter(torch.empty(shape)) for _ in range(num_experts))

        d_in = self.activation.arguments * d_expert
        self.w_in = parameters(d_in, d_model)
        self.w_out = parameters(d_model, d_expert)
        self.b_in = parameters(d_in) if bias else None
        self.b_out = parameters(d_model) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all experts' weights from the global random generator."""
        with torch.no_grad():
            for w_in in self.w_in:
                w_in.normal_(0, self.init_std)
            for w_out in self.w_out:
                w_out.normal_(0, self.output_std)
            for bias in (*(self.b_in or ()), *(self.b_out or ())):
                bias.zero_()

    def forward(self, rows: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Each row through its expert, in ordinary differentiable operations.

        Args:
            rows: ``(A, D)``, sorted by expert.
            tokens_per_expert: ``(E,)`` int64, sums to A.

        Returns:
            ``(A, D)``, of autocast's type where that is on. An expert without rows has gradients of zero, not None.
        """
        kernel = grouped_experts if self._use_grouped(rows) else loop_experts
        return kernel(rows, tokens_per_expert, self._weights(), self.activation)

    def mix(self, hidden: Tensor, routing: SparseRouting) -> Tensor:
        """Gather the assigned rows, let the experts compute them, and add them up by the routing's weights.

        Args:
            hidden: ``(T, D)``.
            routing: assignments of the T tokens to the E experts.

        Returns:
            ``(T, D)`` of the type of ``hidden``, zero for a token without assignment. Gradients reach ``hidden``,
            ``routing.weight`` and all experts' parameters, once (no second derivative).
        """
        kernel = grouped_mix if self._use_grouped(hidden) else loop_mix
        mixed = kernel(
            hidden, routing.token, routing.weight, routing.tokens_per_expert, self._weights(), self.activation
        )
        return mixed.to(hidden.dtype)

    def base(self, hidden: Tensor) -> Tensor:
        """Expert 0 alone, ``(T, D)`` to ``(T, D)``: an ordinary feed-forward layer; the others get no gradient."""
        pre = F.linear(hidden, self.w_in[0], self.b_in[0] if self.b_in is not None else None)
        return F.linear(self.activation(pre), self.w_out[0], self.b_out[0] if self.b_out is not None else None)

    def expert_parameters(self, e: int) -> dict[str, nn.Parameter]:
        """The parameters of expert ``e`` by name: ``w_in (H, D)``, ``w_out (D, H)``, and, if any, ``b_in, b_out``."""
        lists = {"w_in": self.w_in, "w_out": self.w_out, "b_in": self.b_in, "b_out": self.b_out}
        return {name: parameters[e] for name, parameters in lists.items() if parameters is not None}

    def extra_repr(self) -> str:
        """Number and shape of the experts."""
        d_in, d_model = self.w_in[0].shape
        return f"num_experts={self.num_experts}, d_model={d_model}, d_in={d_in}, backend={self.backend}"

    def _use_grouped(self, rows: Tensor) -> bool:
        if self.backend == "auto":
            return self.aligned and rows.is_cuda and compute_dtype(rows) == torch.bfloat16
        if self.backend == "grouped_mm" and compute_dtype(rows) == torch.float64:
            raise ConfigError("backend='grouped_mm' has no float64: expected float32 or less, or backend='loop'")
        return self.backend == "grouped_mm"

    def _weights(self) -> Weights:
        return Weights(tuple(self.w_in), tuple(self.w_out), tuple(self.b_in or ()), tuple(self.b_out or ()))
