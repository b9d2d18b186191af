"""One progress bar for the whole training run; plain lines where nobody watches."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from datetime import timedelta
from typing import Any, TextIO

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from evomoe.callbacks.console.status import RunStatus, phase_of, read_status

REDRAW_SECONDS = 0.25
PACE_WINDOW_SECONDS = 30.0


class EvolutionProgress(ProgressBar):
    """Shows phase, step, losses, temperature, active experts, speed and time left, once for the whole fit.

    In a terminal it draws a bar of all optimizer steps with the status under it, and a second bar, gone afterwards,
    during validation and test. Elsewhere (a pipe, a log file, a notebook) it prints a line every ``refresh_seconds``.
    It redraws at most four times a second, and reads metrics, which waits for the device, only then.

    Args:
        refresh_seconds: seconds between the lines where stdout is no terminal.
        console: where to draw; stdout by default.
    """

    def __init__(self, refresh_seconds: float = 10.0, console: Console | None = None) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self.is_enabled = True
        self._console = console
        self._screen: _Screen | None = None
        self._pace: Pace | None = None
        self._total: int | None = None
        self._last_refresh = -math.inf
        self._eval_name = ""
        self._eval_done = 0
        self._eval_total: int | None = None
        self._eval_start = 0.0

    def enable(self) -> None:
        """Show again."""
        self.is_enabled = True

    def disable(self) -> None:
        """Show nothing, as on every process but the first."""
        self.is_enabled = False
        self._close()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the step of the checkpoint, if the run continues one."""
        self._pace = Pace(trainer.global_step, phase_of(trainer))
        self._total = _total_steps(trainer)
        self._last_refresh = time.monotonic() if self._plain else -math.inf
        if self.is_enabled and not self._plain:
            self._open().show_training(RunStatus(phase_of(trainer)), trainer.global_step, self._total, self._pace)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Redraw, if it is time or the last step."""
        is_last = self.is_enabled and trainer.global_step == self._total
        if self._is_time() or is_last:
            self._show_training(read_status(trainer, outputs), trainer.global_step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the second bar; stop the clock that measures training steps."""
        if self._pace is not None:
            self._pace.pause()
        if trainer.sanity_checking:
            self._start_eval("sanity check", trainer.num_sanity_val_batches)
        else:
            self._start_eval("validation", trainer.num_val_batches)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Advance the second bar."""
        self._advance_eval()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the second bar."""
        self._end_eval()
        if self._pace is not None:
            self._pace.resume()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the bar of the test."""
        self._start_eval("test", trainer.num_test_batches)

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Advance the bar of the test."""
        self._advance_eval()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the bar of the test."""
        self._end_eval()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the terminal back before a traceback is printed."""
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the last frame on the screen."""
        self._close()
        self._pace = None

    @property
    def _plain(self) -> bool:
        if self._console is None:
            self._console = Console()  # not at construction: it is a view of the stdout of the run
        return not self._console.is_interactive

    def _is_time(self) -> bool:
        now = time.monotonic()
        if not self.is_enabled or now - self._last_refresh < (self.refresh_seconds if self._plain else REDRAW_SECONDS):
            return False
        self._last_refresh = now
        return True

    def _show_training(self, status: RunStatus, step: int) -> None:
        assert self._pace is not None
        self._pace.update(step, status.phase)
        if not self._plain:
            self._open().show_training(status, step, self._total, self._pace)
            return
        share = f" ({step / self._total:.0%})" if self._total else ""
        parts = [f"step {_of(step, self._total)}{share}", status.phase, *status.describe()]
        print(", ".join([*parts, *_clock(self._pace, step, self._total)]), flush=True)

    def _start_eval(self, name: str, batches: list[int | float]) -> None:
        total = sum(batches)
        self._eval_name, self._eval_done, self._eval_start = name, 0, time.monotonic()
        self._eval_total = int(total) if math.isfinite(total) else None
        if self.is_enabled and not self._plain:
            self._open().show_eval(name, 0, self._eval_total, "")

    def _advance_eval(self) -> None:
        self._eval_done += 1
        if not self._is_time():
            return
        left = ""
        if self._eval_total is not None and self._eval_done < self._eval_total:
            seconds = (time.monotonic() - self._eval_start) / self._eval_done * (self._eval_total - self._eval_done)
            left = f"left {_duration(seconds)}"
        if self._plain:
            shown = f"{self._eval_name} {_of(self._eval_done, self._eval_total)}"
            print(", ".join(part for part in (shown, left) if part), flush=True)
        else:
            self._open().show_eval(self._eval_name, self._eval_done, self._eval_total, left)

    def _end_eval(self) -> None:
        if self._screen is not None:
            self._screen.hide_eval()

    def _open(self) -> _Screen:
        if self._screen is None:
            assert self._console is not None
            self._screen = _Screen(self._console)
        return self._screen

    def _close(self) -> None:
        if self._screen is not None:
            self._screen.close()
            self._screen = None


class Pace:
    """Estimates the time left from the training steps of the last seconds and the validation time of the whole run.

    A new phase costs another time per step, so it forgets the steps of the phase before.

    Args:
        step: optimizer steps done before.
        phase: name of the phase that begins.
    """

    def __init__(self, step: int, phase: str) -> None:
        self._first_step = step
        self._phase = phase
        self._start = time.monotonic()
        self._paused = 0.0
        self._paused_since: float | None = None
        self._samples = deque([(0.0, step)])  # (seconds of training, step)
        self._seconds_per_step: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since the start, validation included."""
        return time.monotonic() - self._start

    def pause(self) -> None:
        """Stop the clock of the training steps."""
        self._paused_since = time.monotonic()

    def resume(self) -> None:
        """Let it go on."""
        if self._paused_since is not None:
            self._paused += time.monotonic() - self._paused_since
            self._paused_since = None

    def update(self, step: int, phase: str) -> None:
        """Take note that ``step`` optimizer steps are done."""
        seconds = self.elapsed - self._paused
        while len(self._samples) > 1 and seconds - self._samples[0][0] > PACE_WINDOW_SECONDS:
            self._samples.popleft()
        first_seconds, first_step = self._samples[0]
        if step > first_step:
            self._seconds_per_step = (seconds - first_seconds) / (step - first_step)
        if phase != self._phase:
            self._phase = phase
            self._samples.clear()
        self._samples.append((seconds, step))

    def left(self, step: int, total: int) -> float | None:
        """Seconds from ``step`` to ``total``; None before the first step."""
        if self._seconds_per_step is None:
            return None
        validation_per_step = self._paused / max(step - self._first_step, 1)
        return (total - step) * (self._seconds_per_step + validation_per_step)


