"""What a benchmark reports: where it ran, tables in Markdown, and ratios beside their targets."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from evomoe.reporting.machine import cpu_name


@dataclass(frozen=True)
class Check:
    """A ratio of times that has a target.

    Args:
        what: the two things compared.
        size: at which size.
        ratio: measured.
        target: its bound.
        at_least: whether the bound is the lowest good value, not the highest.
    """

    what: str
    size: str
    ratio: float
    target: float
    at_least: bool = False

    def row(self) -> list[str]:
        """Cells of the table of targets."""
        met = self.ratio >= self.target if self.at_least else self.ratio <= self.target
        sign = ">=" if self.at_least else "<="
        return [self.what, self.size, f"{self.ratio:.3f}", f"{sign} {self.target:.2f}", "met" if met else "missed"]


@dataclass(frozen=True)
class Section:
    """A part of a report: its Markdown, and those of its ratios that have a target."""

    text: str
    checks: list[Check]


def median_ratio(mine: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(mine, base, strict=True))


def facts(device: str, *others: str) -> str:
    """Command, date, machine and versions as Markdown list items.

    Args:
        device: ``cpu`` or ``cuda``.
        others: further items.
    """
    machine = f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device == "cuda":
        machine = f"{torch.cuda.get_device_name()}; {machine}"
    script = Path(sys.argv[0]).resolve()
    command = shlex.join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])
    items = [
        f"`{command}`",
        f"{datetime.date.today().isoformat()}, {machine}",
        f"Python {platform.python_version()}, torch {torch.__version__}",
        *others,
    ]
    return "".join(f"- {item}\n" for item in items)
