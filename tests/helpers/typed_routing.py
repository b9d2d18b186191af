"""Routings from a table of who works for whom."""

from __future__ import annotations

import torch
from torch import Tensor

from evomoe.routing import SparseRouting


def routing_of(
    active: Tensor, scores: Tensor | None = None, wanted: Tensor | None = None, valid: Tensor | None = None
) -> SparseRouting:
    """A routing of ``active (T, E)`` bool; padding works for nobody and has no scores."""
    if valid is not None:
        active = active & valid[:, None]
    expert, token = active.t().nonzero(as_tuple=True)
    kept = active.sum(dim=0)
    scores = active / active.sum(dim=1, keepdim=True).clamp(min=1) if scores is None else scores
    return SparseRouting(
        token=token,
        weight=torch.ones(len(expert)),
        tokens_per_expert=kept,
        scores=scores if valid is None else scores * valid[:, None],
        num_tokens=torch.tensor(len(active)) if valid is None else valid.sum(),
        dropped=torch.tensor(0) if wanted is None else wanted.sum() - kept.sum(),
        wanted_per_expert=wanted,
    )