class _Screen:
    """The live part of the terminal: the bar of the run, a second bar during evaluation, the status under both."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[clock]}"),
            expand=True,
            auto_refresh=False,
        )
        self._status = Text(no_wrap=True, overflow="ellipsis")
        self._training: TaskID | None = None
        self._eval: TaskID | None = None
        self._live = Live(Group(self._bars, self._status), console=console, auto_refresh=False)
        before = (sys.stdout, sys.stderr)
        self._live.start()  # now prints go above the bars; log handlers still hold the old streams
        self._moved_handlers = _move_handlers(dict(zip(before, (sys.stdout, sys.stderr), strict=True)))

    def show_training(self, status: RunStatus, step: int, total: int | None, pace: Pace) -> None:
        if self._training is None:
            self._training = self._bars.add_task("", count="", clock="")
        self._bars.update(
            self._training,
            description=status.phase,
            completed=step,
            total=total,
            count=_of(step, total),
            clock=", ".join(_clock(pace, step, total)),
        )
        self._status.plain = "  ".join(status.describe())
        self._live.refresh()

    def show_eval(self, name: str, done: int, total: int | None, left: str) -> None:
        if self._eval is None:
            self._eval = self._bars.add_task("", count="", clock="")
        self._bars.update(self._eval, description=name, completed=done, total=total, count=_of(done, total), clock=left)
        self._live.refresh()

    def hide_eval(self) -> None:
        if self._eval is not None:
            self._bars.remove_task(self._eval)
            self._eval = None
            self._live.refresh()

    def close(self) -> None:
        for handler, stream in self._moved_handlers:
            handler.setStream(stream)
        self._live.stop()


def _move_handlers(streams: dict[TextIO, TextIO]) -> list[tuple[logging.StreamHandler[TextIO], TextIO]]:
    """Make log handlers that write to a key of ``streams`` write to its value; returns them with what they had."""
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    moved = []
    for handler in dict.fromkeys(handler for logger in loggers for handler in logger.handlers):
        if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
            moved.append((handler, handler.stream))
            handler.setStream(streams[handler.stream])
    return moved


def _total_steps(trainer: L.Trainer) -> int | None:
    """Optimizer steps of the whole run, counted from its very start; None when it has no end."""
    total = trainer.estimated_stepping_batches
    return int(total) if math.isfinite(total) and total >= 0 else None


def _of(done: int, total: int | None) -> str:
    return str(done) if total is None else f"{done}/{total}"


def _clock(pace: Pace, step: int, total: int | None) -> list[str]:
    parts = [f"elapsed {_duration(pace.elapsed)}"]
    left = None if total is None else pace.left(step, total)
    if left is not None:
        parts.append(f"left {_duration(left)}")
    return parts


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
