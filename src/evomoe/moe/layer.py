"""The MoE layer: one expert while it is young, a routed mixture once the others are born."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from evomoe.errors import ConfigError
from evomoe.moe.experts import Experts
from evomoe.routing import Router, Routing, RoutingInput, SoftRouting, SparseRouting
from evomoe.routing.selection import count_tokens

RouterFactory = Callable[[int, int], Router]
"""Called with ``(d_model, num_experts)``; for instance ``functools.partial(Switch, capacity_factor=1.25)``."""


class MoELayer(nn.Module):
    """A feed-forward layer of E experts behind a router.

    1. Flatten ``(B, S, D)`` to ``(T, D)``.
    2. While one expert lives, it is an ordinary feed-forward layer: no router runs, the unborn experts get no gradient
       (their ``.grad`` stays None, so no optimizer touches them), and the routing says "expert 0, weight 1".
    3. Else the router returns a routing, and the experts compute just the chosen rows; padding gets zeros.

    Args:
        d_model: width D of the token states.
        d_expert: hidden width H of an expert.
        num_experts: number of experts E, allocated from the start.
        router: factory of the router.
        activation: ``gelu``, ``relu`` or ``swiglu``.
        bias: whether the experts have biases.
        backend: expert kernel, see ``Experts``.
        init_std: standard deviation of the experts' weights.
        output_std: the same for their output matrices; None for ``init_std``.
    """

    born: Tensor

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        num_experts: int,
        router: RouterFactory,
        *,
        activation: str = "gelu",
        bias: bool = True,
        backend: str = "auto",
        init_std: float = 0.02,
        output_std: float | None = None,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ConfigError(f"num_experts={num_experts}: expected at least 1")
        self.num_experts = num_experts
        self.router = router(d_model, num_experts)
        self.experts = Experts(
            num_experts,
            d_model,
            d_expert,
            activation=activation,
            bias=bias,
            backend=backend,
            init_std=init_std,
            output_std=output_std,
        )
        self.register_buffer("born", torch.tensor(num_experts))
        self._live = num_experts  # the buffer's value as an int, so that a forward pass never waits for the device

    @property
    def live_experts(self) -> int:
        """How many experts compute: 1 before the spawn, E after it. Saved with the weights."""
        return self._live

    @live_experts.setter
    def live_experts(self, number: int) -> None:
        if number not in (1, self.num_experts):
            raise ValueError(f"live_experts={number}: expected 1 or {self.num_experts}")
        self._live = number
        self.born.fill_(number)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._live = int(self.born)

    def forward(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        valid: Tensor | None = None,
        final_rule: bool = False,
    ) -> tuple[Tensor, Routing]:
        """Mix the experts' outputs.

        Args:
            hidden: ``(B, S, D)``.
            token_ids: ``(B, S)``, for routers that read words.
            valid: ``(B, S)`` bool, False at padding.
            final_rule: route by the final sparse rule instead of the training rule.

        Returns:
            ``(B, S, D)`` of the type of ``hidden``, without the residual, and the routing.
        """
        batch, sequence, width = hidden.shape
        flat = hidden.reshape(-1, width)  # (T, D)
        flat_valid = None if valid is None else valid.reshape(-1)
        if self._live < self.num_experts:
            output, routing = self._grow(flat, flat_valid)
            return output.view_as(hidden), routing
        decision = self.router(
            RoutingInput(
                hidden=flat,
                batch=batch,
                sequence=sequence,
                token_ids=None if token_ids is None else token_ids.reshape(-1),
                valid=flat_valid,
                final_rule=final_rule,
            )
        )
        if isinstance(decision, SoftRouting):
            return self._mix_slots(flat, decision).view_as(hidden), decision
        return self.experts.mix(flat, decision).view_as(hidden), decision

    def _grow(self, flat: Tensor, valid: Tensor | None) -> tuple[Tensor, SparseRouting]:
        if valid is None:
            token = torch.arange(flat.shape[0], device=flat.device)
            output = self.experts.base(flat)
        else:
            token = valid.nonzero(as_tuple=True)[0]
            rows = self.experts.base(flat[token])
            output = rows.new_zeros(flat.shape).index_copy(0, token, rows)
        tokens_per_expert = torch.zeros(self.num_experts, dtype=torch.int64, device=flat.device)
        tokens_per_expert[0] = token.numel()
        scores = torch.zeros(flat.shape[0], self.num_experts, device=flat.device)
        scores[token, 0] = 1
        num_tokens = count_tokens(valid, flat)
        routing = SparseRouting(
            token=token,
            weight=torch.ones(token.shape, device=flat.device),
            tokens_per_expert=tokens_per_expert,
            scores=scores,
            num_tokens=num_tokens,
            dropped=num_tokens.new_zeros(()),
        )
        return output.to(flat.dtype), routing

    def _mix_slots(self, flat: Tensor, routing: SoftRouting) -> Tensor:
        groups, size, num_experts, capacity = routing.dispatch.shape
        grouped = flat.view(groups, size, -1)
        slots = torch.einsum("gsec,gsd->egcd", routing.dispatch.to(flat.dtype), grouped)  # (E, G, C, D)
        counts = torch.full((num_experts,), groups * capacity, device=flat.device)
        outputs = self.experts(slots.reshape(-1, flat.shape[1]), counts).view_as(slots)
        mixed = torch.einsum("gsec,egcd->gsd", routing.combine.to(outputs.dtype), outputs)
        return mixed.reshape(flat.shape).to(flat.dtype)
