"""What a row of the table of routers says, and what its fields are made of: gates set by hand, losses at balance.

Shapes: T tokens, D model width, E experts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from evomoe.routing import Router, ScheduleValues

ALL = sys.maxsize
"""Every expert, in ``experts_per_token``."""

VOCABULARY = 50
"""Token ids in the suites are below it."""


def set_linear_gate(router: Router, logits: Tensor) -> Tensor:
    """Make ``router.gate`` return ``logits (T, E)`` for the returned token states, ``(T, D)`` with D = T."""
    with torch.no_grad():
        router.gate.weight.copy_(logits.t())
    return torch.eye(logits.shape[0])


def set_stable_logits(router: Router, logits: Tensor) -> Tensor:
    """The same for StableMoE's gate, with an undecided light router."""
    with torch.no_grad():
        router.light_gate.weight.zero_()
    return set_linear_gate(router, logits)


NULL_LOGIT = 0.5


def set_logits_beside_nulls(router: Router, logits: Tensor) -> Tensor:
    """The same for a gate with further columns, for experts without computation, all ``NULL_LOGIT``."""
    with torch.no_grad():
        router.gate.weight.fill_(NULL_LOGIT)
        router.gate.weight[: router.num_experts] = logits.t()
    return torch.eye(logits.shape[0])


