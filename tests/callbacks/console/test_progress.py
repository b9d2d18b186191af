from __future__ import annotations

import io
import itertools
import logging
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.phased_run import FakeEvolution, fit, loader
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console

from evomoe.callbacks.console import progress as progress_module
from evomoe.callbacks.console.progress import EvolutionProgress, Pace
from evomoe.callbacks.console.status import shorten


class Clock:
    """Stands in for the time module: monotonic() is what the test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, _environ={})


def drawn(console: Console) -> str:
    """What was written to a fake terminal, without its control codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


class TestPace:
    def test_constant_speed(self, clock):
        pace = Pace(step=0, phase="train")
        clock.now += 20
        pace.update(10, "train")
        assert pace.elapsed == 20
        assert pace.left(10, total=100) == pytest.approx(90 * 2)

    def test_unknown_before_the_first_step(self, clock):
        pace = Pace(step=7, phase="train")
        clock.now += 20
        pace.update(7, "train")
        assert pace.left(7, total=100) is None

    def test_steps_before_a_resume_took_no_time(self, clock):
        pace = Pace(step=500, phase="train")
        clock.now += 10
        pace.update(510, "train")
        assert pace.left(510, total=600) == pytest.approx(90)

    def test_new_phase_forgets_the_old_speed(self, clock):
        pace = Pace(step=0, phase="diversify")
        for step in range(1, 11):
            clock.now += 0.1
            pace.update(step, "diversify")
        assert pace.left(10, total=100) == pytest.approx(9)
        for step in (11, 12, 13):
            clock.now += 1
            pace.update(step, "sparsify")
        assert pace.left(13, total=100) == pytest.approx(87)

    def test_window_forgets_slow_minutes(self, clock):
        pace = Pace(step=0, phase="train")
        for step in range(1, 11):
            clock.now += 10
            pace.update(step, "train")
        for step in range(11, 51):
            clock.now += 1
            pace.update(step, "train")
        assert pace.left(50, total=100) == pytest.approx(50)

    def test_validation_counts_by_its_share(self, clock):
        pace = Pace(step=0, phase="train")
        clock.now += 10
        pace.pause()
        clock.now += 5
        pace.resume()
        pace.update(10, "train")
        assert pace.elapsed == 15
        assert pace.left(10, total=30) == pytest.approx(20 * (1 + 0.5))


class TestLines:
    """Where stdout is no terminal."""

    def test_one_line_per_step(self, tmp_path, capsys):
        fit(tmp_path, FakeEvolution(), EvolutionProgress(refresh_seconds=0))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
        assert [line.partition(", elapsed")[0] for line in lines] == [
            "step 1/6 (17%), diversify, loss 10.000, active experts 1.00, 18.2k tok/s",
            "step 2/6 (33%), diversify, loss 9.000, active experts 1.00, 18.2k tok/s",
            "step 3/6 (50%), sparsify, loss 8.000, val loss 2.000, temperature 1.50, active experts 3.00, 18.2k tok/s",
            "step 4/6 (67%), sparsify, loss 7.000, val loss 2.000, temperature 1.25, active experts 3.00, 18.2k tok/s",
            "step 5/6 (83%), hardened, loss 6.000, val loss 4.000, temperature 1.00, active experts 1.00, 18.2k tok/s",
            "step 6/6 (100%), hardened, loss 5.000, val loss 4.000, temperature 0.75, active experts 1.00, 18.2k tok/s",
        ]
        assert lines[-1].endswith("left 0:00:00")

    def test_a_temperature_without_decay_is_left_out(self, tmp_path, capsys):
        evolution = FakeEvolution()
        evolution.temperature = None
        fit(tmp_path, evolution, EvolutionProgress(refresh_seconds=0))
        assert "temperature" not in capsys.readouterr().out

    def test_evaluation_lines(self, tmp_path, capsys):
        trainer = fit(tmp_path, EvolutionProgress(refresh_seconds=0), steps=2)
        assert "validation 1/2, left 0:00:00\nvalidation 2/2\n" in capsys.readouterr().out
        trainer.test(dataloaders=loader(3), model=trainer.lightning_module, verbose=False)
        lines = capsys.readouterr().out.splitlines()
        assert lines == ["test 1/3, left 0:00:00", "test 2/3, left 0:00:00", "test 3/3"]

    def test_a_run_without_evolution(self, tmp_path, capsys):
        fit(tmp_path, EvolutionProgress(refresh_seconds=0), steps=1)
        assert capsys.readouterr().out.startswith("step 1/1 (100%), train, loss 10.000, active experts 1.00, 18.2k")

    def test_no_more_often_than_asked(self, tmp_path, capsys, clock, monkeypatch):
        reads = []
        real = progress_module.read_status
        monkeypatch.setattr(progress_module, "read_status", lambda *given: reads.append(given) or real(*given))
        ticks = itertools.count()
        monkeypatch.setattr(clock, "monotonic", lambda: next(ticks) / 10)
        fit(tmp_path, EvolutionProgress(refresh_seconds=1e6), steps=30, limit_val_batches=0)
        assert len(reads) == 1  # the last step: the metrics of no other were fetched
        assert capsys.readouterr().out.startswith("step 30/30")

    def test_total_counts_optimizer_steps(self, tmp_path, capsys):
        fit(
            tmp_path,
            EvolutionProgress(refresh_seconds=0),
            steps=-1,
            max_epochs=2,
            accumulate_grad_batches=3,
            limit_val_batches=0,
        )
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1].startswith("step 4/4 (100%)")

    def test_resumed_run_goes_on_counting(self, tmp_path, capsys):
        fit(tmp_path, FakeEvolution(), steps=4).save_checkpoint(tmp_path / "four.ckpt")
        capsys.readouterr()
        fit(tmp_path, FakeEvolution(), EvolutionProgress(refresh_seconds=0), steps=6, resume=tmp_path / "four.ckpt")
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
        assert [line[:8] for line in lines] == ["step 5/6", "step 6/6"]

    def test_silent_when_disabled(self, tmp_path, capsys):
        bar = EvolutionProgress(refresh_seconds=0)
        bar.disable()
        fit(tmp_path, bar)
        assert capsys.readouterr().out == ""


