"""The entry points as a user types them: streams, exit statuses, signals, folders."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.programs import PATIENCE, ROOT, Program, call, compose, equal, launch, load, tiny_overrides

from evomoe.checkpointing import list_checkpoints
from evomoe.evaluation import evaluate


@pytest.fixture(scope="module")
def workplace(tiny, tmp_path_factory) -> Path:
    """A folder in which a user has trained one run, ``first``."""
    folder = tmp_path_factory.mktemp("workplace")
    done = call("train.py", "experiment=gpt_dts", *tiny, "run_name=first", folder=folder)
    assert done.status == 0, done.stderr
    (folder / "train.txt").write_text(done.stdout)
    (folder / "train.log").write_text(done.stderr)
    return folder


def test_a_run_says_what_it_did_and_where_it_lies(workplace):
    out, log = (workplace / "train.txt").read_text(), (workplace / "train.log").read_text()
    assert "What the run did" in out
    assert [f"{phase} " in out for phase in ("diversify", "sparsify", "hardened")] == [True] * 3
    assert "checkpoint  logs/gpt_dts/first/checkpoints/step_00000020.ckpt" in out
    assert re.search(r"^test        loss \d", out, re.MULTILINE)
    assert "Step 2: one expert became 4 in 1 layers" in log
    assert "Warning" not in log
    run = workplace / "logs" / "gpt_dts" / "first"
    assert {"checkpoints", "tensorboard", ".hydra", "summary.json", "train.log"} <= {
        path.name for path in run.iterdir()
    }
    told = [line.partition(" INFO: ")[2] for line in (run / "train.log").read_text().splitlines()]
    assert [f"INFO: {line}" for line in told] == log.splitlines()
    assert [phase["steps"] for phase in json.loads((run / "summary.json").read_text())["phases"]] == [2, 8, 10]


def test_eval_measures_the_last_run(workplace):
    done = call("eval.py", "ckpt_path=last", "split=test", "limit_batches=2", folder=workplace)
    assert done.status == 0, done.stderr
    assert "logs/gpt_dts/first/checkpoints/step_00000020.ckpt" in done.stdout.splitlines()
    losses = dict(re.findall(r"(test/[\w_]+)\s*│\s*([\d.]+)", done.stdout))
    trained = dict(
        re.findall(r"(\w+) (\d[\d.]+)", re.search(r"^test .*$", (workplace / "train.txt").read_text(), re.M)[0])
    )
    assert float(losses["test/loss"]) == pytest.approx(float(trained["loss"]), abs=1e-3)
    assert not (workplace / "outputs").exists()


PROMPTS = ["def f(x): return [x, ", "key: value", "say \"hi\" or 'bye'", "a=b,c={d} ", "$HOME ${x} \\"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_generate_takes_prose_as_typed(workplace, prompt):
    done = call("generate.py", f"prompt={prompt}", "max_new_tokens=3", folder=workplace)
    assert done.status == 0, done.stderr
    assert prompt in done.stdout


def test_generate_is_reproducible_and_shows_experts(workplace):
    arguments = ["prompt=The value", "seed=4", "max_new_tokens=5", "show_experts=true", "ckpt_path=logs/gpt_dts/first"]
    first, second = (call("generate.py", *arguments, folder=workplace) for _ in range(2))
    assert first.status == 0, first.stderr
    assert first.stdout == second.stdout
    assert "block_1" in first.stdout


REFUSED = {
    "train.py": [
        ["experiment=gpt_dst"],
        ["trainer.max_step=3"],
        ["seed=one"],
        ["data.train=nowhere.txt"],
        ["evolution.harden=1"],
        ["data=hub"],
        ["trainer.max_steps=0"],
        ["-m", "seed=1,2", "trainer.max_step=3"],
        ["run"],
        ["--experiment", "gpt_dts"],
        ["callbacks.checkpoint.every_n_steps=0", "run_name=first"],
    ],
    "eval.py": [["split=train"], ["ckpt_path=nowhere.ckpt"], ["overrides=data.test=it's.txt"]],
    "generate.py": [
        ["ckpt_path=last"],
        ["prompt="],
        ["prompt=a", "temperature=-1"],
        ["prompt=a", "top_k=abc"],
        ["prompt=a", "max_new_tokens=1.5"],
    ],
}


@pytest.mark.parametrize(
    ("script", "arguments"), [(script, arguments) for script, many in REFUSED.items() for arguments in many]
)
def test_a_mistake_costs_one_line_and_status_2(workplace, tiny, script, arguments):
    before = kept(workplace)
    setting = ["experiment=gpt_dts", *tiny] if script == "train.py" and "experiment=gpt_dst" not in arguments else []
    done = call(script, *setting, *arguments, folder=workplace)
    assert done.status == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert done.stderr.rstrip().endswith(errors[0])
    assert "Traceback" not in done.stderr
    assert kept(workplace) == before


def kept(workplace: Path) -> dict[Path, bytes]:
    """Checkpoints, and the configurations of the runs that have one."""
    runs = {path.parent.parent for path in (workplace / "logs").rglob("*.ckpt")}
    return {
        path: path.read_bytes()
        for run in runs
        for path in (*run.glob("checkpoints/*.ckpt"), *run.glob(".hydra/*.yaml"))
    }


def test_a_loss_that_is_not_finite_has_status_3(tiny, tmp_path):
    arguments = ["run_name=nan", "task.optimization.learning_rate=1e30", "callbacks.checkpoint.every_n_steps=1"]
    done = call("train.py", "experiment=gpt_dts", *tiny, *arguments, folder=tmp_path)
    assert done.status == 3
    assert done.stderr.splitlines()[-1].startswith("error: optimizer step 2, epoch 0, batch 1: the loss is nan")
    assert "Traceback" not in done.stderr
    weights = load(tmp_path / "logs" / "gpt_dts" / "nan")["state_dict"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_used_run_folder_is_not_overwritten(workplace, tiny):
    done = call("train.py", "experiment=gpt_dts", *tiny, "run_name=first", folder=workplace)
    assert done.status == 2
    assert "already holds step_00000020.ckpt" in done.stderr


def test_a_run_goes_on_from_the_last_one_under_another_name(workplace, tiny):
    more = ["ckpt_path=last", "run_name=longer", "trainer.max_steps=24", "test=false"]
    done = call("train.py", "experiment=gpt_dts", *tiny, *more, folder=workplace)
    assert done.status == 0, done.stderr
    assert "Resuming from logs/gpt_dts/first/checkpoints/step_00000020.ckpt" in done.stderr
    run = workplace / "logs" / "gpt_dts" / "longer"
    assert list(list_checkpoints(run)) == [24]
    for text in (done.stderr, (run / "train.log").read_text()):
        assert re.search(
            r"WARNING: The checkpoint was trained under another plan \(.*\), which .* would keep\.$", text, re.MULTILINE
        )


def test_a_run_that_is_done_says_so(workplace, tiny):
    done = call("train.py", "experiment=gpt_dts", *tiny, "run_name=first", "resume=auto", folder=workplace)
    assert done.status == 0, done.stderr
    assert "No step was left to train after the 20 of the checkpoint\n" in done.stderr


# -- signals ----------------------------------------------------------------------------------------------------------


def when(condition, program: Program) -> None:
    """Wait until a program has come to a point."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if program.process.exitcode is not None or time.monotonic() > end:
            pytest.fail(f"never came about:\n{program.read('stderr')}")
        program.process.join(0.01)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_a_stopped_run_saves_says_how_to_go_on_and_does(tiny, tmp_path, signum, status):
    run = tmp_path / "logs" / "gpt_dts" / "stopped"
    command = ["experiment=gpt_dts", *tiny, "callbacks=minimal", "logger=none", "test=false", "run_name=stopped"]
    long = ["trainer.max_steps=400", "callbacks.checkpoint.every_n_steps=3", "trainer.val_check_interval=400"]
    program = launch("train.py", *command, *long, folder=tmp_path)
    when(lambda: list_checkpoints(run), program)
    os.kill(program.pid, signum)
    done = program.wait()
    assert done.status == status
    assert "Traceback" not in done.stderr
    last = max(list_checkpoints(run))
    assert f"Stopped by {signum.name} after optimizer step {last}; to go on, add run_name=" in done.stderr
    step = torch.load(list_checkpoints(run)[last], weights_only=True)["global_step"]
    assert step == last < 400

    (way_on,) = re.findall(r"add run_name=stopped (resume=auto) to the command", done.stderr)
    more = [f"trainer.max_steps={last + 2}" if part == "trainer.max_steps=400" else part for part in long]
    fixed = ["evolution.diversify=1", "evolution.harden=2", "evolution.temperature.length=1", "evolution.noise=null"]
    resumed = call("train.py", *command, *more, *fixed, way_on, folder=tmp_path)
    assert resumed.status == 0, resumed.stderr
    assert max(list_checkpoints(run)) == last + 2


