"""Kills a training command with SIGKILL at random moments, starts it again each time, and lets it end at last.

    python tests/helpers/kill_and_resume.py --watch RUN/checkpoints --kills 20 -- python train.py ... resume=auto

The command must resume by itself from what the killed one left. A life is killed up to ``--window`` seconds after it
first changed a file in the watched folder, so that every life gets somewhere, and kills fall on saves, validations and
steps alike. Prints how many kills landed, passes on what the last life printed, and exits with its status.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


def kill_and_resume(command: list[str], watch: Path, kills: int, window: float, seed: int = 0) -> tuple[int, str, int]:
    """Run ``command`` until it ends by itself.

    Args:
        command: the command line; run in the present folder and environment.
        watch: folder whose first change in a life starts the clock of its death.
        kills: how many lives to take; fewer if one ends first.
        window: seconds from that change to the latest death.
        seed: of the random moments.

    Returns:
        Exit status and standard output of the last life, and the number of lives taken.
    """
    moments = random.Random(seed)
    taken = 0
    while True:
        before = _listing(watch)
        # A session of its own, so that data workers die with their run. A file, as a pipe that nobody reads fills up.
        with tempfile.TemporaryFile("w+") as output:
            life = subprocess.Popen(command, stdout=output, start_new_session=True)
            while taken < kills and _listing(watch) == before and not _ended(life, within=0.005):
                pass
            if taken == kills or _ended(life, within=moments.uniform(0, window)):
                status = life.wait()
                output.seek(0)
                return status, output.read(), taken
            os.killpg(life.pid, signal.SIGKILL)
            life.wait()
            taken += 1


def _ended(life: subprocess.Popen, within: float) -> bool:
    try:
        life.wait(timeout=within)
    except subprocess.TimeoutExpired:
        return False
    return True


def _listing(folder: Path) -> list[tuple[str, int]]:
    """Names and times of the files, read while another process renames and removes them."""
    listing = []
    for file in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            listing.append((file.name, file.stat().st_mtime_ns))
    return sorted(listing)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watch", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--window", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    status, output, taken = kill_and_resume(
        arguments.command, arguments.watch, arguments.kills, arguments.window, arguments.seed
    )
    print(f"kills {taken}\n{output}", end="")
    sys.exit(status)
