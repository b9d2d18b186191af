"""A run that is killed again and again ends with the weights of one that was left alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers.kill_and_resume import kill_and_resume
from helpers.programs import ROOT, call, equal, timeless

from evomoe.checkpointing import list_checkpoints

STEPS = 50
SETTING = [
    "experiment=gpt_dts",
    "model.dropout=0.1",
    "model.attention_dropout=0.1",
    "trainer.accumulate_grad_batches=2",
    "+trainer.limit_train_batches=19",  # ten steps an epoch, the tenth of one batch
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=14",
    "callbacks=minimal",
    "callbacks.checkpoint.every_n_steps=2",
    "logger=none",
    "test=false",
]


def last(folder: Path) -> dict:
    """The last checkpoint, without the configuration, which names the run, and without times."""
    return timeless(torch.load(list_checkpoints(folder)[STEPS], weights_only=True))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_at_random_moments_change_no_bit(tiny, tmp_path, monkeypatch):
    """``python train.py ... resume=auto`` against SIGKILL: weights, optimizer, random states, position in the data.

    Three kills; as many as the environment variable EVOMOE_KILLS says, where it is set:

        EVOMOE_KILLS=20 python -m pytest tests/cli/test_kills.py
    """
    kills = int(os.environ.get("EVOMOE_KILLS", "3"))
    alone, killed = (tmp_path / "logs" / "gpt_dts" / name for name in ("alone", "killed"))
    done = call("train.py", *tiny, *SETTING, "run_name=alone", "+callbacks.checkpoint.keep_last=99", folder=tmp_path)
    assert done.status == 0, done.stderr
    moments = [path.stat().st_mtime for path in list_checkpoints(alone).values()]
    seconds = moments[-1] - moments[0]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, str(ROOT / "train.py"), *tiny, *SETTING, "run_name=killed", "resume=auto"]
    # On average the lives that are cut off take 40 % of the run.
    status, _, taken = kill_and_resume(command, killed / "checkpoints", kills, window=0.8 * seconds / kills, seed=kills)
    assert (status, taken) == (0, kills)
    assert equal(last(killed), last(alone))
    assert (killed / "checkpoints" / "best.json").read_text() == (alone / "checkpoints" / "best.json").read_text()
