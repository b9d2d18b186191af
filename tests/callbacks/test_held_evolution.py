"""An evolution that stands still: nothing changes in a run, whatever was trained before."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch

from evomoe.callbacks import Evolution, HeldEvolution
from evomoe.callbacks.evolution import moe_layers
from evomoe.errors import ConfigError
from evomoe.models.gpt import GPT
from evomoe.routing import DTSGate
from evomoe.tasks import LanguageModeling, Optimization


class Tokens(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        tokens = torch.randint(0, 30, (32, 9), generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader([{"tokens": row} for row in tokens], batch_size=4)


class Diary(L.Callback):
    """Writes down what each batch met."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, float, float, int, float]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ((_, layer),) = moe_layers(pl_module)
        (evolution,) = (callback for callback in trainer.callbacks if isinstance(callback, Evolution))
        assert evolution.state is not None
        router = layer.router
        values = (float(router.temperature), float(router.noise_scale), layer.live_experts)
        self.entries.append((evolution.state.phase, *values, outputs["routings"][0].active_experts.item()))


def run(evolution: Evolution, live_experts: int) -> list[tuple[str, float, float, int, float]]:
    torch.manual_seed(0)
    task = LanguageModeling(GPT(30, 8, 16, 2, 2, num_experts=4, router=partial(DTSGate), dropout=0.0), Optimization())
    ((_, layer),) = moe_layers(task)
    layer.live_experts = live_experts
    diary = Diary()
    L.Trainer(
        max_steps=8,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[evolution, diary],
    ).fit(task, datamodule=Tokens())
    return diary.entries


@pytest.mark.parametrize(
    ("phase", "live", "active"), [("diversify", 1, (1, 1)), ("sparsify", 4, (1.01, 4)), ("hardened", 4, (1, 1))]
)
def test_every_step_has_the_same_phase_values_and_experts(phase, live, active):
    entries = run(HeldEvolution(phase=phase, temperature=0.75, noise_scale=0.25), live)
    assert {entry[:4] for entry in entries} == {(phase, 0.75, 0.25, live)}
    assert len(entries) == 8
    assert all(active[0] <= entry[4] <= active[1] for entry in entries)


@pytest.mark.parametrize(
    ("phase", "plan"),
    [
        ("diversify", "diversify [0, 100)"),
        ("sparsify", "sparsify [0, 100), temperature 0.5"),
        ("hardened", "hardened [0, 100)"),
    ],
)
def test_the_plan_says_what_is_held(phase, plan):
    held = HeldEvolution(phase=phase, temperature=0.5, noise_scale=0.0).make_plan(100)
    assert held.describe() == plan
    assert {held.at(step) for step in range(101)} == {held.at(0)}


def test_an_unknown_phase_is_refused():
    with pytest.raises(ConfigError, match="evolution.phase='frozen' is unknown: expected diversify, sparsify"):
        HeldEvolution(phase="frozen", temperature=1.0, noise_scale=1.0)
