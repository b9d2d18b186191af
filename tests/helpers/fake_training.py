"""Stands in for ``train.py`` where only processes matter: takes milliseconds, and does what its overrides say.

A run of ``trainer.max_steps`` steps (4) has a row in its history after each. Its loss falls by 1 per step from 10, and
is 0.1 higher for each seed; a step costs 100 FLOPs and 2 CPU seconds.

    +fail=true      says why, and ends with status 1
    +fail_below=3   the same, where it has fewer steps
    +mute=true      ends without a history
    +gain=0.5       the loss falls by so much per step
    +price=2        a step costs so many times more FLOPs
    +head=200       the first step costs so many more FLOPs
    +gate=PATH      the first process in a folder waits for a writer of this pipe, and ends with status 1
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

LIVES = "lives"


def start(overrides: list[str], log: Path, lock: int) -> subprocess.Popen:
    """As :func:`evomoe.reporting.runner.start_process`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-S", __file__, *overrides],
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[lock],
            start_new_session=True,
        )


def row(step: int, seed: int, gain: float, price: float, head: float = 0.0) -> dict:
    loss = 10 + 0.1 * seed - gain * step
    return {
        "step": step,
        "tokens": 10 * step,
        "training_flops": 100.0 * price * step + head,
        "seconds": 3.0 * step,
        "cpu_seconds": 2.0 * step,
        "val_loss": loss,
        "val_loss_sparse": loss,
        "active_experts": 2.0 if step == 1 else 1.0,
        "load": {"block_1": [0.75, 0.25]},
        "load_max_violation": {"block_1": 0.5},
        "router_metrics": {},
    }


def main() -> None:
    given = dict(text.partition("=")[::2] for text in sys.argv[1:])
    folder = Path(given["hydra.run.dir"])

    def save(signum: int, _frame: object) -> None:
        (folder / "saved").touch()
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, save)
    with (folder / LIVES).open("a") as lives:
        lives.write(f"{os.getpid()}\n")
    print("step 1/4 (25%), train, loss 9.000, val loss 8.000, elapsed 0:00:01, left 0:00:03", flush=True)
    steps = int(given.get("trainer.max_steps", 4))
    if "+fail" in given or steps < int(given.get("+fail_below", 0)):
        sys.exit("ValueError: no such luck")
    if "+gate" in given and len((folder / LIVES).read_text().splitlines()) == 1:
        Path(given["+gate"]).read_text()
        sys.exit(1)
    if "+mute" not in given:
        seed, gain, price = int(given["seed"]), float(given.get("+gain", 1)), float(given.get("+price", 1))
        head = float(given.get("+head", 0))
        rows = [row(step, seed, gain, price, head) for step in range(1, steps + 1)]
        test = {"test/loss_sparse": rows[-1]["val_loss_sparse"] - 1}
        (folder / "history.json").write_text(
            json.dumps({"causal_in_train": True, "data": "text", "steps": rows[-1]["step"], "rows": rows, "test": test})
        )


if __name__ == "__main__":
    main()
