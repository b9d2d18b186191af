"""The contract of a router: hidden states in, a routing out.

Shapes: T tokens, D model width, E experts, K experts per token, A assignments (chosen token-expert pairs), C capacity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class RoutingInput:
    """What a router may look at.

    Args:
        hidden: token states, ``(T, D)`` with ``T = batch * sequence``, sequences one after the other.
        batch: number of sequences.
        sequence: tokens per sequence.
        token_ids: vocabulary ids ``(T,)``, for routers that route by word.
        previous_ids: the id before each token in its sequence ``(T,)``, -1 at the beginning of a sequence.
        previous_logits: router logits of the MoE layer before this one, as many columns as its scores; None in the
            first.
        valid: ``(T,)`` bool, False at padding; None means that every token is real.
        final_rule: route by the final sparse rule instead of the training rule. Routers that have only one ignore it.
    """

    hidden: Tensor
    batch: int
    sequence: int
    token_ids: Tensor | None = None
    previous_ids: Tensor | None = None
    previous_logits: Tensor | None = None
    valid: Tensor | None = None
    final_rule: bool = False


class Words(NamedTuple):
    """The words behind the tokens of an MoE layer.

    Args:
        token_ids: ``(B, S)``; None where tokens are no words.
        valid: ``(B, S)`` bool, False at padding; None means that every token is real.
    """

    token_ids: Tensor | None
    valid: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Balance:
    """A balance loss ``sum_i price_i * load_i / tokens``: what the experts' load costs, without any coefficient.

    The load has no gradient; the price has. As the loss is linear in the load, the same prices also give the loss of a
    load that was counted over more than this batch (global-batch balance, arXiv 2501.11873).

    Args:
        price: of one assignment per token, ``(E',)`` fp32, differentiable; for Switch ``E * P_i``.
        load: assignments that the router chose for each expert, ``(E',)``.
        tokens: number of real tokens that were counted, a 0-dim tensor.
    """

    price: Tensor
    load: Tensor
    tokens: Tensor

    def loss(self) -> Tensor:
        """The loss, a 0-dim fp32 tensor; 0 for a batch without real tokens."""
        return (self.price * (self.load.detach() / self.tokens.clamp(min=1))).sum()

    def detach(self) -> Balance:
        """The same cut from the autograd graph."""
        return replace(self, price=self.price.detach())


@dataclass(frozen=True, kw_only=True)
class SparseRouting:
    """The chosen token-expert pairs, sorted by expert, and within an expert by token.

    Args:
        token: index of the token of each assignment, ``(A,)``.
        weight: combine weight of each assignment, ``(A,)`` fp32, differentiable.
        tokens_per_expert: assignments of each expert, ``(E,)`` int64; sums to A.
        scores: the router's scores ``(T, E)`` fp32, for metrics; zero rows at padding. Further columns, where a router
            has them, are those of experts without computation.
        num_tokens: number of real tokens, a 0-dim tensor.
        dropped: number of assignments that a capacity bound refused, a 0-dim tensor.
        losses: auxiliary losses by name, 0-dim fp32 tensors, not yet multiplied by any coefficient.
        wanted_per_expert: assignments of each expert before any capacity bound, ``(E,)``; None without a bound.
        balance: the terms of ``losses["balance"]``, None for a router without that loss.
        logits: shaped like ``scores``, for a router of the next MoE layer that adds them to its own; None otherwise.
        bypass: ``(T, D)``, what experts without computation add to the output; None without such experts.
        metrics: further 0-dim tensors to log, by name.
    """

    token: Tensor
    weight: Tensor
    tokens_per_expert: Tensor
    scores: Tensor
    num_tokens: Tensor
    dropped: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    wanted_per_expert: Tensor | None = None
    balance: Balance | None = None
    logits: Tensor | None = None
    bypass: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)

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
    def rows(self) -> int:
        """Rows that the experts compute."""
        return self.token.numel()

    @property
    def active_experts(self) -> Tensor:
        """Mean number of experts that work for one real token, a 0-dim tensor."""
        return self.tokens_per_expert.sum() / self.num_tokens.clamp(min=1)

    def detach(self) -> SparseRouting:
        """The same routing cut from the autograd graph."""
        return replace(
            self,
            weight=self.weight.detach(),
            scores=self.scores.detach(),
            losses={name: loss.detach() for name, loss in self.losses.items()},
            balance=None if self.balance is None else self.balance.detach(),
            logits=None if self.logits is None else self.logits.detach(),
            bypass=None if self.bypass is None else self.bypass.detach(),
        )

    def to_dense(self) -> Tensor:
        """Combine weights as a dense ``(T, E)`` matrix: the oracle's view of the same routing."""
        dense = self.scores.new_zeros(self.scores.shape[0], self.tokens_per_expert.numel())
        return dense.index_put((self.token, self.expert), self.weight)

    def to_slots(self) -> SoftRouting:
        """The same routing in the unified formulation, with G = 1, S = T and the largest load as capacity C.

        Each slot reads one token at most. What experts without computation add (``bypass``) is not in it.
        """
        counts = self.tokens_per_expert
        first = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=self.token.numel())
        slot = torch.arange(self.token.numel(), device=self.token.device) - first
        empty = self.scores.new_zeros(1, self.scores.shape[0], counts.numel(), int(counts.max()))
        place = (torch.zeros_like(slot), self.token, self.expert, slot)
        return SoftRouting(
            dispatch=empty.index_put(place, torch.ones_like(self.weight)),
            combine=empty.index_put(place, self.weight),
            num_tokens=self.num_tokens,
            losses=self.losses,
        )


@dataclass(frozen=True, kw_only=True)
class SoftRouting:
    """Dense dispatch and combine tensors: the unified formulation of *Routers in Vision MoE* (arXiv 2401.15969).

    Args:
        dispatch: ``(G, S, E, C)``: slot c of expert e reads ``sum_s dispatch[g, s, e, c] * hidden[g, s]``.
        combine: ``(G, S, E, C)``: token s receives ``sum_ec combine[g, s, e, c] * output[g, e, c]``.
        num_tokens: number of real tokens, a 0-dim tensor.
        losses: auxiliary losses by name.
        metrics: further 0-dim tensors to log, by name.
    """

    dispatch: Tensor
    combine: Tensor
    num_tokens: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)

    balance = logits = bypass = None
    """What a sparse routing may have."""

    @property
    def rows(self) -> int:
        """Rows that the experts compute: all G E C slots."""
        groups, _, experts, capacity = self.dispatch.shape
        return groups * experts * capacity

    @property
    def active_experts(self) -> Tensor:
        """Slots that experts compute per real token, a 0-dim tensor: what a token costs, though it sees all slots."""
        return self.rows / self.num_tokens.clamp(min=1)

    @property
    def scores(self) -> Tensor:
        """Share of each expert in what a token receives, ``(T, E)``; zero rows at padding."""
        return self.to_dense()

    @property
    def load(self) -> Tensor:
        """What the tokens receive of each expert, in tokens, ``(E,)``. Each computes equally many slots."""
        return self.to_dense().sum(dim=0)

    def detach(self) -> SoftRouting:
        """The same routing cut from the autograd graph."""
        losses = {name: loss.detach() for name, loss in self.losses.items()}
        return replace(self, dispatch=self.dispatch.detach(), combine=self.combine.detach(), losses=losses)

    def to_dense(self) -> Tensor:
        """Combine weights of the experts, over their slots, ``(T, E)``."""
        return self.combine.sum(dim=3).flatten(0, 1)


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


