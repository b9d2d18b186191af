"""Optimizer and learning-rate schedule that the tasks share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from evomoe.errors import ConfigError, EvomoeWarning
from evomoe.moe import MoELayer

DECAYS = ("cosine", "linear", "inverse_sqrt")


@dataclass(frozen=True)
class Optimization:
    """AdamW with warm-up and decay.

    Args:
        learning_rate: peak.
        decay: ``cosine`` or ``linear`` (as RoBERTa, arXiv 1907.11692), to ``min_ratio`` at the end of the run, or
            ``inverse_sqrt`` of the step (arXiv 1706.03762).
        min_ratio: final learning rate as a share of the peak; unused with ``inverse_sqrt``.
        warmup: optimizer steps (int) or share of the run (float in [0, 1]) of the linear warm-up.
        weight_decay: decoupled; not applied to norms, biases and routers.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: of Adam's denominator.
    """

    learning_rate: float = 1e-3
    decay: str = "cosine"
    min_ratio: float = 0.1
    warmup: int | float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate}: expected a value above 0")
        if self.decay not in DECAYS:
            raise ConfigError(
                f"decay={self.decay!r} of the learning rate is unknown: expected one of {', '.join(DECAYS)}"
            )
        if not 0 <= self.min_ratio <= 1:
            raise ConfigError(f"min_ratio={self.min_ratio}: expected a share of the peak learning rate in [0, 1]")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay={self.weight_decay}: expected 0 or above")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ConfigError(f"{name}={beta}: expected a decay in [0, 1)")
        if not self.eps >= 0:
            raise ConfigError(f"eps={self.eps}: expected 0 or above")
        if self.warmup < 0 or (isinstance(self.warmup, float) and self.warmup > 1):
            raise ConfigError(f"warmup={self.warmup}: expected steps >= 0, or a share of the run in [0, 1]")

    def optimizer(self, module: nn.Module, fused: bool = True) -> torch.optim.AdamW:
        """AdamW over ``module``'s parameters in two groups; ``fused`` kernels differ in speed only."""
        decayed, plain = parameter_groups(module)
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(
            groups, lr=self.learning_rate, betas=(self.beta1, self.beta2), eps=self.eps, fused=fused
        )

    def scheduler(self, optimizer: torch.optim.Optimizer, total: int) -> LambdaLR:
        """Linear warm-up, then the decay, in a run of ``total`` steps."""
        warmup = round(self.warmup * total) if isinstance(self.warmup, float) else self.warmup
        if warmup > total:
            rank_zero_warn(
                f"The warm-up of {warmup} steps (task.optimization.warmup) does not end within this run of {total}.",
                category=EvomoeWarning,
            )

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            if self.decay == "inverse_sqrt":
                return math.sqrt((warmup + 1) / (step + 1))
            progress = min((step - warmup) / max(total - warmup, 1), 1.0)
            share = 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
            return self.min_ratio + (1 - self.min_ratio) * share

        return LambdaLR(optimizer, factor)

    def hold(self, optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> None:
        """Set an optimizer and its schedule, restored from a checkpoint, to these options; moments and step stay."""
        scheduler.base_lrs = [self.learning_rate] * len(optimizer.param_groups)
        rate = self.learning_rate * scheduler.lr_lambdas[0](scheduler.last_epoch)
        for group, weight_decay in zip(optimizer.param_groups, (self.weight_decay, 0.0), strict=True):
            group.update(
                lr=rate,
                initial_lr=self.learning_rate,
                betas=(self.beta1, self.beta2),
                eps=self.eps,
                weight_decay=weight_decay,
            )


def parameter_groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split the parameters into those that weight decay shrinks (matrices) and the rest (norms, biases, routers)."""
    routers = {
        id(parameter)
        for layer in module.modules()
        if isinstance(layer, MoELayer)
        for parameter in layer.router.parameters()
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in module.parameters():
        (plain if parameter.ndim < 2 or id(parameter) in routers else decayed).append(parameter)
    return decayed, plain
