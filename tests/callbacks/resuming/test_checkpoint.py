from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers.kill_and_resume import kill_and_resume
from helpers.tiny_run import TinyTask, examples, fit, weights_hash
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader

import evomoe
from evomoe.callbacks.resuming.checkpoint import SafeCheckpoint
from evomoe.checkpointing import (
    CHECKPOINT_FOLDER,
    Best,
    VerifiedCheckpointIO,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_best,
    write_best,
)
from evomoe.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning remarks on the tiny run's settings


class At(L.Callback):
    """Calls ``action`` before the given batch, counted over epochs, and draws random numbers before every one."""

    def __init__(self, batch: int, action) -> None:
        self.batch = batch
        self.action = action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.rand(3)
        if trainer.fit_loop.total_batch_idx == self.batch:
            self.action()


class CrashError(Exception):
    pass


def crash():
    raise CrashError


def steps(run_dir: Path) -> list[int]:
    return list(list_checkpoints(run_dir))


class ValLosses(TinyTask):
    """Reports given validation losses, one after the other."""

    def __init__(self, losses) -> None:
        super().__init__()
        self.losses = iter(losses)

    def on_validation_epoch_end(self):
        self.log("val/loss", torch.tensor(next(self.losses)))

    def validation_step(self, batch, batch_idx):
        pass


def fit_losses(run_dir: Path, losses, **settings) -> SafeCheckpoint:
    """Validate after every 2 optimizer steps and report ``losses``."""
    checkpoint = SafeCheckpoint(run_dir, **settings)
    trainer = L.Trainer(
        callbacks=[checkpoint],
        plugins=[VerifiedCheckpointIO()],
        max_steps=2 * len(losses),
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ValLosses(losses), DataLoader(examples(12, seed=0), 4), DataLoader(examples(4, seed=0), 4))
    return checkpoint


# When it saves and what it keeps


def test_keeps_the_newest_and_the_best(tmp_path):
    fit_losses(tmp_path, [5.0, 3.0, 4.0, 6.0, 7.0, 8.0], every_n_steps=3, keep_last=2)
    assert steps(tmp_path) == [4, 9, 12]  # the best; the newest periodic one; the end
    best = read_best(tmp_path)
    assert (best.step, best.monitor, best.value) == (4, "val/loss", 3.0)
    assert find_checkpoint(tmp_path, "best") == checkpoint_path(tmp_path, 4)
    assert find_checkpoint(tmp_path, "last") == checkpoint_path(tmp_path, 12)


def test_a_metric_may_be_maximised_and_nan_is_never_best(tmp_path):
    checkpoint = fit_losses(tmp_path, [float("nan"), 1.0, 3.0, float("inf"), 2.0], mode="max")
    assert read_best(tmp_path).step == 6
    assert checkpoint.best_model_path == str(checkpoint_path(tmp_path, 6))


def test_a_best_by_another_metric_is_not_compared(tmp_path):
    (tmp_path / CHECKPOINT_FOLDER).mkdir()
    write_best(tmp_path, Best(step=2, monitor="val/loss_sparse", value=-9.0))
    fit_losses(tmp_path, [3.0, 2.0, 4.0])
    assert read_best(tmp_path) == Best(step=4, monitor="val/loss", value=2.0)


def test_an_unlogged_metric_is_an_error_that_names_those_logged(tmp_path):
    with pytest.raises(ConfigError, match=r"monitor=val/los is not measured: expected one of .*val/loss"):
        fit_losses(tmp_path, [1.0], monitor="val/los")