def test_active_experts_are_those_of_the_last_batch():
    """What was logged last may be of the phase before."""
    trainer = SimpleNamespace(callbacks=[], callback_metrics={"moe/active_experts": torch.tensor(9.0)})
    routings = [SimpleNamespace(active_experts=torch.tensor(number)) for number in (1.0, 2.0)]
    assert progress_module.read_status(trainer, {"routings": routings}).active_experts == 1.5
    assert progress_module.read_status(trainer, {"routings": []}).active_experts is None


class TestBar:
    """In a terminal."""

    def test_is_the_only_one(self, tmp_path):
        bar = EvolutionProgress(console=terminal())
        trainer = fit(tmp_path, bar, steps=1)
        assert [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)] == [bar]

    def test_last_frame_is_the_whole_run(self, tmp_path):
        console = terminal()
        fit(tmp_path, FakeEvolution(), EvolutionProgress(console=console))
        bar, status = drawn(console).rstrip().splitlines()[-2:]
        assert re.fullmatch(r"hardened ━+ 6/6 elapsed 0:\d\d:\d\d, left 0:00:00", bar.strip())
        words = status.strip()
        assert words == "loss 5.000  val loss 4.000  temperature 0.75  active experts 1.00  18.2k tok/s"

    def test_fits_a_narrow_terminal(self, tmp_path):
        console = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={})
        fit(tmp_path, FakeEvolution(), EvolutionProgress(console=console))
        assert "18.2k tok/s" in drawn(console)
        assert max(map(len, re.split(r"[\r\n]+", drawn(console)))) <= 80

    def test_second_bar_lasts_as_long_as_the_evaluation(self, tmp_path):
        console = terminal()
        trainer = fit(tmp_path, EvolutionProgress(console=console), num_sanity_val_steps=1)
        text = drawn(console)
        assert re.search(r"sanity check ━+ 0/1", text)
        assert re.search(r"validation ━+ 0/2", text)
        last_frame = text.rstrip().splitlines()[-2:]
        assert not any("validation" in line for line in last_frame)
        trainer.test(trainer.lightning_module, loader(3), verbose=False)
        assert re.search(r"test ━+ 0/3", drawn(console))

    def test_redraws_four_times_a_second(self, tmp_path, clock, monkeypatch):
        console = terminal()
        ticks = itertools.count()
        monkeypatch.setattr(clock, "monotonic", lambda: next(ticks) * 1e-3)
        fit(tmp_path, EvolutionProgress(console=console), steps=40, limit_val_batches=0, data=loader(40))
        # 40 steps in well under a quarter of a second: the frame of the start, the first step, the last one.
        assert set(re.findall(r"(\d+)/40", drawn(console))) == {"0", "1", "40"}

    def test_log_lines_go_above_the_bar(self, tmp_path):
        console = terminal()
        log = logging.getLogger("test_progress")
        handler = logging.StreamHandler(sys.stdout)
        log.addHandler(handler)

        class Spawned(FakeEvolution):
            def on_train_batch_start(self, trainer, *args):
                super().on_train_batch_start(trainer, *args)
                if trainer.global_step == 2 and args:
                    log.warning("one expert became three")

        stream = handler.stream
        try:
            fit(tmp_path, Spawned(), EvolutionProgress(console=console))
        finally:
            log.removeHandler(handler)
        assert "one expert became three" in [line.strip() for line in re.split(r"[\r\n]+", drawn(console))]
        assert handler.stream is stream

    def test_gives_the_terminal_back_after_an_error(self, tmp_path):
        stdout = sys.stdout

        class Fails(FakeEvolution):
            def on_train_batch_end(self, trainer, *_):
                raise RuntimeError("no")

        with pytest.raises(RuntimeError, match="no"):
            fit(tmp_path, Fails(), EvolutionProgress(console=terminal()))
        assert sys.stdout is stdout


@pytest.mark.parametrize(
    ("number", "words"),
    [(0.5, "0.5"), (842, "842"), (18234, "18.2k"), (1_240_000, "1.24M"), (3.5e9, "3.5G"), (2e12, "2T")],
)
def test_shorten(number, words):
    assert shorten(number) == words
