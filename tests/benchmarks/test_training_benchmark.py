"""The benchmark of whole training steps at its smallest, where Hugging Face's Trainer cannot start."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
PROGRAM = f"""
import runpy, sys
sys.modules["accelerate"] = None
sys.path.insert(0, {str(FOLDER)!r})
runpy.run_path({str(FOLDER / "training.py")!r}, run_name="__main__")
"""


def cells(report: str) -> dict[str, list[str]]:
    """Rows of all tables by their first cell."""
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")]
    return {name: others for name, *others in rows}


@pytest.mark.slow
def test_every_part_reports_and_the_missing_peer_is_named(tmp_path):
    output = tmp_path / "training.md"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--quick", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    report = output.read_text()
    assert report.count("\n### ") == 3
    assert "Skipped: import of accelerate halted" in report

    rows = cells(report)
    active = {name: rows[name][0] for name in rows if name.startswith(("dense", "Switch, dropless", "DTS"))}
    late = float(active.pop("DTS, sparsify, temperature 0.05"))
    assert 1 < late < 4
    assert active == {
        "dense": "-",
        "Switch, dropless": "1.00",
        "DTS, diversify": "1.00",
        "DTS, sparsify, temperature 2": "4.00",
        "DTS, hardened": "1.00",
    }
    # The bare loop, Lightning and the monitored fit took their turns, and each target has its verdict.
    assert {"bare loop", "Lightning", "Lightning, monitored, with a log"} <= set(rows)
    verdicts = {name: row[-1] for name, row in rows.items() if row[-1] in ("met", "missed")}
    assert set(verdicts) == {
        "diversify phase to dense",
        "hardened phase to dropless Switch",
        "Lightning to the bare loop",
        "monitored to plain Lightning",
    }
