"""Where a run stands, read in one place for everything that shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L

from evomoe.callbacks.evolution import Evolution, EvolutionState

PLAIN_PHASE = "train"
"""Name of the only phase of a run without an evolution."""


@dataclass(frozen=True)
class RunStatus:
    """What a progress display shows; None where the run has no such value (yet).

    Args:
        phase: ``diversify``, ``sparsify``, ``hardened``, or ``train`` without an evolution.
        temperature: of the gate; None while one expert trains alone, and where it has no decay.
        loss: last training loss of the task.
        val_loss: last validation loss.
        active_experts: mean number of experts that work for a token.
        tokens_per_second: training tokens per second.
    """

    phase: str
    temperature: float | None = None
    loss: float | None = None
    val_loss: float | None = None
    active_experts: float | None = None
    tokens_per_second: float | None = None

    def describe(self) -> list[str]:
        """The values that are there, in reading order, each as a few words."""
        parts = []
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.val_loss is not None:
            parts.append(f"val loss {self.val_loss:.3f}")
        if self.temperature is not None:
            parts.append(f"temperature {self.temperature:.2f}")
        if self.active_experts is not None:
            parts.append(f"active experts {self.active_experts:.2f}")
        if self.tokens_per_second is not None:
            parts.append(f"{shorten(self.tokens_per_second)} tok/s")
        return parts


def evolution_of(trainer: L.Trainer) -> Evolution | None:
    """The run's evolution, if it has one."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, Evolution)), None)


def evolution_state(trainer: L.Trainer) -> EvolutionState | None:
    """State of the run's evolution at the current optimizer step; None in a run without one."""
    evolution = evolution_of(trainer)
    return None if evolution is None else evolution.state


def phase_of(trainer: L.Trainer) -> str:
    """Name of the current phase."""
    state = evolution_state(trainer)
    return PLAIN_PHASE if state is None else state.phase


def read_status(trainer: L.Trainer, outputs: Any) -> RunStatus:
    """Gather the status during training. It waits for the device: call it a few times a second at most.

    Args:
        trainer: of the run.
        outputs: of the last training step, whose routings tell how many experts work; those of the loggers are older.
    """
    evolution = evolution_of(trainer)
    decays = evolution is not None and evolution.temperature is not None
    state = evolution_state(trainer)
    metrics = trainer.callback_metrics
    routings = outputs.get("routings") if isinstance(outputs, Mapping) else None

    def value(name: str) -> float | None:
        return float(metrics[name]) if name in metrics else None

    return RunStatus(
        phase=phase_of(trainer),
        temperature=state.temperature if state and decays and state.phase != "diversify" else None,
        loss=value("train/loss"),
        val_loss=value("val/loss"),
        active_experts=float(sum(routing.active_experts for routing in routings) / len(routings)) if routings else None,
        tokens_per_second=value("throughput/tokens_per_second"),
    )


def shorten(number: float) -> str:
    """A number in three digits and a unit: ``842``, ``18.2k``, ``1.24M``, ``3.5G``."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
