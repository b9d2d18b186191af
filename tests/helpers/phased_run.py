"""A fit of milliseconds that runs through all three phases, for the callbacks that show and sum it up.

Steps 0 and 1 diversify with one active expert, 2 and 3 sparsify with three, the rest is hardened with one; a batch has
2 sequences of 4 tokens; the loss of step s is 10 - s.
"""

from __future__ import annotations

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from evomoe.callbacks.evolution import Decay, Evolution, EvolutionState
from evomoe.models.flops import Work
from evomoe.routing import SparseRouting

EXPERTS, SEQUENCE = 3, 4


def phase_at(step: int) -> str:
    return "diversify" if step < 2 else "sparsify" if step < 4 else "hardened"


class FakeEvolution(Evolution):
    """Only tells the phase; there are no MoE layers to evolve."""

    def __init__(self) -> None:
        super().__init__(temperature=Decay(2.0, 0.75, 5))
        self.state = EvolutionState("diversify", 2.0, 1.0)

    def setup(self, trainer, pl_module, stage) -> None: ...

    def on_fit_start(self, trainer, pl_module) -> None:
        self.on_train_batch_start(trainer)

    def on_train_batch_start(self, trainer, *_) -> None:
        self.state = EvolutionState(phase_at(trainer.global_step), 2.0 - 0.25 * trainer.global_step, 1.0)

    def on_validation_start(self, trainer, pl_module) -> None: ...

    on_test_start = on_validation_start

    def state_dict(self):
        return {}


class FakeModel(nn.Module):
    context = SEQUENCE

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def flops(self, active_experts: float) -> float:
        """Per token."""
        return 100.0 * SEQUENCE + 1000.0 * active_experts


class PhasedTask(L.LightningModule):
    """One MoE layer, or a dense model with ``layers=0``."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.model = FakeModel()
        self.layers = layers

    def training_step(self, batch, batch_idx):
        loss = 10.0 - self.trainer.global_step + 0 * self.model.weight
        self.log("train/loss", loss, prog_bar=True)
        self.log("moe/active_experts", 2.5)
        self.log("throughput/tokens_per_second", 18234.0)
        valid = batch.get("valid")
        tokens = batch["tokens"][:, 1:].numel() if valid is None else int(valid.sum())
        active = 3 if self.layers and phase_at(self.trainer.global_step) == "sparsify" else 1
        return {
            "loss": loss,
            "task_loss": loss.detach(),
            "routings": [routing(tokens, active) for _ in range(self.layers)],
            "work": Work(tokens=tokens, forward_flops=2 * SEQUENCE * self.model.flops(active)),
        }

    def validation_step(self, batch, batch_idx):
        step = float(self.trainer.global_step)
        self.log_dict({"val/loss": step, "val/perplexity": step + 0.5, "val/loss_sparse": step + 1})

    def test_step(self, batch, batch_idx):
        self.log("test/loss", 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def routing(tokens: int, active: int) -> SparseRouting:
    """Every token goes to the first ``active`` experts."""
    return SparseRouting(
        token=torch.arange(tokens).repeat(active),
        weight=torch.ones(tokens * active),
        tokens_per_expert=torch.tensor([tokens] * active + [0] * (EXPERTS - active)),
        scores=torch.ones(tokens, EXPERTS),
        num_tokens=torch.tensor(tokens),
        dropped=torch.tensor(0),
    )


def loader(batches: int, padding: int = 0) -> DataLoader:
    example = {"tokens": torch.zeros(SEQUENCE + 1, dtype=torch.long)}
    if padding:
        example["valid"] = torch.arange(SEQUENCE) < SEQUENCE - padding
    return DataLoader([example] * (2 * batches), batch_size=2)


def fit(folder, *callbacks, steps=6, task=None, data=None, resume=None, **settings) -> L.Trainer:
    """``steps`` optimizer steps under the given callbacks, with a validation of two batches after every second one."""
    settings = {"max_steps": steps, "max_epochs": -1, "val_check_interval": 2, "num_sanity_val_steps": 0, **settings}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(task or PhasedTask(), data or loader(6), loader(2), ckpt_path=resume)
    return trainer
