from __future__ import annotations

import pytest

from evomoe.reporting.progress import LastLine, read_last_line, time_left

LOG = """\
INFO: Evolution: diversify [0, 4); sparsify [4, 12)
step 20/300 (7%), diversify, loss 6.250, active experts 1.00, 18.2k tok/s, elapsed 0:00:11, left 0:02:30
validation 1/20
step 140/300 (47%), sparsify, val loss 4.000, loss 5.125, elapsed 0:01:11, left 1 day, 1:01:20
validation 2/20
"""


def test_the_last_line_is_read(tmp_path):
    log = tmp_path / "log"
    assert read_last_line(log) is None
    log.write_text("x" * 9000 + "\n" + LOG)
    line = read_last_line(log)
    assert line == LastLine(140, 300, 5.125, 86400 + 3600 + 61 + 19)
    assert str(line) == "step 140/300, loss 5.125, 1 day, 1:01:20 left"
    log.write_text(LOG.splitlines()[0])
    assert read_last_line(log) is None
    log.write_text("step 1/3 (33%), train, val loss 4.000, elapsed 0:00:01\n")
    assert read_last_line(log) == LastLine(1, 3, None, None)


def at(left: float | None) -> LastLine:
    return LastLine(1, 2, None, left)


@pytest.mark.parametrize(
    ("durations", "running", "waiting", "workers", "left"),
    [
        ([], [("a", 5, None)], ["b"], 2, None),
        ([], [("a", 30, at(70))], ["a", "a"], 1, 70 + 200),
        ([("a", 60), ("a", 40), ("b", 10)], [], ["a", "b"], 1, 60),
        ([("a", 60)], [], ["b"], 1, 60),  # of b nothing is known
        ([("a", 60)], [("a", 20, None), ("a", 90, None)], [], 2, 20),  # 40 and 0 on two workers
        ([("a", 60)], [], ["a", "a"], 8, 60),
    ],
)
def test_time_left_by_hand(durations, running, waiting, workers, left):
    assert time_left(durations, running, waiting, workers) == left