@dataclass(frozen=True)
class StepStatistics:
    """What an optimizer step used, over all its micro-batches and processes.

    Args:
        load: assignments that this router chose for each expert, ``(E,)``.
        tokens: number of real tokens, a 0-dim tensor.
        active_experts: mean experts per real token over all MoE layers of the model, a 0-dim tensor.
    """

    load: Tensor
    tokens: Tensor
    active_experts: Tensor


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

    reads_corpus: bool = False
    """Whether :meth:`read_corpus` has an effect."""

    adapts: bool = False
    """Whether :meth:`after_optimizer_step` has an effect."""

    rules_differ: bool = False
    """Whether ``final_rule`` changes the routing at the present schedule values, so that both are worth evaluating."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.num_experts = num_experts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Keep running state in fp32 where the weights become half precision: small steps would be rounded away."""
        state = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in state.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = moved.float() if buffer.is_meta else buffer.to(moved.device)
        return self

    @abstractmethod
    def forward(self, inputs: RoutingInput) -> Routing:
        """Route ``inputs``; see the class of the returned routing for its shapes."""

    def set_schedule(self, values: ScheduleValues) -> None:
        """Receive the values of the schedule at the current optimizer step, before each training batch."""

    def read_corpus(self, token_ids: np.ndarray) -> None:
        """Look at the training text once, before a run begins, and before a checkpoint is restored.

        Args:
            token_ids: ids of the whole training split ``(N,)``, memory-mapped: read them in chunks.
        """

    def after_optimizer_step(self, statistics: StepStatistics) -> None:
        """Update running state, once per optimizer step in which this router routed."""

    def flops_per_token(self) -> int:
        """FLOPs of the router's matrix products for one token, 2 per multiply-add."""
        return sum(2 * parameter.numel() for parameter in self.parameters() if parameter.ndim == 2)

    def reset_parameters(self) -> None:
        """Draw the initial parameters of the submodules, such as the gate, from the global random generator.

        A router with parameters or running state of its own draws them here too.
        """
        for child in self.children():
            _reset(child)


def _reset(module: nn.Module) -> None:
    """Draw the parameters of a module that knows how, or else of the modules that it holds."""
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()
    else:
        for child in module.children():
            _reset(child)
