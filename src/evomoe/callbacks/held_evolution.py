"""An evolution that has come to rest: for a run that begins with the experts of another one."""

from __future__ import annotations

from evomoe.callbacks.evolution import PHASES, Evolution, EvolutionPlan
from evomoe.errors import ConfigError
from evomoe.routing import Schedule


class HeldEvolution(Evolution):
    """Keeps every router at the values of one step of an :class:`Evolution`, and the experts that live as many.

    Args:
        phase: ``diversify``, ``sparsify`` or ``hardened``.
        temperature: of the gate.
        noise_scale: of the gate.
    """

    def __init__(self, *, phase: str, temperature: float, noise_scale: float) -> None:
        super().__init__()
        if phase not in PHASES:
            raise ConfigError(f"evolution.phase={phase!r} is unknown: expected {', '.join(PHASES)}")
        self.phase = phase
        self._values = (temperature, noise_scale)

    def _overrides_of(self, plan: EvolutionPlan) -> str:
        """None: its values come with ``init_from``."""
        return ""

    def make_plan(self, total: int) -> EvolutionPlan:
        """The same at every step.

        Args:
            total: optimizer steps of the run.
        """
        temperature, noise_scale = (Schedule(value, value, 0) for value in self._values)
        spawn_at = total + 1 if self.phase == "diversify" else 0
        return EvolutionPlan(spawn_at, 0 if self.phase == "hardened" else None, total, temperature, noise_scale)
