"""Coefficients that change during a run, from the configuration to the optimized loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from helpers.programs import compose
from torch.utils.data import DataLoader

from evomoe.errors import ConfigError
from evomoe.instantiation import instantiate
from evomoe.models.gpt import GPT
from evomoe.routing import AdaMoE
from evomoe.tasks import Coefficient, LanguageModeling, Optimization


def configured(*overrides: str) -> LanguageModeling:
    config = compose("experiment=gpt_adamoe", "model=gpt_tiny", *overrides)
    config.model.vocab_size = 300
    return instantiate(config.task, model=instantiate(config.model))


def test_a_schedule_comes_from_the_configuration():
    assert configured().loss_coefficients == {"balance": Coefficient(0.02, 1e-4, 0.5, "step")}
    changed = configured("router.loss_coefficients.balance.end=1e-3", "router.loss_coefficients.balance.length=500")
    assert changed.loss_coefficients == {"balance": Coefficient(0.02, 1e-3, 500, "step")}
    assert configured("router.loss_coefficients.balance=0.01").loss_coefficients == {"balance": 0.01}
    assert configured("task.balance_scope=global").balance_scope == "global"


def test_a_schedule_for_a_loss_that_the_router_lacks_is_refused():
    with pytest.raises(ConfigError) as error:
        configured("+router.loss_coefficients.z={_target_:evomoe.tasks.Coefficient,start:1.0,end:0.0,length:5}")
    assert str(error.value).startswith("router.loss_coefficients.z=Coefficient(start=1.0, end=0.0, length=5")
    assert "AdaMoE has no such loss (it has: balance)" in str(error.value)


def test_a_value_of_the_wrong_type_is_named():
    with pytest.raises(ConfigError, match="router.loss_coefficients.balance.start=high: expected a number"):
        configured("router.loss_coefficients.balance.start=high")


class Applied(L.Callback):
    """What the auxiliary loss of each training batch was multiplied by."""

    def __init__(self) -> None:
        self.coefficients: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        balance = sum(routing.losses["balance"] for routing in outputs["routings"])
        self.coefficients.append(((outputs["loss"] - outputs["task_loss"]) / balance).item())


class Words(L.LightningDataModule):
    """Six batches of random tokens."""

    def train_dataloader(self) -> Any:
        tokens = torch.randint(0, 32, (6, 4, 9), generator=torch.Generator().manual_seed(0))
        return DataLoader([{"tokens": rows} for rows in tokens], batch_size=None)

    val_dataloader = train_dataloader


@pytest.mark.parametrize(
    ("coefficient", "applied"),
    [
        (Coefficient(2.0, 0.5, 0.5, "step"), [2, 2, 2, 0.5, 0.5, 0.5]),
        (Coefficient(2.0, 0.5, 4, "step"), [2, 2, 2, 2, 0.5, 0.5]),
        (Coefficient(2.0, 0.0, 4), [2, 1.5, 1, 0.5, 0, 0]),
        (2.0, [2] * 6),
    ],
)
def test_a_schedule_multiplies_the_loss_by_the_value_of_its_step(coefficient, applied):
    torch.manual_seed(0)
    model = GPT(32, 8, 16, 2, 2, num_experts=2, router=partial(AdaMoE, num_null=2, top_k=2), dropout=0.0)
    task, seen = LanguageModeling(model, Optimization(), {"balance": coefficient}), Applied()
    options: Any = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = L.Trainer(accelerator="cpu", max_steps=6, limit_val_batches=0, callbacks=[seen], **options)
    trainer.fit(task, datamodule=Words())
    assert seen.coefficients == pytest.approx(applied, abs=1e-3)