def test_saves_only_between_accumulation_windows(tmp_path):
    """7 batches in windows of 3 are 3 optimizer steps an epoch: after batches 3, 6 and 7."""
    fit(tmp_path, accumulate_grad_batches=3, every_n_steps=1, keep_last=99, max_steps=6, limit_val_batches=0)
    batches = []
    for step, path in list_checkpoints(tmp_path).items():
        checkpoint = load_checkpoint(path)
        assert checkpoint["global_step"] == step
        batches.append(checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"])
    assert batches == [3, 6, 7, 10, 13, 14]


def test_a_save_waits_for_the_validation_of_its_step(tmp_path):
    """Else a callback that had judged its result would resume without it."""
    fit(tmp_path, [EarlyStopping("val/loss", patience=9)], max_steps=4, every_n_steps=2, val_check_interval=4)
    states = load_checkpoint(checkpoint_path(tmp_path, 2))["callbacks"]
    judged = next(state["best_score"] for name, state in states.items() if name.startswith("EarlyStopping"))
    assert judged.isfinite()


@pytest.mark.filterwarnings("default:val/loss")
def test_a_best_inside_an_accumulation_window_is_not_saved_but_reported(tmp_path):
    with pytest.warns(UserWarning, match="make val_check_interval a multiple of accumulate_grad_batches"):
        fit(tmp_path, val_check_interval=3, max_steps=2)
    assert read_best(tmp_path) is None
    assert steps(tmp_path) == [2]


def test_the_end_is_saved_whatever_ends_the_fit(tmp_path):
    fit(tmp_path / "steps", max_steps=5, every_n_steps=100, limit_val_batches=0)
    fit(tmp_path / "epochs", max_steps=-1, max_epochs=2, every_n_steps=100, limit_val_batches=0)
    impatient = EarlyStopping("val/loss", stopping_threshold=1e9)
    fit(tmp_path / "early", [impatient], every_n_steps=100)
    impatient = EarlyStopping("train/loss", stopping_threshold=1e9, check_on_train_epoch_end=True)
    fit(tmp_path / "early train", [impatient], every_n_steps=100, limit_val_batches=0)
    ends = [steps(tmp_path / name) for name in ("steps", "epochs", "early", "early train")]
    assert ends == [[5], [8], [4], [4]]


class StopInWindow(L.Callback):
    """Asks to stop, as a time limit may, after the first batch of the second epoch, and so of a window."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop |= trainer.fit_loop.total_batch_idx == 7


STOPS = {
    "after a batch": (StopInWindow(), {}, 9),
    "after a validation": (EarlyStopping("val/loss", stopping_threshold=1e9), {"val_check_interval": 3}, 4),
}


@pytest.mark.parametrize(("stop", "settings", "batches"), STOPS.values(), ids=STOPS)
def test_a_stop_inside_an_accumulation_window_waits_for_its_end(tmp_path, stop, settings, batches):
    """So that the run goes on from there bit for bit."""
    whole, _ = fit(tmp_path / "whole", **settings)
    _, trainer = fit(tmp_path / "parts", [stop], every_n_steps=100, keep_last=99, **settings)
    path = list_checkpoints(tmp_path / "parts")[trainer.global_step]
    assert load_checkpoint(path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == batches
    task, _ = fit(tmp_path / "parts", resume="auto", **settings)
    assert weights_hash(task.state_dict()) == weights_hash(whole.state_dict())


def test_a_crash_and_a_trial_save_nothing(tmp_path):
    with pytest.raises(CrashError):
        fit(tmp_path, [At(9, crash)], every_n_steps=3, limit_val_batches=0)
    assert steps(tmp_path) == [3]
    fit(tmp_path / "trial", fast_dev_run=True)
    assert steps(tmp_path / "trial") == []


def test_the_configuration_travels_with_the_weights(tmp_path):
    config = {"model": {"width": 16, "rates": [0.5, 1e-3]}, "name": None}
    fit(tmp_path, max_steps=1, config=config)
    checkpoint = load_checkpoint(checkpoint_path(tmp_path, 1))
    assert checkpoint["evomoe"] == {"version": evomoe.__version__, "config": config}


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        ("val/loss_sparse", "min"),
        ("val/perplexity", "min"),
        ("val/bits_per_byte", "min"),
        ("val_moe/block_1/dropped", "min"),
        ("val/bleu", "max"),
        ("val/accuracy_sparse", "max"),
    ],
)
def test_the_name_of_a_metric_says_what_is_better(tmp_path, monitor, mode):
    assert SafeCheckpoint(tmp_path, monitor=monitor).mode == mode
    assert SafeCheckpoint(tmp_path, monitor=monitor, mode="min").mode == "min"


# How a run goes on

SETTINGS = {
    "accumulation": {"accumulate_grad_batches": 2, "every_n_steps": 3},
    "every step": {"accumulate_grad_batches": 1, "every_n_steps": 1},
    "validation within epochs": {"accumulate_grad_batches": 2, "every_n_steps": 3, "val_check_interval": 2},
    "epochs": {"accumulate_grad_batches": 2, "every_n_steps": 1, "max_steps": -1, "max_epochs": 4},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_crashed_run_goes_on_bit_for_bit(tmp_path, settings):
    """Crashes inside a window, on the last batch of an epoch and on the first one of the next."""
    whole, _ = fit(tmp_path / "whole", [At(-1, crash)], **settings)
    expected = weights_hash(whole.state_dict())
    for batch in (6, 7, 8, 13):
        run_dir = tmp_path / str(batch)
        with pytest.raises(CrashError):
            fit(run_dir, [At(batch, crash)], **settings)
        assert steps(run_dir)
        task, _ = fit(run_dir, [At(-1, crash)], resume="auto", **settings)
        assert weights_hash(task.state_dict()) == expected, f"crash before batch {batch}"
        assert read_best(run_dir) == read_best(tmp_path / "whole")


def test_a_finished_run_can_be_prolonged_bit_for_bit(tmp_path):
    whole, _ = fit(tmp_path / "whole", max_steps=14)
    fit(tmp_path / "parts", max_steps=7)
    task, _ = fit(tmp_path / "parts", resume="auto", max_steps=14)
    assert weights_hash(task.state_dict()) == weights_hash(whole.state_dict())


def test_a_damaged_newest_checkpoint_costs_only_time(tmp_path):
    whole, _ = fit(tmp_path / "whole", [At(-1, crash)])
    run_dir = tmp_path / "damaged"
    with pytest.raises(CrashError):
        fit(run_dir, [At(14, crash)])
    assert steps(run_dir) == [6, 8]
    os.truncate(checkpoint_path(run_dir, 8), 1000)
    task, _ = fit(run_dir, [At(-1, crash)], resume="auto")
    assert weights_hash(task.state_dict()) == weights_hash(whole.state_dict())


def test_a_used_run_folder_is_refused(tmp_path):
    fit(tmp_path, max_steps=6, every_n_steps=3)
    with pytest.raises(ConfigError, match=r"already holds step_00000006\.ckpt, beyond the step 0 that this run starts"):
        fit(tmp_path)
    assert steps(tmp_path) == [4, 6]


def test_arguments_out_of_range_are_refused(tmp_path):
    for arguments, name in [({"every_n_steps": 0}, "every_n_steps=0"), ({"keep_last": 0}, "keep_last=0")]:
        with pytest.raises(ConfigError, match=name):
            SafeCheckpoint(tmp_path, **arguments)
    with pytest.raises(ConfigError, match="mode='least'"):
        SafeCheckpoint(tmp_path, mode="least")
    trainer = L.Trainer(callbacks=[SafeCheckpoint(tmp_path)], accelerator="cpu", logger=False, max_steps=1)
    with pytest.raises(ConfigError, match="VerifiedCheckpointIO"):
        trainer.fit(TinyTask(), DataLoader(examples(4, seed=0)))


# What it does on a signal


def test_a_signal_before_a_validation_stops_after_it(tmp_path):
    """Else the resumed run would lack its result."""
    whole, parts = ([EarlyStopping("val/loss", patience=99)] for _ in range(2))
    settings = {"max_steps": 6, "every_n_steps": 99, "val_check_interval": 4, "accumulate_grad_batches": 2}
    fit(tmp_path / "whole", [*whole, At(-1, crash)], **settings)
    with pytest.raises(SystemExit) as stopped:  # the validation follows the fourth batch
        fit(tmp_path / "parts", [*parts, At(3, lambda: os.kill(os.getpid(), signal.SIGTERM))], **settings)
    assert stopped.value.code == 143
    assert steps(tmp_path / "parts") == [2]
    assert read_best(tmp_path / "parts").step == 2
    fit(tmp_path / "parts", [*parts, At(-1, crash)], resume="auto", **settings)
    assert read_best(tmp_path / "parts") == read_best(tmp_path / "whole")
    assert parts[0].state_dict().keys() == whole[0].state_dict().keys()
    assert torch.equal(parts[0].best_score, whole[0].best_score)


def test_a_best_that_could_not_be_marked_is_marked_by_the_resumed_run(tmp_path):
    """As when the process is killed between the checkpoint and its mark."""
    fit_losses(tmp_path, [5.0, 3.0, 4.0], keep_last=9)
    best = read_best(tmp_path)
    (tmp_path / CHECKPOINT_FOLDER / "best.json").unlink()
    checkpoint = SafeCheckpoint(tmp_path)
    checkpoint.load_state_dict(load_checkpoint(checkpoint_path(tmp_path, 6))["callbacks"][checkpoint.state_key])
    trainer = SimpleNamespace(global_step=6, is_global_zero=True)
    checkpoint.on_train_start(trainer, None)
    checkpoint.on_exception(trainer, None, Exception())  # gives the signals back
    assert read_best(tmp_path) == best == Best(step=4, monitor="val/loss", value=3.0)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_end_of_the_window_and_stops(tmp_path, signum, status, capfd):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    whole, _ = fit(tmp_path / "whole", [At(-1, crash)])
    with pytest.raises(SystemExit) as stopped:  # batch 9 opens the second window of the second epoch
        fit(tmp_path / "parts", [At(9, lambda: os.kill(os.getpid(), signum))])
    assert stopped.value.code == status
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert steps(tmp_path / "parts")[-1] == 6
    saved = load_checkpoint(checkpoint_path(tmp_path / "parts", 6))
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 11
    said = capfd.readouterr().err.strip().splitlines()
    path = checkpoint_path(tmp_path / "parts", 6)
    name = signal.Signals(signum).name
    assert said[-1] == f"Stopped by {name} after optimizer step 6; to go on, add ckpt_path={path} to the command"
    task, _ = fit(tmp_path / "parts", [At(-1, crash)], resume="auto")
    assert weights_hash(task.state_dict()) == weights_hash(whole.state_dict())


def test_handlers_are_given_back_after_a_fit_and_after_a_crash(tmp_path, monkeypatch):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    ends = []  # a module's hooks follow those of the callbacks; Lightning itself resets handlers only later
    monkeypatch.setattr(TinyTask, "on_train_end", lambda self: ends.append(signal.getsignal(signal.SIGINT)))
    fit(tmp_path / "done", max_steps=1)
    assert ends == [handlers[1]]
    with pytest.raises(CrashError):
        fit(tmp_path / "crashed", [At(1, crash)])
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers


SCRIPT = [sys.executable, str(Path(__file__).parents[2] / "helpers" / "tiny_run.py")]


class Process:
    """The tiny run in a session of its own, stopped before a batch until told to go on."""

    def __init__(self, run_dir: Path, pause_at: int, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*SCRIPT, str(run_dir), "--pause-at", str(pause_at), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.paused_pid = int(self.until(self.process.stdout, "paused (.*)")[1])

    def until(self, stream, pattern: str) -> re.Match:
        for line in stream:
            if match := re.match(pattern, line):
                return match
        raise AssertionError(f"{pattern!r} was never said")

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate("go on\n", timeout=120)
        return self.process.returncode, errors


def run_script(run_dir: Path, *arguments: str) -> str:
    """Run to the end; the hash of the weights."""
    ended = subprocess.run([*SCRIPT, str(run_dir), *arguments], capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    return re.search("weights (.*)", ended.stdout)[1]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_process_group_spares_the_data_workers(tmp_path, signum, status):
    whole, _ = fit(tmp_path / "whole")
    paused = Process(tmp_path / "parts", 2, "--workers", "1")
    os.killpg(paused.process.pid, signum)
    assert paused.end()[0] == status
    assert steps(tmp_path / "parts") == [2]
    task, _ = fit(tmp_path / "parts", resume="auto")
    assert weights_hash(task.state_dict()) == weights_hash(whole.state_dict())


@pytest.mark.slow
def test_a_second_signal_stops_at_once_and_saves_nothing(tmp_path):
    paused = Process(tmp_path, 2)
    paused.process.send_signal(signal.SIGINT)
    paused.until(paused.process.stderr, "SIGINT: saving after the present optimizer step; repeat it to stop at once")
    paused.process.send_signal(signal.SIGINT)
    assert paused.process.wait(timeout=60) == 130
    assert steps(tmp_path) == []


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_with_the_same_weights(tmp_path):
    arguments = ("--max-steps", "240")  # longer than three lives of the window below, on a fast machine too
    whole, _ = fit(tmp_path / "whole", max_steps=240)
    run_dir = tmp_path / "killed"
    status, output, kills = kill_and_resume(
        [*SCRIPT, str(run_dir), *arguments, "--resume", "auto"], run_dir / "checkpoints", kills=3, window=0.3
    )
    assert (status, kills) == (0, 3)
    assert output.strip().endswith(weights_hash(whole.state_dict()))


@pytest.mark.slow
def test_two_ranks_stop_together_and_go_on_bit_for_bit(tmp_path):
    """Only rank 1 is signalled, in the first half of a window; both must stop after its second half."""
    expected = run_script(tmp_path / "whole", "--devices", "2")
    paused = Process(tmp_path / "parts", 2, "--devices", "2", "--pause-rank", "1")
    assert paused.paused_pid != paused.process.pid
    os.kill(paused.paused_pid, signal.SIGTERM)
    status, errors = paused.end()
    assert status == 143
    assert errors.count("Stopped by SIGTERM after optimizer step 2") == 1
    assert steps(tmp_path / "parts") == [2]
    ranks = load_checkpoint(checkpoint_path(tmp_path / "parts", 2))["callbacks"]["RandomState"]["ranks"]
    assert len(ranks) == 2
    assert not torch.equal(ranks[0]["torch"], ranks[1]["torch"])
    assert run_script(tmp_path / "parts", "--devices", "2", "--resume", "auto") == expected
