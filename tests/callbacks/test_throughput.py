from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from evomoe.callbacks import Throughput, throughput
from evomoe.models.gpt import GPT
from evomoe.routing import SoftRouting, SparseRouting, Switch

SEQUENCES, CONTEXT = 2, 5
BATCH = {"tokens": torch.zeros(SEQUENCES, CONTEXT + 1, dtype=torch.long)}


def routing(rows: int) -> SparseRouting:
    return SparseRouting(
        token=torch.zeros(rows, dtype=torch.long),
        weight=torch.ones(rows),
        tokens_per_expert=torch.tensor([rows]),
        scores=torch.ones(10, 1),
        num_tokens=torch.tensor(10),
        dropped=torch.tensor(0),
    )


class Model:
    """100 FLOPs a token and position, and 1000 for each row of an expert."""

    def flops_per_token(self, context: int, active_experts: list[float]) -> float:
        return 100.0 * context + 1000.0 * sum(active_experts)


class Run:
    """Batches of a quarter of a second, under a clock that is turned by hand."""

    def __init__(self, monkeypatch, model=None, every: int = 1) -> None:
        self.now, self.step, self.every, self.processes = 100.0, 0, every, 1
        self.logged: list[tuple[int, str, float]] = []
        self.module = SimpleNamespace(model=model or Model(), log=self._log)
        self.callback = Throughput()
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)

    def _log(self, name: str, value: float) -> None:
        self.logged.append((self.step, name.removeprefix("throughput/"), value))

    def batch(self, routings, ends_window: bool = True) -> None:
        self.callback.on_train_batch_start(self._trainer, self.module, BATCH, 0)
        self.now += 0.25
        self.step += ends_window
        self.callback.on_train_batch_end(self._trainer, self.module, {"routings": routings}, BATCH, 0)

    @property
    def _trainer(self):
        return SimpleNamespace(global_step=self.step, log_every_n_steps=self.every, world_size=self.processes)


def test_speed_and_flops_typed_by_hand(monkeypatch):
    run = Run(monkeypatch)
    run.batch([routing(10), routing(25)])  # one row a token in the first layer, two and a half in the second
    assert run.logged == [(1, "tokens_per_second", 40.0), (1, "training_flops", 3 * 10 * (500 + 3500))]


def test_both_are_sums_over_all_processes(monkeypatch):
    run = Run(monkeypatch)
    run.processes = 3
    run.batch([])
    assert run.logged == [(1, "tokens_per_second", 120.0), (1, "training_flops", 3 * 3 * 10 * 500)]


def test_time_between_batches_is_not_part_of_the_speed(monkeypatch):
    run = Run(monkeypatch, every=2)
    run.batch([])
    run.now += 1000  # a validation
    run.batch([])
    run.batch([])
    run.batch([])
    assert run.logged == [
        (2, "tokens_per_second", 40.0),
        (2, "training_flops", 2 * 3 * 10 * 500),
        (4, "tokens_per_second", 40.0),
        (4, "training_flops", 4 * 3 * 10 * 500),
    ]


def test_a_trainer_that_never_logs_has_its_work_charged(monkeypatch):
    run = Run(monkeypatch, every=0)
    run.batch([])
    assert run.logged == []
    assert run.callback.training_flops == 3 * 10 * 500


def test_every_batch_of_an_accumulation_window_counts(monkeypatch):
    run = Run(monkeypatch)
    for ends_window in (False, False, True):
        run.batch([], ends_window)
    assert run.logged == [(1, "tokens_per_second", 40.0), (1, "training_flops", 3 * 3 * 10 * 500)]


def test_a_resumed_run_goes_on_counting_flops(monkeypatch):
    first = Run(monkeypatch)
    first.batch([])
    second = Run(monkeypatch)
    second.callback.load_state_dict(first.callback.state_dict())
    second.batch([])
    assert second.logged[-1] == (1, "training_flops", 2 * 3 * 10 * 500)


def test_flops_are_those_of_the_model(monkeypatch):
    model = GPT(30, CONTEXT, 16, 4, 2, num_experts=3, router=Switch)
    run = Run(monkeypatch, model)
    run.batch([routing(10), routing(20)])
    assert run.callback.training_flops == 3 * 10 * model.flops_per_token(CONTEXT, [1.0, 2.0])


def test_soft_slots_are_charged_as_rows(monkeypatch):
    tensor = torch.zeros(SEQUENCES, CONTEXT, 4, 5)  # 4 experts with 5 slots for each of 2 sequences: 40 rows, 10 tokens
    run = Run(monkeypatch)
    run.batch([SoftRouting(dispatch=tensor, combine=tensor, num_tokens=torch.tensor(10))])
    assert run.callback.training_flops == pytest.approx(3 * 10 * (500 + 4000))
