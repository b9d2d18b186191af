"""The training steps that a benchmark times: a bare loop's, and those of a fit by Lightning.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from evomoe.callbacks import (
    Evolution,
    EvolutionProgress,
    FiniteGuard,
    RandomState,
    RoutingMonitor,
    RunSummary,
    Throughput,
)
from evomoe.instantiation import instantiate
from evomoe.routing import Routing
from evomoe.tasks import LanguageModeling, Optimization

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
VOCABULARY = 4096
LOG_EVERY = 10
"""Steps between two logs, as in configs/trainer."""
OPTIMIZATION = Optimization(learning_rate=1e-9, warmup=0)
"""Next to no learning, so that the routing stays as initialised."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """What to train.

    Args:
        name: for the report.
        context: tokens S per sequence.
        batch: sequences B per step.
        overrides: changes to an experiment's configuration.
    """

    name: str
    context: int
    batch: int
    overrides: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.context


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Args:
        size: of the model and its batches.
        device: to train on.
        precision: ``fp32`` or ``bf16``.
        rounds: of measurements.
        clock: returns seconds.
    """

    size: Size
    device: torch.device
    precision: str
    rounds: int
    clock: Callable[[], float]

    def batch(self) -> Batch:
        """Random tokens ``(B, S + 1)``."""
        return {"tokens": torch.randint(VOCABULARY, (self.size.batch, self.size.context + 1), device=self.device)}

    def task(self, experiment: str, *overrides: str) -> LanguageModeling:
        """The task as ``train.py experiment=...`` builds it, but for the learning rate."""
        sizes = (*self.size.overrides, f"model.vocab_size={VOCABULARY}", f"data.context={self.size.context}")
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = hydra.compose("train", overrides=[f"experiment={experiment}", *sizes, *overrides])
        torch.manual_seed(0)
        model = instantiate(config.model)
        return LanguageModeling(model, OPTIMIZATION, config.router.loss_coefficients).to(self.device)

    def now(self) -> float:
        """Milliseconds, after the device's work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock() * 1e3


def bare_step(
    task: LanguageModeling, optimizer: torch.optim.Optimizer, batch: Batch, setting: Setting
) -> list[Routing]:
    """An optimizer step as one would write it by hand."""
    tokens = batch["tokens"]
    optimizer.zero_grad()
    with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.precision == "bf16"):
        logits, routings = task.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        for routing in routings:
            for name, value in routing.losses.items():
                if task.loss_coefficients.get(name):
                    loss = loss + task.loss_coefficients[name] * value
    loss.backward()
    nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
    optimizer.step()
    return routings


def default_callbacks(*evolution: Evolution) -> list[L.Callback]:
    """What ``train.py`` does around each step: all of configs/callbacks but what waits for a validation or saves."""
    return [
        RandomState(),
        *evolution,
        FiniteGuard(),
        RoutingMonitor(),
        Throughput(),
        LearningRateMonitor(logging_interval="step"),
        RunSummary(),
        EvolutionProgress(),
    ]


def fit(
    task: LanguageModeling, loader: Any, steps: int, callbacks: list[L.Callback], log_every: int, setting: Setting
) -> None:
    """Train for some steps with a TensorBoard logger, and print nothing."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = L.Trainer(
            accelerator="gpu" if setting.device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if setting.precision == "bf16" else "32-true",
            max_steps=steps,
            gradient_clip_val=1.0,
            log_every_n_steps=log_every,
            callbacks=callbacks,
            logger=TensorBoardLogger(folder, name="", version=""),
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(task, loader)
