"""Where training processes stand, from the lines that they print, and how long all of them will take."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

TAIL_BYTES = 4096
STEP = re.compile(r"^step (\d+)/(\d+) .*$", re.MULTILINE)
LOSS = re.compile(r"(?<!val )loss ([\d.]+|nan|inf)")
LEFT = re.compile(r"left (?:(\d+) days?, )?(\d+):(\d\d):(\d\d)")


@dataclass(frozen=True)
class LastLine:
    """The last line of progress.

    Args:
        step: optimizer steps taken.
        total: optimizer steps of the run.
        loss: of training, None where it was not printed.
        left: seconds to the end, None where it was not printed.
    """

    step: int
    total: int
    loss: float | None
    left: float | None

    def __str__(self) -> str:
        parts = [f"step {self.step}/{self.total}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.left is not None:
            parts.append(f"{timedelta(seconds=round(self.left))} left")
        return ", ".join(parts)


def read_last_line(log: Path) -> LastLine | None:
    """The last line that :class:`~evomoe.callbacks.EvolutionProgress` printed to a file; None where there is none."""
    if not log.exists():
        return None
    with log.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    matches = list(STEP.finditer(text))
    if not matches:
        return None
    line = matches[-1][0]
    loss, left = LOSS.search(line), LEFT.search(line)
    seconds = None
    if left:
        days, hours, minutes, rest = (int(part or 0) for part in left.groups())
        seconds = float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
    return LastLine(int(matches[-1][1]), int(matches[-1][2]), float(loss[1]) if loss else None, seconds)


def time_left(
    durations: Sequence[tuple[str, float]],
    running: Sequence[tuple[str, float, LastLine | None]],
    waiting: Sequence[str],
    workers: int,
) -> float | None:
    """Seconds until all runs are done, each taken to last as long as others of its method, or else as all others.

    Args:
        durations: method and seconds of each run that is done.
        running: method, seconds so far, and last line of each that is under way.
        waiting: method of each that is to come.
        workers: runs at a time.

    Returns:
        None while no run has shown how long it takes.
    """
    lefts = [None if line is None else line.left for _, _, line in running]
    known = list(durations)
    known += [(label, age + left) for (label, age, _), left in zip(running, lefts, strict=True) if left is not None]
    if not known:
        return None

    def expected(label: str) -> float:
        own = [seconds for other, seconds in known if other == label]
        return statistics.fmean(own or [seconds for _, seconds in known])

    total = sum(expected(label) for label in waiting)
    for (label, age, _), left in zip(running, lefts, strict=True):
        total += max(0.0, expected(label) - age) if left is None else left
    return total / max(1, min(workers, len(running) + len(waiting)))
