"""The runs of a comparison in TensorBoard's HPARAMS tab."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from evomoe.reporting.plan import Comparison
from evomoe.reporting.results import Result
from evomoe.reporting.table import Results, unique


def write_hparams(comparison: Comparison, by_budget: Mapping[str, Results]) -> None:
    """Write one entry per run below ``tensorboard`` of the output folder, in the place of those of an earlier call."""
    folder = comparison.output / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)
    for result in unique(by_budget):
        name = "/".join(result.run.folder.relative_to(comparison.runs).parts)
        with SummaryWriter(str(folder / name)) as writer:
            writer.add_hparams(_parameters(result), _metrics(result), run_name=".")


def _parameters(result: Result) -> dict[str, str | int]:
    overrides = dict(text.partition("=")[::2] for text in result.run.overrides)
    return {**overrides, "method": result.run.label, "seed": result.run.seed}


def _metrics(result: Result) -> dict[str, float]:
    metrics = {
        "result/val_loss_sparse": result.loss,
        "result/test_loss_sparse": result.test_loss,
        "result/steps": result.end["step"],
        "result/training_flops": result.end["training_flops"],
        "result/cpu_seconds": result.end["cpu_seconds"],
        "result/active_experts": result.active_experts,
        "result/max_violation": result.max_violation,
    }
    return {name: value for name, value in metrics.items() if value is not None}
