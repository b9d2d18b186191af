"""The MoE layer: one expert while it is young, a routed mixture once the others are born."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evomoe.errors import ConfigError
from evomoe.moe.experts import Experts
from evomoe.routing import Router, Routing, RoutingInput, SoftRouting, SparseRouting
from evomoe.routing.selection import make_routing

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
        shared_experts: experts that work for every token beside the routed ones, without a gate (DeepSeekMoE, arXiv
            2401.06066, section 3.2); computed as one feed-forward of their joint width.
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
        shared_experts: int = 0,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ConfigError(f"num_experts={num_experts}: expected at least 1")
        if shared_experts < 0:
            raise ConfigError(f"shared_experts={shared_experts}: expected 0 or more")
        self.num_experts = num_experts
        self.d_model = d_model
        self.router = router(d_model, num_experts)
        build = partial(
            Experts,
            d_model=d_model,
            activation=activation,
            bias=bias,
            backend=backend,
            init_std=init_std,
            output_std=output_std,
        )
        self.experts = build(num_experts, d_expert=d_expert)
        self.shared = build(1, d_expert=shared_experts * d_expert) if shared_experts else None
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

    @property
    def routes(self) -> bool:
        """Whether the router runs, as all experts live, rather than expert 0 alone."""
        return self._live == self.num_experts

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.live_experts = int(self.born)

    def forward(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        previous_ids: Tensor | None = None,
        previous_logits: Tensor | None = None,
        valid: Tensor | None = None,
        final_rule: bool = False,
    ) -> tuple[Tensor, Routing]:
        """Mix the experts' outputs.

        Args:
            hidden: ``(B, S, D)``.
            token_ids: ``(B, S)``, for routers that read words.
            previous_ids: ``(B, S)``, the id before each token, -1 at the beginning of a sequence.
            previous_logits: ``(T, E)`` of the MoE layer before this one.
            valid: ``(B, S)`` bool, False at padding.
            final_rule: route by the final sparse rule instead of the training rule.

        Returns:
            ``(B, S, D)`` of the type of ``hidden``, without the residual, and the routing.
        """
        batch, sequence, width = hidden.shape
        if width != self.d_model:
            raise ValueError(f"hidden has width {width}, and the layer d_model={self.d_model}")
        flat = hidden.reshape(-1, width)  # (T, D)
        inputs = RoutingInput(
            hidden=flat,
            batch=batch,
            sequence=sequence,
            token_ids=None if token_ids is None else token_ids.reshape(-1),
            previous_ids=None if previous_ids is None else previous_ids.reshape(-1),
            previous_logits=previous_logits,
            valid=None if valid is None else valid.reshape(-1),
            final_rule=final_rule,
        )
        routing: Routing
        if self.routes:
            routing = self.router(inputs)
            output = self._mix(flat, routing)
        else:
            output, routing = self._grow(inputs)
        if self.shared is not None:
            shared = self.shared.base(flat)
            output = output + (shared if inputs.valid is None else shared * inputs.valid[:, None]).to(flat.dtype)
        return output.view_as(hidden), routing

    def _grow(self, inputs: RoutingInput) -> tuple[Tensor, SparseRouting]:
        flat, valid = inputs.hidden, inputs.valid
        if valid is None:
            token = torch.arange(flat.shape[0], device=flat.device)
            output = self.experts.base(flat)
        else:
            token = valid.nonzero(as_tuple=True)[0]
            rows = self.experts.base(flat[token])
            output = rows.new_zeros(flat.shape).index_copy(0, token, rows)
        tokens_per_expert = torch.zeros(self.num_experts, dtype=torch.int64, device=flat.device)
        tokens_per_expert[:1] = token.numel()  # a single element would be copied from the host
        scores = torch.zeros(flat.shape[0], self.num_experts, device=flat.device)
        scores[:, 0] = 1
        weight = torch.ones(token.shape, device=flat.device)
        return output.to(flat.dtype), make_routing(inputs, (token, weight, tokens_per_expert), scores)

    def _mix(self, flat: Tensor, routing: Routing) -> Tensor:
        if isinstance(routing, SoftRouting):
            return self._mix_slots(flat, routing)
        output = self.experts.mix(flat, routing)
        return output if routing.bypass is None else output + routing.bypass.to(output.dtype)

    def _mix_slots(self, flat: Tensor, routing: SoftRouting) -> Tensor:
        groups, size, num_experts, capacity = routing.dispatch.shape
        grouped = flat.view(groups, size, flat.shape[1])
        slots = torch.einsum("gsec,gsd->egcd", routing.dispatch.to(flat.dtype), grouped)  # (E, G, C, D)
        counts = torch.full((num_experts,), groups * capacity, device=flat.device)
        outputs = self.experts(slots.reshape(-1, flat.shape[1]), counts).view_as(slots)
        mixed = torch.einsum("gsec,egcd->gsd", routing.combine.to(outputs.dtype), outputs)
        return mixed.reshape(flat.shape).to(flat.dtype)
