from __future__ import annotations

import lightning as L
import pytest
import torch

from evomoe.errors import ConfigError
from evomoe.run_length import total_steps


class Counter(L.LightningModule):
    """Compares with what Lightning estimates and with what really happens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def configure_optimizers(self):
        self.told = total_steps(self.trainer)
        assert self.trainer.train_dataloader is None  # nothing was made that a checkpoint could no longer position
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        return self.weight * batch.sum()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(7))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 5}, 5),
        ({"max_epochs": 2}, 14),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 8),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 6),
        ({"max_epochs": 2, "limit_train_batches": 30}, 14),
        ({"max_epochs": 3, "overfit_batches": 2}, 6),
        ({"max_epochs": 2, "max_steps": 9}, 9),
        ({"max_epochs": 2, "max_steps": 90}, 14),
    ],
    ids=str,
)
def test_the_steps_are_those_that_happen(options, steps):
    module = Counter()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, **options
    )
    trainer.fit(module)
    assert module.told == steps == trainer.global_step == trainer.estimated_stepping_batches


def test_loaders_that_the_trainer_was_given_are_counted_too():
    module = Counter()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=2
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(3)))
    assert module.told == 6 == trainer.global_step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "trainer.max_steps=0: expected at least 1, or -1 with trainer.max_epochs"),
        ({"max_epochs": 0}, "trainer.max_epochs=0: expected at least 1, or null with trainer.max_steps"),
    ],
)
def test_a_run_without_a_step_is_refused(options, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        total_steps(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options))


def test_a_run_without_end_is_refused():
    with pytest.raises(ConfigError, match="the run has no end: set trainer.max_steps"):
        L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=-1).fit(Counter())
