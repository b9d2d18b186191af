"""The picture of a run."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "plot_run.py"


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_it_draws_what_was_logged(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    with SummaryWriter(tmp_path / "run" / "tensorboard") as writer:
        for step in range(5):
            load = ("moe/block_1/load_max_violation", "val_moe/block_1/load_max_violation")
            for key in ("train/loss", "val/loss", "moe/active_experts", *load):
                writer.add_scalar(key, 1.0 / (step + 1), step)
    done = call(tmp_path / "run", "--output", tmp_path / "pictures" / "run.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pictures" / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_folder_without_curves_is_refused(tmp_path):
    done = call(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no TensorBoard file below {tmp_path}")
    assert "Traceback" not in done.stderr
