"""Whether tokens keep their experts from one validation to the next.

Shapes: N tokens that are followed, n those of one process, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric


class ExpertSets(Metric):
    """The experts of the first real tokens of a validation, those of all processes one after the other.

    Args:
        num_tokens: real tokens to take on each process, n.
        num_experts: number of experts E.
    """

    ids: list[Tensor]
    active: list[Tensor]

    def __init__(self, num_tokens: int, num_experts: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.num_experts = num_experts
        self.add_state("ids", [], dist_reduce_fx="cat")
        self.add_state("active", [], dist_reduce_fx="cat")

    def update(self, active: Tensor, token_ids: Tensor) -> None:
        """Take what is still missing.

        Args:
            active: ``(T, E)`` bool, see :func:`~evomoe.callbacks.monitoring.routing_metrics.active_experts`.
            token_ids: their words, ``(T,)``.
        """
        missing = self.num_tokens - sum(len(ids) for ids in self.ids)
        if missing > 0:
            self.ids.append(token_ids[:missing])
            self.active.append(active[:missing])

    def compute(self) -> tuple[Tensor, Tensor]:
        """Words ``(N,)`` int64 and experts ``(N, E)`` bool."""
        ids, active = self.ids, self.active  # lists, or, once gathered from the processes, tensors
        return (
            torch.cat(ids) if isinstance(ids, list) else ids,
            torch.cat(active) if isinstance(active, list) else active,
        )


class Stability:
    """The experts of the same tokens at every validation of a run; N times E bits for each.

    A token's experts at two validations overlap by ``|A & B| / max(|A|, |B|)``: the share that it keeps of its experts,
    1 only for equal sets, and for two empty ones. For a fixed K that is the published ``|A & B| / K``.

    Args:
        ids: words of the tokens, ``(N,)``.
        num_experts: number of experts E.
    """

    def __init__(self, ids: Tensor, num_experts: int) -> None:
        self.ids = ids.cpu()
        self.num_experts = num_experts
        self.steps: list[int] = []
        self.last_fluctuation = torch.zeros(len(ids), dtype=torch.int64)
        """Optimizer step of the last validation that found other experts than the one before, ``(N,)``; 0 for a token
        that never changed (the last fluctuation step of StableMoE, arXiv 2204.08396)."""
        self._packed: list[Tensor] = []  # (N, E / 8) uint8 each

    def follows(self, ids: Tensor, num_experts: int) -> bool:
        """Whether these are the tokens that it knows; not so with other data, or another number of processes."""
        return num_experts == self.num_experts and torch.equal(ids.cpu(), self.ids)

    def add(self, step: int, active: Tensor) -> float | None:
        """Remember a validation.

        Args:
            step: optimizer step.
            active: experts of the tokens, ``(N, E)`` bool.

        Returns:
            Routing fluctuation: 1 minus the mean overlap with the validation before; None for the first one.
        """
        active = active.cpu()
        fluctuation = None
        if self.steps:
            before = self._unpack(self._packed[-1])
            self.last_fluctuation[(before != active).any(dim=1)] = step
            fluctuation = 1 - mean_overlap(before, active)
        self.steps.append(step)
        self._packed.append(torch.from_numpy(np.packbits(active.numpy(), axis=1)))
        return fluctuation

    def saturation(self) -> dict[int, float]:
        """Mean overlap of every validation, by its step, with the last one (OLMoE, arXiv 2409.02060); at least one."""
        last = self._unpack(self._packed[-1])
        overlaps = [mean_overlap(self._unpack(packed), last) for packed in self._packed]
        return dict(zip(self.steps, overlaps, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Everything in tensors and plain values."""
        return {
            "ids": self.ids,
            "num_experts": self.num_experts,
            "steps": list(self.steps),
            "last_fluctuation": self.last_fluctuation.clone(),
            "packed": list(self._packed),
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Stability:
        """Inverse of :meth:`state_dict`."""
        stability = cls(state["ids"], state["num_experts"])
        stability.steps = list(state["steps"])
        stability.last_fluctuation = state["last_fluctuation"].clone()
        stability._packed = list(state["packed"])
        return stability

    def _unpack(self, packed: Tensor) -> Tensor:
        bits = np.unpackbits(packed.numpy(), axis=1, count=self.num_experts)
        return torch.from_numpy(bits).bool()


def mean_overlap(first: Tensor, second: Tensor) -> float:
    """Mean over the tokens of ``|A & B| / max(|A|, |B|)``, for expert sets ``(N, E)`` bool."""
    both = (first & second).sum(dim=1)
    larger = torch.maximum(first.sum(dim=1), second.sum(dim=1))
    return float(torch.where(larger == 0, 1.0, both / larger.clamp(min=1)).mean())
