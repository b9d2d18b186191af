"""The contract of a router: hidden states in, a routing out.

Shapes: T tokens, D model width, E experts, K experts per token, A assignments (chosen token-expert pairs), C capacity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class RoutingInput:
    """What a router may look at.

    Args:
        hidden: token states, ``(T, D)`` with ``T = batch * sequence``, sequences one after the other.
        batch: number of sequences.
        sequence: tokens per sequence.
        token_ids: vocabulary ids ``(T,)``, for routers that route by word.
        valid: ``(T,)`` bool, False at padding; None means that every token is real.
        final_rule: route by the final sparse rule instead of the training rule. Routers that have only one ignore it.
    """

    hidden: Tensor
    batch: int
    sequence: int
    token_ids: Tensor | None = None
    valid: Tensor | None = None
    final_rule: bool = False


@dataclass(frozen=True, kw_only=True)
class SparseRouting:
    """The chosen token-expert pairs, sorted by expert, and within an expert by token.

    Args:
        token: index of the token of each assignment, ``(A,)``.
        weight: combine weight of each assignment, ``(A,)`` fp32, differentiable.
        tokens_per_expert: assignments of each expert, ``(E,)`` int64; sums to A.
        scores: the router's probabilities ``(T, E)`` fp32, for metrics; zero rows at padding.
        num_tokens: number of real tokens, a 0-dim tensor.
        dropped: number of assignments that a capacity bound refused, a 0-dim tensor.
        losses: auxiliary losses by name, 0-dim fp32 tensors, not yet multiplied by any coefficient.
        wanted_per_expert: assignments of each expert before any capacity bound, ``(E,)``; None without a bound.
    """

    token: Tensor
    weight: Tensor
    tokens_per_expert: Tensor
    scores: Tensor
    num_tokens: Tensor
    dropped: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    wanted_per_expert: Tensor | None = None

    @property
    def load(self) -> Tensor:
        """Assignments that the router chose for each expert, those that a capacity refused included, ``(E,)``."""
        return self.tokens_per_expert if self.wanted_per_expert is None else self.wanted_per_expert

    @property
    def expert(self) -> Tensor:
        """Expert of each assignment, ``(A,)``, non-decreasing."""
        experts = torch.arange(self.tokens_per_expert.numel(), device=self.token.device)
        return experts.repeat_interleave(self.tokens_per_expert, output_size=self.token.numel())

    @property
    def active_experts(self) -> Tensor:
        """Mean number of experts that work for one real token, a 0-dim tensor."""
        return self.tokens_per_expert.sum() / self.num_tokens.clamp(min=1)

    def detach(self) -> SparseRouting:
        """The same routing cut from the autograd graph."""
        losses = {name: loss.detach() for name, loss in self.losses.items()}
        return replace(self, weight=self.weight.detach(), scores=self.scores.detach(), losses=losses)

    def to_dense(self) -> Tensor:
        """Combine weights as a dense ``(T, E)`` matrix: the oracle's view of the same routing."""
        dense = self.scores.new_zeros(self.scores.shape)
        return dense.index_put((self.token, self.expert), self.weight)


@dataclass(frozen=True, kw_only=True)
class SoftRouting:
    """Dense dispatch and combine tensors: the unified formulation of *Routers in Vision MoE* (arXiv 2401.15969).

    Args:
        dispatch: ``(G, S, E, C)``: slot c of expert e reads ``sum_s dispatch[g, s, e, c] * hidden[g, s]``.
        combine: ``(G, S, E, C)``: token s receives ``sum_ec combine[g, s, e, c] * output[g, e, c]``.
        num_tokens: number of real tokens, a 0-dim tensor.
        losses: auxiliary losses by name.
    """

    dispatch: Tensor
    combine: Tensor
    num_tokens: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)

    def detach(self) -> SoftRouting:
        """The same routing cut from the autograd graph."""
        losses = {name: loss.detach() for name, loss in self.losses.items()}
        return replace(self, dispatch=self.dispatch.detach(), combine=self.combine.detach(), losses=losses)


Routing = SparseRouting | SoftRouting


@dataclass(frozen=True)
class ScheduleValues:
    """What a schedule may tell a router at one optimizer step.

    Args:
        temperature: divisor of the router's (noisy) logits.
        noise_scale: factor of the exploration noise.
        hardened: True once the final sparse rule holds in training too.
    """

    temperature: float = 1.0
    noise_scale: float = 1.0
    hardened: bool = False


class Router(nn.Module, ABC):
    """Decides which experts work for which token, and with which weight; knows nothing of dispatch.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.

    A router computes in fp32 under any autocast, is deterministic in eval mode, and never counts a padding token.
    """

    causal_in_train: bool = True
    """Whether a token's routing in training depends on no later token of its sequence."""

    causal_in_eval: bool = True
    """The same in eval mode."""

    loss_names: tuple[str, ...] = ()
    """Names of the auxiliary losses that every routing of this router carries."""

    scheduled: bool = False
    """Whether :meth:`set_schedule` has an effect."""

    rules_differ: bool = False
    """Whether ``final_rule`` changes the routing at the present schedule values, so that both are worth evaluating."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.num_experts = num_experts

    @abstractmethod
    def forward(self, inputs: RoutingInput) -> Routing:
        """Route ``inputs``; see the class of the returned routing for its shapes."""

    def set_schedule(self, values: ScheduleValues) -> None:
        """Receive the values of the schedule at the current optimizer step, before each training batch."""

    def reset_parameters(self) -> None:
        """Draw the gate's initial parameters from the global random generator."""
