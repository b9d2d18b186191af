"""Schedules as pure functions of a step, so that a resumed run needs no memory of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from evomoe.errors import ConfigError

SHAPES = ("linear", "exponential", "cosine", "step")


@dataclass(frozen=True)
class Schedule:
    """A monotone way from ``start`` to ``end`` in ``length`` steps, constant afterwards.

    Args:
        start: value at step 0.
        end: value from step ``length`` on.
        length: number of steps of the way; 0 means ``end`` at once.
        shape: ``linear`` (the EvoMoE recipes), ``exponential`` (equal ratios; both ends above zero), ``cosine``, or
            ``step`` (``start`` until the end of the way).
    """

    start: float
    end: float
    length: int
    shape: str = "linear"

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(f"schedule shape={self.shape!r} is unknown: expected one of {', '.join(SHAPES)}")
        if self.length < 0:
            raise ConfigError(f"schedule length={self.length} is negative: expected a number of steps >= 0")
        if self.shape == "exponential" and min(self.start, self.end) <= 0:
            raise ConfigError(
                f"an exponential schedule from {self.start} to {self.end} never arrives: "
                "both ends must be above zero; use shape=linear or shape=cosine"
            )

    def at(self, step: int) -> float:
        """Value at ``step`` (negative steps count as 0)."""
        step = max(step, 0)
        if step >= self.length:
            return self.end
        if self.shape == "step":
            return self.start
        progress = step / self.length
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** progress
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress
