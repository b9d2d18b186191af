"""Runs training processes, a few at a time, so that whatever dies can be started again.

A run's folder is locked for as long as a process trains in it. The process inherits the lock, so that it outlives a
comparison that was killed, and two processes never train in one folder: the next comparison waits for what the last one
left running, and goes on from its checkpoints.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from evomoe.errors import ConfigError
from evomoe.reporting.machine import facts
from evomoe.reporting.plan import Run
from evomoe.reporting.progress import LastLine, read_last_line, time_left
from evomoe.reporting.results import check_recipe, finish, is_finished, read_result, write_recipe
from evomoe.signals import StopRequest

LOG_FILE = "output.log"
LOCK_FILE = "lock"
POLL_SECONDS = 0.1
TAIL_LINES = 10


class Child(Protocol):
    """A process under way, as :class:`subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""

    def terminate(self) -> None:
        """Send it SIGTERM."""


Start = Callable[[list[str], Path, int], Child]
"""Starts a training process by its overrides, the file of its output, and the descriptor of its lock to inherit."""


@dataclass(frozen=True)
class Failure:
    """A run that did not finish.

    Args:
        run: which.
        status: exit status of its process, or why its result does not count.
        tail: last lines of its output.
    """

    run: Run
    status: str
    tail: str


@dataclass(eq=False)
class _Slot:
    """A place for a process. ``child`` is None while a process of another comparison trains in the run's folder."""

    run: Run
    started: float
    child: Child | None = None
    lock: int | None = None


class Pool:
    """Runs what is not finished.

    Args:
        start: of a process.
        workers: processes at a time.
        refresh_seconds: between two lines on what is under way.
        say: prints a line.
    """

    def __init__(
        self, start: Start, workers: int, refresh_seconds: float = 30.0, say: Callable[[str], None] = print
    ) -> None:
        self.start = start
        self.workers = workers
        self.refresh_seconds = refresh_seconds
        self.say = say
        self._slots: list[_Slot] = []
        self._stop = StopRequest()

    def run(self, runs: Sequence[Run]) -> list[Failure]:
        """Run all that is not finished; SIGTERM or Ctrl-C let the processes save first.

        Returns:
            The runs that failed. They do not end the others.

        Raises:
            SystemExit: a signal came; with its status.
        """
        waiting = deque(run for run in runs if not is_finished(run))
        if not waiting:
            return []
        done = [run for run in runs if is_finished(run)]
        failures: list[Failure] = []
        last_line = time.monotonic()
        self._stop.listen(announce=False)
        try:
            while waiting or self._slots:
                if self._stop.signum:
                    self._end()
                while waiting and len(self._slots) < self.workers:
                    self._slots.append(self._begin(waiting.popleft()))
                time.sleep(POLL_SECONDS)
                for slot in list(self._slots):
                    ended = self._look_after(slot)
                    if isinstance(ended, Failure):
                        failures.append(ended)
                        self.say(f"{slot.run}: failed, {ended.status}")
                    elif ended:
                        done.append(slot.run)
                        self.say(self._describe_end(slot))
                if self._slots and time.monotonic() - last_line >= self.refresh_seconds:
                    last_line = time.monotonic()
                    self.say(self._describe(done, list(waiting), failures))
        finally:
            for child in self._children():
                child.terminate()
            for slot in self._slots:
                if slot.lock is not None:
                    os.close(slot.lock)
            self._stop.release()
        return failures

    def _children(self) -> list[Child]:
        return [slot.child for slot in self._slots if slot.child is not None and slot.child.poll() is None]

    def _begin(self, run: Run) -> _Slot:
        """Start a run, unless another process holds its folder, or has just finished it."""
        slot = _Slot(run, time.monotonic())
        run.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(run.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return slot
        if is_finished(run) or _is_foreign(run):
            os.close(lock)
            return slot
        write_recipe(run)
        overrides = [*run.overrides, f"hydra.run.dir={run.folder}", "resume=auto"]
        slot.child, slot.lock = self.start(overrides, run.folder / LOG_FILE, lock), lock
        self.say(f"{run}: started in {run.folder}")
        return slot

    def _look_after(self, slot: _Slot) -> bool | Failure:
        """Whether a run has ended; one that another process began is taken over when that process ends."""
        if slot.child is None or slot.lock is None:
            try:
                check_recipe(slot.run)
            except ConfigError as error:
                self._slots.remove(slot)
                return Failure(slot.run, str(error), "")
            if is_finished(slot.run):
                self._slots.remove(slot)
                return True
            self._slots[self._slots.index(slot)] = self._begin(slot.run)
            return False
        status = slot.child.poll()
        if status is None:
            return False
        self._slots.remove(slot)
        try:
            return self._judge(slot, status)
        finally:
            os.close(slot.lock)  # not before it is known whether the run has to be run again

    def _judge(self, slot: _Slot, status: int) -> bool | Failure:
        """Mark a run whose process ended well as finished."""
        if status == 0:
            try:
                finish(slot.run, {**facts(), "process_seconds": time.monotonic() - slot.started})
            except ConfigError as error:
                return Failure(slot.run, str(error), "")
            return True
        reason = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return Failure(slot.run, reason, _tail(slot.run.folder / LOG_FILE))

    def _end(self) -> None:
        """Let every process save and end, then follow it."""
        signum = self._stop.signum or signal.SIGTERM
        children = self._children()
        name = signal.Signals(signum).name
        self.say(f"{name}: {len(children)} runs save and end; repeat it to leave them to themselves")
        for child in children:
            child.terminate()
        while any(child.poll() is None for child in children):
            time.sleep(POLL_SECONDS)
        self.say("stopped; the same command goes on from the saved checkpoints")
        raise SystemExit(128 + signum)

    def _describe_end(self, slot: _Slot) -> str:
        result = read_result(slot.run)
        took = timedelta(seconds=round(time.monotonic() - slot.started))
        return f"{slot.run}: done in {took}, val loss {result.loss:.4f} after {result.end['step']} steps"

    def _describe(self, done: Sequence[Run], waiting: Sequence[Run], failures: Sequence[Failure]) -> str:
        """What is under way, in one line."""
        lines = {slot.run: read_last_line(slot.run.folder / LOG_FILE) for slot in self._slots}
        durations = [(run.label, float(read_result(run).facts["process_seconds"])) for run in done]
        left = time_left(
            durations,
            [(slot.run.label, time.monotonic() - slot.started, lines[slot.run]) for slot in self._slots],
            [run.label for run in waiting],
            self.workers,
        )
        counts = f"{len(done)} done, {len(self._slots)} running, {len(waiting)} waiting"
        if failures:
            counts += f", {len(failures)} failed"
        if left is not None:
            counts += f", about {timedelta(seconds=round(left))} left"
        return "; ".join([counts, *(_describe_line(slot, lines[slot.run]) for slot in self._slots)])


def start_process(script: Path, threads: int) -> Start:
    """Starts ``python <script>`` in a session of its own: Ctrl-C in a terminal reaches it by the comparison alone.

    Args:
        script: the training program.
        threads: of each process.
    """

    def start(overrides: list[str], log: Path, lock: int) -> Child:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, str(script), *overrides],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock],
                start_new_session=True,
            )

    return start


def _is_foreign(run: Run) -> bool:
    """Whether another comparison has meanwhile put a run of its own into the folder."""
    try:
        check_recipe(run)
    except ConfigError:
        return True
    return False


def _describe_line(slot: _Slot, line: LastLine | None) -> str:
    if slot.child is None:
        return f"{slot.run}: a process of another comparison is at it"
    return f"{slot.run}: {line or 'starting'}"


def _tail(log: Path) -> str:
    """The last lines of a log."""
    lines: Iterable[str] = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "\n".join([line.rstrip() for line in lines if line.strip()][-TAIL_LINES:])
