"""What Throughput and History charge for a step, against PyTorch's count of that step."""

from __future__ import annotations

import pytest
from helpers.count_flops import CountFlops
from helpers.programs import CONFIGS, PLAIN

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
ONE_PROCESS = [
    "trainer=default",
    "trainer.devices=1",
    "trainer.precision=32-true",
    "trainer.accumulate_grad_batches=1",
    "task.optimization.warmup=1",
    "model.checkpoint_activations=false",  # the second forward pass that it needs is charged to nobody
]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_step_is_charged_what_it_computes_in_every_phase(train, tmp_path, experiment):
    plan = ["evolution.harden=4"] if "dts" in experiment else []
    if experiment == "mt_dts_paper":  # its phases are counted in steps
        plan += ["evolution.diversify=1", "evolution.temperature.length=2"]
    length = ["trainer.max_steps=6", "trainer.val_check_interval=6", "trainer.limit_val_batches=1"]
    count = "+callbacks.count._target_=helpers.count_flops.CountFlops"
    _, objects = train(tmp_path, *PLAIN, *ONE_PROCESS, *length, *plan, count, experiment=experiment)
    (counted,) = (callback for callback in objects.callbacks if isinstance(callback, CountFlops))
    assert len(counted.seen) == 6
    if experiment in ("gpt_dts", "gpt_dts_paper"):
        assert {phase for phase, _, _ in counted.seen} == {"diversify", "sparsify", "hardened"}
    for phase, charged, flops in counted.seen:
        assert charged == pytest.approx(flops, rel=0.02), phase
