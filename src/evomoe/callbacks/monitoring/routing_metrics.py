"""What the routers did over a whole validation, counted so that the processes of a run add up to the same numbers.

Every metric here sums counts and divides in ``compute``: the metrics of a batch that is split over processes are those
of the whole. ``compute`` returns a dictionary; its 0-dim tensors are there to be logged, the others to be drawn.

Shapes: n real tokens, E experts, E' score columns (experts and those without computation), V vocabulary, N batches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from evomoe.routing import SparseRouting
from evomoe.routing.metrics import load_max_violation


def active_experts(routing: SparseRouting, valid: Tensor | None = None) -> Tensor:
    """Which experts work for each real token, ``(n, E)`` bool.

    Args:
        routing: of T tokens.
        valid: ``(T,)`` bool, False at padding; None if all are real.
    """
    shape = routing.scores.shape[0], routing.tokens_per_expert.numel()
    active = torch.zeros(shape, dtype=torch.bool, device=routing.token.device)
    active[routing.token, routing.expert] = True
    return active if valid is None else active[valid]


class ExpertLoad(Metric):
    """How the assignments are spread over the experts.

    Computes:
        load: share of each expert in the assignments that the router chose, ``(E,)``; sums to 1.
        load_kept: the same after a capacity bound has dropped some.
        load_max_violation: MaxVio (arXiv 2408.15664) of ``load``: all that was counted, the *global* one. 0 at balance.
        load_max_violation_batch: mean MaxVio of the batches, the *batch* one. Experts that are overloaded by turns show
            here and not in the global one. A batch is that of all processes together.
        dead_experts: share of experts that no token chose.
        dropped: share of the chosen assignments that a capacity bound refused.
        active_experts: mean experts that work for a real token.

    Args:
        num_experts: number of experts E.

    Every process must count equally many batches.
    """

    batch_load: Tensor
    kept: Tensor
    dropped: Tensor
    tokens: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.add_state("batch_load", torch.zeros(0, num_experts, dtype=torch.int64), dist_reduce_fx="sum")  # (N, E)
        self.add_state("kept", torch.zeros(num_experts, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("dropped", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, routing: SparseRouting) -> None:
        """Count one batch."""
        self.batch_load = torch.cat([self.batch_load, routing.load[None]])
        self.kept += routing.tokens_per_expert
        self.dropped += routing.dropped
        self.tokens += routing.num_tokens

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        load = self.batch_load.sum(dim=0)
        batches = self.batch_load[self.batch_load.any(dim=1)]  # a batch of padding has no balance
        violations = [load_max_violation(of_batch) for of_batch in batches]
        return {
            "load": load / load.sum().clamp(min=1),
            "load_kept": self.kept / self.kept.sum().clamp(min=1),
            "load_max_violation": load_max_violation(load),
            "load_max_violation_batch": torch.stack(violations).mean() if violations else load_max_violation(load),
            "dead_experts": (load == 0).float().mean(),
            "dropped": self.dropped / (self.dropped + self.kept.sum()).clamp(min=1),
            "active_experts": self.kept.sum() / self.tokens.clamp(min=1),
        }


class RouterEntropy(Metric):
    """How sure the router is of each token, and how evenly it scores the experts over all of them.

    Tokens to which a router gives no score at all (ReMoE's may have none) do not count.

    Computes:
        router_entropy: mean entropy of a token's scores in nats; ``log(E')`` when undecided, 0 when certain.
        balance_entropy: entropy of the mean scores over ``log(E')``; 1 when all experts are scored alike on average.
        mutual_information: between token and expert in nats: entropy of the mean scores minus ``router_entropy``. 0 for
            a router that scores all tokens alike; ``log(E')`` for one that is certain and balanced.

    Args:
        num_scores: columns E' of the scores.
    """

    score_sum: Tensor
    entropy: Tensor

    def __init__(self, num_scores: int) -> None:
        super().__init__()
        self.add_state("score_sum", torch.zeros(num_scores), dist_reduce_fx="sum")
        self.add_state("entropy", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, routing: SparseRouting) -> None:
        """Add one batch."""
        self.score_sum += routing.scores.sum(dim=0)
        self.entropy += torch.special.entr(routing.scores).sum()

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        tokens = self.score_sum.sum().clamp(min=1)  # each token's scores sum to 1
        of_mean = torch.special.entr(self.score_sum / tokens).sum()
        of_token = self.entropy / tokens
        return {
            "router_entropy": of_token,
            "balance_entropy": of_mean / math.log(max(self.score_sum.numel(), 2)),
            "mutual_information": of_mean - of_token,
        }


class CoActivation(Metric):
    """Which experts work together, and how many for one token.

    Computes:
        co_activation: ``P(j active | i active)`` over all pairs, ``(E, E)`` with i the row. The diagonal is 1; the row
            of an expert without tokens is 0.
        co_activation_max: the largest entry off the diagonal; 1 if one expert never works without a certain other, 0
            for one expert per token. Experts that are chosen independently have (K - 1) / (E - 1) everywhere.
        experts_per_token: share of the real tokens with 0 to E experts, ``(E + 1,)``.
        uncovered: share of the real tokens without any expert.

    OLMoE (arXiv 2409.02060) counts pairs of adjacent rank only in its released script; here all pairs count.

    Args:
        num_experts: number of experts E.
    """

    pairs: Tensor
    per_token: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.add_state("pairs", torch.zeros(num_experts, num_experts, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("per_token", torch.zeros(num_experts + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, active: Tensor) -> None:
        """Count tokens.

        Args:
            active: ``(n, E)`` bool, see :func:`active_experts`.
        """
        ones = active.float()  # fp32 counts exactly up to 2^24 tokens a batch, and has a fast product everywhere
        self.pairs += (ones.t() @ ones).long()
        self.per_token += torch.bincount(active.sum(dim=1), minlength=self.per_token.numel())

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        given = self.pairs / self.pairs.diagonal()[:, None].clamp(min=1)
        per_token = self.per_token / self.per_token.sum().clamp(min=1)
        return {
            "co_activation": given,
            "co_activation_max": given.clone().fill_diagonal_(0).max(),
            "experts_per_token": per_token,
            "uncovered": per_token[0],
        }


class WordExperts(Metric):
    """How far the word alone decides the expert.

    Computes:
        vocabulary_specialization: share of a word's tokens that go to its most frequent expert, averaged over the
            tokens. 1 if equal words always meet the same expert. For a balanced router that ignores the word it
            approaches K / E from above, as words grow frequent: a word that was seen once counts as 1.
        word_share: share of each word's tokens that go to each expert, ``(V, E)``; 0 for words that were not seen.
        word_count: tokens of each word, ``(V,)``.

    Args:
        vocab_size: number of words V.
        num_experts: number of experts E.
    """

    assigned: Tensor
    words: Tensor

    def __init__(self, vocab_size: int, num_experts: int) -> None:
        super().__init__()
        self.add_state("assigned", torch.zeros(vocab_size, num_experts, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("words", torch.zeros(vocab_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, active: Tensor, token_ids: Tensor) -> None:
        """Count tokens.

        Args:
            active: ``(n, E)`` bool, see :func:`active_experts`.
            token_ids: their words, ``(n,)``.
        """
        self.assigned.index_add_(0, token_ids, active.long())
        self.words.index_add_(0, token_ids, torch.ones_like(token_ids))

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        return {
            "vocabulary_specialization": self.assigned.amax(dim=1).sum() / self.words.sum().clamp(min=1),
            "word_share": self.assigned / self.words[:, None].clamp(min=1),
            "word_count": self.words,
        }