def test_ctrl_c_before_the_first_step_is_no_traceback(tmp_path, corpus, tiny):
    (tmp_path / "large.txt").write_text(corpus.read_text() * 40)  # takes a while to encode
    arguments = [
        f"data.train={tmp_path / 'large.txt'}",
        "data.vocab_size=2000",
        f"paths.cache_dir={tmp_path / 'cache'}",
    ]
    program = launch("train.py", "experiment=gpt_dts", *tiny, *arguments, folder=tmp_path)
    when(lambda: any((tmp_path / "cache").glob("*")), program)
    os.kill(program.pid, signal.SIGINT)
    done = program.wait()
    assert done.status == 130
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "cache").iterdir()) == []  # no half-built corpus


# -- many runs --------------------------------------------------------------------------------------------------------


def test_a_multirun_has_a_folder_for_each_job(tiny, tmp_path):
    jobs = ["seed=1,2", "experiment_name=sweep", "trainer.max_steps=4", "callbacks=minimal", "logger=none", "-m"]
    done = call("train.py", "experiment=gpt_dts", *tiny, *jobs, folder=tmp_path)
    assert done.status == 0, done.stderr
    (sweep,) = (tmp_path / "logs" / "sweep").iterdir()
    assert sweep.name.endswith("_multirun")
    first, second = (load(sweep / job) for job in ("0", "1"))
    assert [state["evomoe"]["config"]["seed"] for state in (first, second)] == [1, 2]
    assert not equal(first["state_dict"], second["state_dict"])
    assert not list((sweep / "0").rglob("*00000010.ckpt"))


