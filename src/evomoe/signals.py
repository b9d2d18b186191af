"""SIGTERM and SIGINT as requests that the training loop answers when its state is whole."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """The first SIGTERM or SIGINT (Ctrl-C) since :meth:`listen`; a second one ends the process at once.

    Attributes:
        signum: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._announcer = 0  # process id

    def listen(self, announce: bool) -> None:
        """Take over the handlers. ``announce`` tells a waiting user on stderr that the signal was heard."""
        self.signum = None
        self._announcer = os.getpid() if announce else 0  # not its forked data workers
        # Python lets only the main thread set handlers; a run in another thread is stopped by its owner.
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._hear) for signum in STOP_SIGNALS}

    def release(self) -> None:
        """Give the handlers back to whom they belonged before :meth:`listen`; may be called twice."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def _hear(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum
        if self._announcer == os.getpid():
            name = signal.Signals(signum).name
            # os.write, as a handler may interrupt a print that holds the stream's lock.
            os.write(2, f"\n{name}: saving after the present optimizer step; repeat it to stop at once\n".encode())


def leave_signals_to_trainer(_worker_id: int) -> None:
    """A ``worker_init_fn`` that lets a data worker outlive the signal until the main process has saved.

    Ctrl-C and batch systems signal the whole process group. A worker that dies of it makes the main process fail in the
    middle of a step. The second SIGTERM ends the worker, so that a stuck one can still be ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, _frame: signal.signal(signum, signal.SIG_DFL))
