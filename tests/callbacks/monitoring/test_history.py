from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.programs import PLAIN, load

from evomoe.callbacks import History
from evomoe.callbacks.monitoring import history
from evomoe.callbacks.monitoring.history import Routed
from evomoe.checkpointing import list_checkpoints
from evomoe.models.flops import Work
from evomoe.routing import SoftRouting, SparseRouting


def routing(counts: list[int], tokens: int) -> SparseRouting:
    total = sum(counts)
    return SparseRouting(
        token=torch.zeros(total, dtype=torch.long),
        weight=torch.ones(total),
        tokens_per_expert=torch.tensor(counts),
        scores=torch.ones(tokens, len(counts)),
        num_tokens=torch.tensor(tokens),
        dropped=torch.tensor(0),
    )


def test_routed_sums_typed_by_hand():
    routed = Routed()
    routed.add(["block_1", "block_3"], [routing([3, 1], 4), routing([4, 4], 4)])
    routed.add(["block_1", "block_3"], [routing([1, 3], 4), routing([0, 4], 4)])
    assert routed.describe() == {
        "active_experts": (4 + 8 + 4 + 4) / 16,
        "load": {"block_1": [0.5, 0.5], "block_3": [4 / 12, 8 / 12]},
        "load_max_violation": {"block_1": 0.5, "block_3": (0 + 1) / 2},  # of each batch: balance over many hides much
        "router_metrics": {},
    }


def test_routed_sums_come_back_from_plain_values():
    routed = Routed()
    routed.add(["block_1"], [routing([3, 0, 1], 4)])
    state = json.loads(json.dumps(routed.state_dict()))
    restored = Routed.restore(state, torch.device("cpu"))
    for sums in (routed, restored):
        sums.add(["block_1"], [routing([1, 1, 5], 4)])
    assert restored.describe() == routed.describe()


def test_metrics_of_the_routers_are_means_over_layers_and_batches():
    routed = Routed()
    for value in (0.0, 1.0):
        with_metric = replace(routing([2, 2], 4), metrics={"off_node": torch.tensor(value)})
        routed.add(["block_1", "block_3"], [with_metric, with_metric])
    routed.add(
        ["block_1"], [replace(routing([2, 2], 4), metrics={"off_node": torch.tensor(0.5), "bias": torch.ones(())})]
    )
    restored = Routed.restore(json.loads(json.dumps(routed.state_dict())), torch.device("cpu"))
    assert restored.describe()["router_metrics"] == {"off_node": 2.5 / 5, "bias": 1.0}


def test_slots_of_a_soft_routing_count_as_rows_and_have_no_load():
    tensor = torch.zeros(2, 5, 4, 3)  # 2 sequences of 5 tokens; 4 experts with 3 slots for each
    routed = Routed()
    metrics = {"slots_per_token": torch.tensor(2.0)}
    soft = SoftRouting(dispatch=tensor, combine=tensor, num_tokens=torch.tensor(10), metrics=metrics)
    routed.add(["block_1"], [soft])
    assert routed.describe() == {
        "active_experts": 24 / 10,
        "load": {},
        "load_max_violation": {},
        "router_metrics": {"slots_per_token": 2.0},
    }


def test_a_dense_model_has_no_experts():
    routed = Routed()
    routed.add([], [])
    assert routed.describe() == {"active_experts": None, "load": {}, "load_max_violation": {}, "router_metrics": {}}


class Clocks:
    """Stands in for the time module: a step takes 3 s on the wall and 2 s of the processor, all else 100 s of both."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.looks = [0, 0]

    def perf_counter(self) -> float:
        self.looks[0] += 1
        self.wall += 3 if self.looks[0] % 2 == 0 else 100
        return self.wall

    def process_time(self) -> float:
        self.looks[1] += 1
        self.cpu += 2 if self.looks[1] % 2 == 0 else 100
        return self.cpu


def test_the_wait_for_a_count_on_the_device_is_charged(monkeypatch):
    """The optimizer step is under way when the batch ends; whoever reads the count waits for it."""
    now = 0.0

    class Count:
        def __int__(self) -> int:
            nonlocal now
            now += 5
            return 7

    clock = SimpleNamespace(perf_counter=lambda: now, process_time=lambda: now)
    monkeypatch.setattr(history, "time", clock)
    trainer = SimpleNamespace(world_size=1, global_step=1, max_steps=2, max_epochs=None, is_last_batch=False)
    task = SimpleNamespace(model=SimpleNamespace(moe_layers={}))
    kept = History()
    kept.on_train_batch_start(trainer, task, None, 0)
    kept.on_train_batch_end(trainer, task, {"work": Work(tokens=Count(), forward_flops=1.0), "routings": []}, None, 0)
    assert (kept.spent.tokens, kept.spent.seconds, kept.spent.cpu_seconds) == (7, 5.0, 5.0)


@pytest.fixture(scope="module")
def run(train, tmp_path_factory) -> SimpleNamespace:
    """17 steps with a validation after every fifth, checkpoints after every third."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "time", Clocks())
        values, objects = train(folder, *SETTING)
    return SimpleNamespace(folder=folder, values=values, objects=objects, written=read(folder))


