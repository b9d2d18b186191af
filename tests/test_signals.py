from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from evomoe.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_the_first_signal_is_noted_and_announced(signum, capfd):
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    request = StopRequest()
    request.listen(announce=True)
    assert request.signum is None
    signal.raise_signal(signum)
    assert request.signum == signum
    assert capfd.readouterr().err.strip().startswith(f"{signal.Signals(signum).name}: saving")
    request.release()
    request.release()
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_listening_again_forgets_the_old_signal(capfd):
    request = StopRequest()
    request.listen(announce=False)
    signal.raise_signal(signal.SIGTERM)
    request.release()
    request.listen(announce=False)
    assert request.signum is None
    request.release()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [(signal.SIGTERM, signal.SIGTERM, 143), (signal.SIGINT, signal.SIGINT, 130), (signal.SIGINT, signal.SIGTERM, 143)],
)
def test_the_second_signal_ends_the_process_at_once(first, second, status):
    script = f"""
import signal
from evomoe.signals import StopRequest
StopRequest().listen(announce=False)
signal.raise_signal({int(first)})
print("alive", flush=True)
try:
    signal.raise_signal({int(second)})
finally:
    print("lingering", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert (ended.stdout, ended.returncode) == ("alive\n", status)


@pytest.mark.parametrize(
    ("signals", "status"),
    [([signal.SIGINT] * 3 + [signal.SIGTERM], 0), ([signal.SIGTERM, signal.SIGTERM], -signal.SIGTERM)],
)
def test_a_data_worker_outlives_the_first_signal_but_can_be_ended(signals, status):
    script = f"""
import signal
from evomoe.signals import leave_signals_to_trainer
leave_signals_to_trainer(0)
for signum in {[int(each) for each in signals]}:
    signal.raise_signal(signum)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == status
