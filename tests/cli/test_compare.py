"""``compare.py`` as a user types it, with real training; tests/reporting has the rest."""

from __future__ import annotations

import csv
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.programs import ROOT, Program, call, compose, launch

from evomoe.checkpointing import list_checkpoints
from evomoe.cli import quote_text
from evomoe.reporting import compare

METHODS = "experiments=[gpt_dts,gpt_switch]"
QUICK = ["callbacks=minimal", "logger=none"]


@dataclass
class Warm:
    """A training process that need not import torch first."""

    program: Program

    def poll(self) -> int | None:
        return self.program.process.exitcode

    def terminate(self) -> None:
        self.program.process.terminate()


def start_warm(overrides: list[str], log: Path, lock: int) -> Warm:
    return Warm(launch("train.py", *overrides, folder=Path.cwd()))


def test_two_experiments_with_two_seeds(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = " ".join([*tiny, *QUICK])
    setting = [METHODS, "seeds=[1,2]", "workers=1", f"overrides={overrides}"]
    by_budget = compare(compose(*map(quote_text, setting), config="compare"), ROOT, start_warm)
    for label, of_method in by_budget["steps"].items():
        assert list(of_method) == [1, 2]
        assert of_method[1].loss != of_method[2].loss
        for result in of_method.values():
            assert [row["step"] for row in result.rows] == [10, 20]
            assert result.test_loss is not None
            assert (result.end["active_experts"] <= 1) == (label == "gpt_switch" or result.end["step"] == 20)
    evolved, switch = (by_budget["steps"][label][1] for label in ("gpt_dts", "gpt_switch"))
    assert evolved.end["tokens"] == switch.end["tokens"] == 20 * 4 * 32
    assert evolved.end["training_flops"] > switch.end["training_flops"]

    output = Path("logs/comparisons/adhoc")
    assert {"table.md", "runs.csv", "loss_steps.png", "load.png", "tensorboard"} <= {p.name for p in output.iterdir()}
    with (output / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_loss_sparse"]) for row in rows if row["method"] == "gpt_dts"] == [
        result.loss for result in by_budget["steps"]["gpt_dts"].values()
    ]
    summary = json.loads((output / "gpt_dts" / "seed_1" / "history.json").read_text())
    assert summary["test"]["test/loss_sparse"] == evolved.test_loss


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["comparison=mian"], "comparison=mian does not exist; did you mean 'main'?"),
        ([], "experiments=[] is empty: expected names, as in experiments=[gpt_dts,gpt_switch], or comparison=main"),
        ([METHODS, "budgets=steps"], "budgets=steps: there is no key 'budgets'; did you mean 'budget'?"),
        (
            ["experiments=[gpt_dst,gpt_switch]", "overrides=trainer.max_steps=3 seeds=2"],
            "gpt_dst: experiment=gpt_dst does not exist; did you mean 'gpt_dts'?",
        ),
        (
            ["experiments=[gpt_swich]"],
            "gpt_swich: experiment=gpt_swich does not exist; did you mean 'gpt_switch'?",
        ),
        (
            [METHODS, "overrides=callbacks.history=null"],
            "gpt_dts: callbacks.history=null leaves nothing to compare: leave it as it is",
        ),
        (
            [METHODS, "overrides=trainer.limit_val_batches=0"],
            "gpt_dts: trainer.limit_val_batches=0 leaves no validation to compare: give at least 1",
        ),
    ],
)
def test_a_mistake_costs_one_line_and_status_2(tmp_path, arguments, message):
    done = call("compare.py", *arguments, folder=tmp_path)
    assert done.status == 2
    assert done.stderr == f"error: {message}\n"
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on_and_is_not_disturbed_by_what_it_left_behind(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    length = ["trainer.max_steps=60", "trainer.val_check_interval=25", "callbacks.checkpoint.every_n_steps=5"]
    overrides = " ".join([*tiny, *QUICK, *length])
    arguments = [METHODS, "seeds=1", f"overrides={overrides}", "refresh_seconds=1"]
    runs = [tmp_path / "logs" / "comparisons" / "adhoc" / label / "seed_1" for label in ("gpt_dts", "gpt_switch")]
    program = launch("compare.py", *arguments, folder=tmp_path)
    while not all(list_checkpoints(run) for run in runs):
        assert program.process.exitcode is None, program.read("stderr")
        program.process.join(0.05)
    os.kill(program.pid, signal.SIGKILL)
    program.process.join()
    assert not any((run / "result.json").exists() for run in runs)

    again = call("compare.py", *arguments, folder=tmp_path)
    assert again.status == 0, again.stderr
    for run in runs:
        assert [row["step"] for row in json.loads((run / "history.json").read_text())["rows"]] == [25, 50, 60]
        assert "Resuming from" in (run / "output.log").read_text()
    assert "| gpt_dts |" in again.stdout
    third = call("compare.py", *arguments, folder=tmp_path)
    assert third.stdout.startswith("nothing to run: all 2 runs are finished\n")