def set_block_means(router: Router, logits: Tensor) -> Tensor:
    """Token states whose means over E blocks of features are ``logits (T, E)``, for grouped average pooling."""
    tokens, experts = logits.shape
    return logits.repeat_interleave(tokens // experts, dim=1)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A router with its options, and what is declared of it.

    Args:
        id: name of the row in pytest's output.
        factory: called with ``(d_model, num_experts)``.
        schedule: values that the router receives once.
        experts_per_token: fewest and most experts that a token asks for; a bound above E means E.
        drops: whether a capacity may refuse some of them.
        min_experts: smallest E that the options allow.
        expert_multiple: E must be a multiple of it.
        balanced_losses: value of each loss for a balanced batch, whose tokens have the same logits up to a rotation of
            the experts. Called with the logits of one token in falling order, ``(E,)``.
        inert_losses: losses without any gradient at these options.
        set_logits: makes the gate return given logits, see ``set_linear_gate``; None for a router without logits.
        permutes_experts: whether renaming the experts renames the routing and changes nothing else.
        permutes_tokens: whether a token's routing depends on its own state only.
        probabilities: whether a token's scores are non-negative and sum to 1.
        largest_weight: bound of the sum of a token's weights.
        weight_alone: weight of a token's assignment to the only expert there is; None where it depends on the token.
        null_experts: number of further columns of the scores, for experts without computation.
        soft: whether the routing is a ``SoftRouting``, in which every expert works for every token.
        teaches: the parameters that a signal teaches, where these are not all of the router's: by the name of a loss,
            or ``"weights"`` for the combine weights.
    """

    id: str
    factory: Callable[[int, int], Router]
    schedule: ScheduleValues = field(default_factory=ScheduleValues)
    experts_per_token: tuple[int, int]
    drops: bool = False
    min_experts: int = 1
    expert_multiple: int = 1
    balanced_losses: dict[str, Callable[[Tensor], float | Tensor]] = field(default_factory=dict)
    inert_losses: tuple[str, ...] = ()
    set_logits: Callable[[Router, Tensor], Tensor] | None = set_linear_gate
    permutes_experts: bool = True
    permutes_tokens: bool = True
    probabilities: bool = True
    largest_weight: float = 1.0
    weight_alone: float | None = 1.0
    null_experts: int = 0
    soft: bool = False
    teaches: dict[str, Callable[[Router], Sequence[nn.Parameter]]] = field(default_factory=dict)

    def build(self, d_model: int, num_experts: int, seed: int = 0) -> Router:
        """The router of this row, its parameters drawn from ``seed``."""
        torch.manual_seed(seed)
        router = self.factory(d_model, num_experts)
        router.set_schedule(self.schedule)
        return router

    def allow(self, num_experts: int) -> int:
        """The least E from ``num_experts`` on that the options allow."""
        return -(-max(num_experts, self.min_experts) // self.expert_multiple) * self.expert_multiple

    def bounds(self, num_experts: int) -> tuple[int, int]:
        """Fewest and most experts that a token asks for, of ``num_experts``."""
        least, most = self.experts_per_token
        return min(least, num_experts), min(most, num_experts)

    def taught(self, router: Router, signal: str) -> list[nn.Parameter]:
        """The parameters that a loss by this name, or the weights, must reach."""
        return list(self.teaches[signal](router) if signal in self.teaches else router.parameters())


def one(logits: Tensor) -> float:
    """The balance loss of the Switch family."""
    return 1.0


def squared_log_partition(logits: Tensor) -> float:
    """The z-loss."""
    return math.log(sum(math.exp(logit) for logit in logits.tolist())) ** 2


def dts_balance(temperature: float, threshold: float = 1e-3, kept_mass: bool = True) -> Callable[[Tensor], float]:
    """K active experts times their mass: each works for K / E of the tokens, with a mean weight of mass / E."""

    def value(logits: Tensor) -> float:
        scores = torch.softmax(logits.double() / temperature, dim=0)
        active = scores[scores > threshold]
        return active.numel() * float(active.sum() if kept_mass else 1)

    return value


def hardened_balance(temperature: float, top_k: int) -> Callable[[Tensor], float]:
    """The same with ``top_k`` active experts."""
    return lambda logits: top_k * float(torch.softmax(logits.double() / temperature, dim=0)[:top_k].sum())


STABLE_TEACHES: dict[str, Callable[[Router], Sequence[nn.Parameter]]] = {
    "weights": lambda router: [router.gate.weight],
    "balance": lambda router: [router.gate.weight],
    "distill": lambda router: [router.words.weight, router.light_gate.weight],
}


def null_balance(top_k: int, nulls: int) -> Callable[[Tensor], float]:
    """AdaMoE's loss where the nulls' logits are ``NULL_LOGIT``: each true expert has the same share of the load."""

    def value(logits: Tensor) -> float:
        of_all = torch.cat([logits.double(), torch.full((nulls,), NULL_LOGIT, dtype=torch.float64)])
        true_mass = float(of_all.softmax(dim=0)[: len(logits)].sum())
        true_choices = int((of_all.argsort(descending=True)[:top_k] < len(logits)).sum())
        per_true, per_null = true_choices / len(logits), (top_k - true_choices) / nulls
        return len(of_all) * (per_true * true_mass + per_null * (1 - true_mass))

    return value


def heterogeneous_balance(top_k: int, nulls: int) -> Callable[[Tensor], float]:
    """MoE++'s loss for logits of which the ``top_k`` best are those of true experts."""

    def value(logits: Tensor) -> float:
        of_all = torch.cat([logits.double(), torch.full((nulls,), NULL_LOGIT, dtype=torch.float64)])
        assert float(logits[top_k - 1]) > NULL_LOGIT
        return len(of_all) / len(logits) * float(of_all.softmax(dim=0)[: len(logits)].sum())

    return value


def one_node_of_two(logits: Tensor) -> float:
    """LocMoE's locality loss where all tokens lie on one of two nodes, and their mean probabilities are even."""
    experts = len(logits)
    local, other = 0.9 / (experts / 2), 0.1 / (experts / 2)
    return -0.5 * math.log(local * experts) - 0.5 * math.log(other * experts)


def nothing(_router: Router) -> Sequence[nn.Parameter]:
    """For a gate without parameters."""
    return ()


GATE_ALONE: dict[str, Callable[[Router], Sequence[nn.Parameter]]] = {"balance": lambda router: [router.gate.weight]}
WITHOUT_RESIDUAL: dict[str, Callable[[Router], Sequence[nn.Parameter]]] = GATE_ALONE | {
    "weights": lambda router: [router.gate.weight, router.constant_gate, router.constants]
}
FIXED_GATE = dict.fromkeys(("weights", "balance", "locality"), nothing)

VARIATIONS: dict[str, Callable[[Tensor], float | Tensor]] = dict.fromkeys(("importance", "load"), lambda _logits: 0.0)
SWITCH_LOSSES = {"balance": one, "z": squared_log_partition}
