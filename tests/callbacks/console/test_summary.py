from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.phased_run import FakeEvolution, PhasedTask, fit, loader
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from evomoe.callbacks.console import summary as summary_module
from evomoe.callbacks.console.summary import RunSummary, print_closing


class Clock:
    """Stands in for the time module: each look at it is a second later."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


def without_time(values: dict) -> dict:
    return {name: value for name, value in values.items() if name not in ("seconds", "tokens_per_second")}


def test_sums_of_each_phase(tmp_path):
    summary = RunSummary()
    fit(tmp_path, FakeEvolution(), summary)
    values = summary.as_dict()
    diversify = {
        "phase": "diversify",
        "first_step": 0,
        "steps": 2,
        "tokens": 16,
        "active_experts": 1.0,
        "training_flops_per_token": 3 * (400 + 1000),
        "train_loss": 9.5,
        "validation": {"val/loss": 2.0, "val/perplexity": 2.5, "val/loss_sparse": 3.0},
    }
    sparsify = {
        "phase": "sparsify",
        "first_step": 2,
        "active_experts": 3.0,
        "training_flops_per_token": 3 * (400 + 3000),
        "train_loss": 7.5,
        "validation": {"val/loss": 4.0, "val/perplexity": 4.5, "val/loss_sparse": 5.0},
    }
    hardened = {
        "phase": "hardened",
        "first_step": 4,
        "train_loss": 5.5,
        "validation": {"val/loss": 6.0, "val/perplexity": 6.5, "val/loss_sparse": 7.0},
    }
    expected = [diversify, diversify | sparsify, diversify | hardened]
    assert [without_time(phase) for phase in values["phases"]] == expected
    assert without_time(values["whole_run"]) == diversify | hardened | {
        "phase": "whole run",
        "first_step": 0,
        "steps": 6,
        "tokens": 48,
        "active_experts": pytest.approx(5 / 3),
        "training_flops_per_token": pytest.approx(3 * (400 + 5000 / 3)),
    }


def test_time_leaves_validation_out(tmp_path, monkeypatch):
    monkeypatch.setattr(summary_module, "time", Clock())
    summary = RunSummary()
    fit(tmp_path, FakeEvolution(), summary)
    # One look at the start, after each batch and after each validation: every batch takes one second.
    phases = summary.as_dict()["phases"]
    assert [phase["seconds"] for phase in phases] == [2, 2, 2]
    assert [phase["tokens_per_second"] for phase in phases] == [8, 8, 8]


def test_padding_is_no_token(tmp_path):
    summary = RunSummary()
    fit(tmp_path, FakeEvolution(), summary, data=loader(6, padding=1))
    values = summary.as_dict()
    assert values["whole_run"]["tokens"] == 36
    # A batch has 8 positions and 6 tokens.
    assert values["phases"][0]["training_flops_per_token"] == pytest.approx(3 * (400 + 1000) * 8 / 6)
    assert [phase["active_experts"] for phase in values["phases"]] == [1, 3, 1]


def test_a_dense_model_has_no_experts(tmp_path):
    summary = RunSummary()
    fit(tmp_path, summary, task=PhasedTask(layers=0))
    (phase,) = summary.as_dict()["phases"]
    assert (phase["phase"], phase["steps"], phase["tokens"]) == ("train", 6, 48)
    assert phase["active_experts"] is None
    assert phase["training_flops_per_token"] == 3 * (400 + 1000)


def test_accumulation_counts_optimizer_steps(tmp_path):
    summary = RunSummary()
    fit(tmp_path, summary, steps=2, data=loader(8), accumulate_grad_batches=4, limit_val_batches=0)
    (phase,) = summary.as_dict()["phases"]
    assert (phase["steps"], phase["tokens"]) == (2, 64)
    assert phase["validation"] == {}


def test_train_loss_is_the_mean_of_the_last_batches(tmp_path):
    summary = RunSummary()
    fit(tmp_path, summary, steps=130, data=loader(130), limit_val_batches=0)
    (phase,) = summary.as_dict()["phases"]
    assert phase["train_loss"] == pytest.approx(sum(10 - step for step in range(80, 130)) / 50)


def test_counts_are_fetched_once_in_a_hundred_batches(tmp_path, monkeypatch):
    fetches = []
    real = RunSummary._fetch
    monkeypatch.setattr(RunSummary, "_fetch", lambda self: fetches.append(self._batches) or real(self))
    fit(tmp_path, RunSummary(), steps=250, data=loader(250), limit_val_batches=0)
    assert fetches == [0, 100, 100, 50]  # when the phase begins, twice, and for the files at the end


def test_a_resumed_run_reports_the_whole(tmp_path):
    whole, first, second = RunSummary(), RunSummary(), RunSummary()
    fit(tmp_path, FakeEvolution(), whole)
    fit(tmp_path, FakeEvolution(), first, steps=3).save_checkpoint(tmp_path / "three.ckpt")
    fit(tmp_path, FakeEvolution(), second, resume=tmp_path / "three.ckpt")
    expected, resumed = whole.as_dict(), second.as_dict()
    assert [without_time(phase) for phase in resumed["phases"]] == [without_time(phase) for phase in expected["phases"]]
    assert without_time(resumed["whole_run"]) == without_time(expected["whole_run"])
    assert resumed["whole_run"]["seconds"] > first.as_dict()["whole_run"]["seconds"]


def test_state_is_plain(tmp_path):
    summary = RunSummary()
    fit(tmp_path, FakeEvolution(), summary)
    assert json.loads(json.dumps(summary.state_dict())) == summary.state_dict()


def test_files(tmp_path):
    summary = RunSummary()
    fit(tmp_path, FakeEvolution(), summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary.as_dict()
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert lines[0] == "|  | diversify | sparsify | hardened | whole run |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert "| optimizer steps | 2 | 2 | 2 | 6 |" in lines
    assert "| active experts per token | 1.00 | 3.00 | 1.00 | 1.67 |" in lines
    assert "| training FLOPs per token | 4.2k | 10.2k | 4.2k | 6.2k |" in lines
    assert "| val loss, sparse rule | 3.0000 | 5.0000 | 7.0000 | 7.0000 |" in lines
    assert not any("perplexity, sparse" in line for line in lines)  # the task logged none


def test_validation_alone_leaves_no_trace(tmp_path):
    summary = RunSummary()
    trainer = fit(tmp_path, FakeEvolution(), summary, steps=2)
    before = summary.as_dict()
    trainer.validate(trainer.lightning_module, loader(1), verbose=False)
    assert summary.as_dict() == before


def closing(summary, trainer, values) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    print_closing(summary, trainer, values, console)
    return console.file.getvalue().splitlines()


def test_closing_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "logs" / "a run"
    summary = RunSummary()
    trainer = fit(run, FakeEvolution(), summary)
    lines = closing(summary, trainer, {"train/loss": 5.0, "test/loss": 1.25, "test/perplexity": 1234567.0})
    assert "What the run did" in lines[0]
    assert lines[-2:] == ["test        loss 1.25, perplexity 1.2346e+06", "run folder  'logs/a run'"]


def test_closing_names_checkpoint_and_curves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(summary_module, "newest_checkpoint", lambda folder: Path(folder) / "checkpoints/x.ckpt")
    monkeypatch.setattr(summary_module, "shutil", SimpleNamespace(which=lambda name: f"/usr/bin/{name}"))
    run = tmp_path / "logs" / "run"
    summary = RunSummary()
    trainer = fit(run, FakeEvolution(), summary)
    trainer.loggers = [TensorBoardLogger(run)]
    assert closing(summary, trainer, {})[-3:] == [
        "checkpoint  logs/run/checkpoints/x.ckpt",
        "run folder  logs/run",
        "curves      tensorboard --logdir logs/run",
    ]


def test_tensorboard_of_an_environment_that_is_not_active(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "tensorboard").touch()
    monkeypatch.setattr(summary_module, "sys", SimpleNamespace(executable=str(tmp_path / ".venv" / "bin" / "python")))
    monkeypatch.setattr(summary_module, "shutil", SimpleNamespace(which=lambda name: None))
    assert summary_module._tensorboard() == ".venv/bin/tensorboard"
