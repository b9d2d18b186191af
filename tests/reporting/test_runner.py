"""Processes that end, fail, are stopped and are left behind; what they would train is of no matter here."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from pathlib import Path

import pytest
from helpers import fake_training

from evomoe.reporting.plan import Run
from evomoe.reporting.results import is_finished, read_result
from evomoe.reporting.runner import LOCK_FILE, LOG_FILE, Pool


class Said(list[str]):
    """What a pool says; acts when it says certain words for the first time."""

    def __init__(self, words: str = "", act=None) -> None:
        self.words, self.act = words, act

    def __call__(self, line: str) -> None:
        self.append(line)
        if self.act and self.words in line:
            act, self.act = self.act, None
            act()


def runs(folder: Path, *names: str, **extra: str) -> list[Run]:
    """A run for each name, with the overrides that ``extra`` has for it."""
    return [
        Run(name, 1, folder / name / "seed_1", ("experiment=x", *extra.get(name, "").split(), "seed=1"))
        for name in names
    ]


def lives(run: Run) -> list[int]:
    return [int(line) for line in (run.folder / fake_training.LIVES).read_text().split()]


def pool(said: Said, workers: int = 2, start=fake_training.start) -> Pool:
    return Pool(start, workers, refresh_seconds=0, say=said)


def test_every_run_is_run_once_and_no_more_than_the_workers_at_a_time(tmp_path):
    alive: list = []
    counts = []

    def start(*arguments):
        alive.append(fake_training.start(*arguments))
        counts.append(sum(child.poll() is None for child in alive))
        return alive[-1]

    said = Said()
    five = runs(tmp_path, *"abcde")
    assert pool(said, workers=2, start=start).run(five) == []
    assert all(is_finished(run) and len(lives(run)) == 1 for run in five)
    assert max(counts) <= 2
    assert read_result(five[0]).loss == pytest.approx(6.1)
    assert f"a seed 1: started in {tmp_path / 'a' / 'seed_1'}" in said
    assert "a seed 1: done in 0:00:00, val loss 6.1000 after 4 steps" in said

    said.clear()
    assert pool(said).run(five) == []
    assert said == []
    assert all(len(lives(run)) == 1 for run in five)


def test_a_failing_run_is_named_with_its_last_words_and_the_others_go_on(tmp_path):
    said = Said()
    three = runs(tmp_path, "a", "b", "c", a="+fail=true", b="+mute=true")
    first, second = sorted(pool(said, workers=1).run(three), key=lambda failure: failure.run.label)
    assert (first.run, first.status) == (three[0], "status 1")
    assert first.tail.splitlines()[-1] == "ValueError: no such luck"
    assert second.run == three[1]
    assert "history.json holds no validation" in second.status
    assert [is_finished(run) for run in three] == [False, False, True]
    assert "a seed 1: failed, status 1" in said


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_processes_save_and_starts_no_more(tmp_path, signum, status):
    os.mkfifo(tmp_path / "gate")
    said = Said("a seed 1: step 1/4, loss 9.000", lambda: os.kill(os.getpid(), signum))
    two = runs(tmp_path, "a", "b", a=f"+gate={tmp_path / 'gate'}")
    with pytest.raises(SystemExit) as stopped:
        pool(said, workers=1).run(two)
    assert stopped.value.code == status
    assert (two[0].folder / "saved").exists()
    assert not two[1].folder.exists()
    assert said[-1] == "stopped; the same command goes on from the saved checkpoints"

    assert pool(Said()).run(two) == []
    assert [len(lives(run)) for run in two] == [2, 1]


def test_a_process_that_a_killed_comparison_left_behind_is_waited_for_and_then_followed_up(tmp_path):
    """Its lock outlives the comparison, so that no second process trains in the same folder."""
    os.mkfifo(tmp_path / "gate")
    (run,) = runs(tmp_path, "a", a=f"+gate={tmp_path / 'gate'}")
    run.folder.mkdir(parents=True)
    lock = os.open(run.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    orphan = fake_training.start([*run.overrides, f"hydra.run.dir={run.folder}"], run.folder / LOG_FILE, lock)
    os.close(lock)  # as the death of its comparison does

    def release() -> None:
        assert orphan.poll() is None
        reaper = threading.Thread(target=orphan.wait)  # an orphan's exit is collected by init
        reaper.start()
        (tmp_path / "gate").write_text("go")

    said = Said("a seed 1: a process of another comparison is at it", release)
    assert pool(said).run([run]) == []
    assert said.act is None
    assert is_finished(run)
    assert len(lives(run)) == 2
    assert lives(run)[0] == orphan.pid


def test_two_comparisons_at_once_share_the_work(tmp_path):
    five = runs(tmp_path, *"abcde")
    others: list = []
    second = threading.Thread(target=lambda: others.extend(pool(Said(), workers=1).run(five)))
    said = Said("a seed 1: started", second.start)
    assert pool(said, workers=1).run(five) == []
    second.join()
    assert others == []
    assert [len(lives(run)) for run in five] == [1] * 5


def test_a_run_that_another_comparison_put_into_the_folder_meanwhile_is_none_of_this_one(tmp_path):
    (theirs,) = runs(tmp_path, "a", a="data=docs")
    (ours,) = runs(tmp_path, "a", a="data=code")
    failures: list = []
    second = threading.Thread(target=lambda: failures.extend(pool(Said()).run([ours])))
    said = Said("a seed 1: started", second.start)
    assert pool(said).run([theirs]) == []
    second.join()
    (failure,) = failures
    assert failure.run is ours
    assert "holds a run of another recipe (data=docs there, data=code here)" in failure.status
    assert len(lives(theirs)) == 1