SETTING = [
    *(part for part in PLAIN if part != "test=false"),
    "trainer.max_steps=17",
    "trainer.val_check_interval=5",
    "callbacks.checkpoint.every_n_steps=3",
    "+callbacks.checkpoint.keep_last=99",
    "+callbacks.throughput._target_=evomoe.callbacks.Throughput",
]


def read(folder) -> dict:
    return json.loads((folder / "history.json").read_text())


def test_rows_of_a_real_run(run):
    rows = run.written["rows"]
    assert [row["step"] for row in rows] == [5, 10, 15, 17]
    assert [row["tokens"] for row in rows] == [128 * row["step"] for row in rows]  # 4 sequences of 32
    assert [row["seconds"] for row in rows] == [3 * row["step"] for row in rows]
    assert [row["cpu_seconds"] for row in rows] == [2 * row["step"] for row in rows]
    last = rows[-1]
    assert (last["val_loss"], last["val_loss_sparse"]) == (run.values["val/loss"], run.values["val/loss_sparse"])
    assert last["active_experts"] == 1.0  # hardened
    for row in rows:
        assert row["load"].keys() == row["load_max_violation"].keys() == {"block_1"}
        assert sum(row["load"]["block_1"]) == pytest.approx(1)


def test_flops_are_those_of_throughput_in_every_row(run):
    (throughput,) = (c for c in run.objects.callbacks if type(c).__name__ == "Throughput")
    assert run.written["rows"][-1]["training_flops"] == throughput.training_flops
    rows = run.written["rows"]
    per_step = (rows[-1]["training_flops"] - rows[-2]["training_flops"]) / (rows[-1]["step"] - rows[-2]["step"])
    model = run.objects.task.model
    assert per_step == pytest.approx(3 * 128 * model.flops_per_token(32, 1.0))


def test_the_test_and_causality_are_written_too(run):
    assert run.written["test"] == {name: value for name, value in run.values.items() if name.startswith("test/")}
    assert run.written["test"]["test/loss_sparse"] > 0
    assert run.written["causal_in_train"] is True


def test_only_a_causal_block_can_show_the_future(tmp_path):
    for causal in (True, False):
        layer = SimpleNamespace(router=SimpleNamespace(causal_in_train=False))
        block = SimpleNamespace(attention=SimpleNamespace(causal=causal))
        network = SimpleNamespace(named_blocks={"block_1": block}, moe_layers={"block_1": layer})
        trainer = SimpleNamespace(is_global_zero=True, datamodule=None, global_step=0, default_root_dir=tmp_path)
        History().on_fit_end(trainer, SimpleNamespace(model=network))
        assert read(tmp_path)["causal_in_train"] is not causal


def test_the_last_checkpoint_holds_the_last_row(run):
    callbacks = load(run.folder)["callbacks"]
    assert callbacks["History"]["rows"] == run.written["rows"]


@pytest.mark.parametrize("step", [3, 9, 10, 17])
def test_a_resumed_history_is_that_of_an_uninterrupted_run(train, run, tmp_path, monkeypatch, step):
    monkeypatch.setattr(history, "time", Clocks())
    train(tmp_path, *SETTING, f"ckpt_path={list_checkpoints(run.folder)[step]}")
    assert read(tmp_path) == run.written


def test_accumulation_validates_after_the_last_step_and_only_once(train, tmp_path):
    setting = ["trainer.max_steps=5", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4"]
    train(tmp_path, *SETTING, *setting, "test=false")
    rows = read(tmp_path)["rows"]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert [row["tokens"] for row in rows] == [512, 1024, 1280]
    train(tmp_path / "met", *SETTING, *setting, "test=false", "trainer.val_check_interval=10")
    assert [row["step"] for row in read(tmp_path / "met")["rows"]] == [5]


def test_a_run_of_epochs_validates_after_the_last_batch(train, tmp_path):
    epochs = ["trainer.max_steps=-1", "trainer.max_epochs=2", "+trainer.limit_train_batches=7"]
    train(tmp_path, *SETTING, *epochs, "test=false", experiment="gpt_dense")
    written = read(tmp_path)
    assert [row["step"] for row in written["rows"]] == [5, 10, 14]
    assert written["rows"][-1]["active_experts"] is None


def test_a_signal_during_the_last_step_waits_for_its_validation(train, tmp_path, monkeypatch):
    start = History.on_train_batch_start

    def start_signalled(self, trainer, *rest):
        if trainer.global_step == 16:
            os.kill(os.getpid(), signal.SIGTERM)
        start(self, trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(History, "on_train_batch_start", start_signalled)
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path, *SETTING)
    assert stopped.value.code == 143
    rows = load(tmp_path)["callbacks"]["History"]["rows"]
    assert [row["step"] for row in rows] == [5, 10, 15, 17]
    train(tmp_path, *SETTING, "resume=auto")
    assert read(tmp_path)["rows"] == rows
    assert "test/loss_sparse" in read(tmp_path)["test"]