def test_a_job_that_cannot_be_holds_up_no_other(tiny, tmp_path):
    jobs = ["model.num_heads=2,3,4", "experiment_name=sweep", "trainer.max_steps=4", "callbacks=minimal", "logger=none"]
    done = call("train.py", "experiment=gpt_dts", *tiny, *jobs, "test=false", "-m", folder=tmp_path)
    assert done.status == 2
    assert "Traceback" not in done.stderr
    assert re.search(r"^error: job 1 \(.*model.num_heads=3.*\): .*num_heads=3", done.stderr, re.MULTILINE)
    assert done.stderr.splitlines()[-1] == "error: job 1 failed, as said above"
    (sweep,) = (tmp_path / "logs" / "sweep").iterdir()
    assert [bool(list((sweep / job).rglob("*.ckpt"))) for job in "012"] == [True, False, True]


@pytest.mark.slow
def test_two_processes_translate_what_one_would(corpus, tmp_path):
    """The test split, shared out by two processes that write sentences of different lengths, and evaluated by one."""
    tiny = tiny_overrides(corpus, tmp_path / "cache", "mt_dts")
    parallel = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "logger=none", "run_name=two"]
    whole = ["trainer.limit_test_batches=1.0", "trainer.limit_val_batches=1.0", "data.eval_batch_tokens=256"]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "experiment=mt_dts", *tiny, *parallel, *whole],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "logs" / "mt_dts" / "two"
    values = evaluate(compose(f"ckpt_path={run_dir}", config="eval"))
    shown = re.search(r"^test +(loss .*)$", done.stdout, re.MULTILINE)
    assert shown
    found = dict(part.split(" ") for part in shown[1].split(", "))
    for name in ("loss", "bleu", "chrf", "exact_match"):
        assert float(found[name]) == pytest.approx(values[f"test/{name}"], rel=1e-3, abs=1e-6), name
    text = (run_dir / "translations.txt").read_text()
    assert text.count("\nH ") == text.count("\nS ") > 100


@pytest.mark.slow
def test_two_processes_go_through_all_phases_of_two_jobs_and_agree(tiny, tmp_path):
    """Data parallel inside a multirun, as a real command: its processes start each other by their command line."""
    parallel = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "logger=csv", "callbacks.samples=null"]
    jobs = ["-m", "seed=1,2", "experiment_name=sweep", "model.dropout=0.1", "trainer.accumulate_grad_batches=2"]
    keep = ["+callbacks.keep._target_=helpers.programs.KeepWeights"]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "experiment=gpt_dts", *tiny, *parallel, *jobs, *keep],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "logs" / "sweep").iterdir()
    ends = []
    for job in ("0", "1"):
        first, second = (torch.load(sweep / job / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1))
        assert equal(first, second)
        assert equal(first, load(sweep / job)["state_dict"])
        ends.append(first)
        header, *rows = (sweep / job / "csv" / "metrics.csv").read_text().splitlines()
        column = header.split(",").index("evolution/phase")
        phases = [row.split(",")[column] for row in rows]
        assert [float(phase) for phase in phases if phase] == [0] * 2 + [1] * 8 + [2] * 10
    assert not equal(*ends)
