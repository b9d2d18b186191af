from __future__ import annotations

from types import SimpleNamespace

import torch

from evomoe.callbacks import Throughput
from evomoe.callbacks.monitoring import throughput
from evomoe.models.flops import Work

WORK = Work(tokens=torch.tensor(8), forward_flops=5000.0)


class Run:
    """Batches of a quarter of a second, under a clock that is turned by hand."""

    def __init__(self, monkeypatch, every: int = 1) -> None:
        self.now, self.step, self.every, self.processes = 100.0, 0, every, 1
        self.logged: list[tuple[int, str, float]] = []
        self.module = SimpleNamespace(log=self._log)
        self.callback = Throughput()
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)

    def _log(self, name: str, value: float) -> None:
        self.logged.append((self.step, name.removeprefix("throughput/"), value))

    def batch(self, ends_window: bool = True) -> None:
        self.callback.on_train_batch_start(self._trainer, self.module, None, 0)
        self.now += 0.25
        self.step += ends_window
        self.callback.on_train_batch_end(self._trainer, self.module, {"work": WORK}, None, 0)

    @property
    def _trainer(self):
        return SimpleNamespace(global_step=self.step, log_every_n_steps=self.every, world_size=self.processes)


def test_speed_and_flops_typed_by_hand(monkeypatch):
    run = Run(monkeypatch)
    run.batch()
    assert run.logged == [(1, "tokens_per_second", 32.0), (1, "training_flops", 3 * 5000)]


def test_both_are_sums_over_all_processes(monkeypatch):
    run = Run(monkeypatch)
    run.processes = 3
    run.batch()
    assert run.logged == [(1, "tokens_per_second", 96.0), (1, "training_flops", 3 * 3 * 5000)]


def test_time_between_batches_is_not_part_of_the_speed(monkeypatch):
    run = Run(monkeypatch, every=2)
    run.batch()
    run.now += 1000  # a validation
    run.batch()
    run.batch()
    run.batch()
    assert run.logged == [
        (2, "tokens_per_second", 32.0),
        (2, "training_flops", 2 * 3 * 5000),
        (4, "tokens_per_second", 32.0),
        (4, "training_flops", 4 * 3 * 5000),
    ]


def test_a_trainer_that_never_logs_has_its_work_charged(monkeypatch):
    run = Run(monkeypatch, every=0)
    run.batch()
    assert run.logged == []
    assert run.callback.training_flops == 3 * 5000


def test_every_batch_of_an_accumulation_window_counts(monkeypatch):
    run = Run(monkeypatch)
    for ends_window in (False, False, True):
        run.batch(ends_window)
    assert run.logged == [(1, "tokens_per_second", 32.0), (1, "training_flops", 3 * 3 * 5000)]


def test_a_resumed_run_goes_on_counting_flops(monkeypatch):
    first = Run(monkeypatch)
    first.batch()
    second = Run(monkeypatch)
    second.callback.load_state_dict(first.callback.state_dict())
    second.batch()
    assert second.logged[-1] == (1, "training_flops", 2 * 3 * 5000)
