"""How long a fit is."""

from __future__ import annotations

import math

import lightning as L

from evomoe.errors import ConfigError


def total_steps(trainer: L.Trainer) -> int:
    """Optimizer steps of a fit, for what must know them before its first batch.

    Lightning's ``estimated_stepping_batches`` says the same, but in a run of epochs it makes the trainer's own loader
    to count its batches. Before the loops of a checkpoint are restored, as in ``configure_optimizers`` and
    ``on_fit_start``, this loses the loader's position, and a resumed run would see other batches. Here a loader is
    made for the count alone.

    Raises:
        ConfigError: the fit has no end, or no step.
    """
    check_length(trainer.max_steps, trainer.max_epochs)
    if trainer.max_epochs in (None, -1):
        return trainer.max_steps
    loader = trainer.fit_loop._data_source.dataloader()  # whoever has it: trainer, task or data module
    batches = limited(len(loader), trainer.limit_train_batches)
    steps = math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def check_length(max_steps: int, max_epochs: int | None) -> None:
    """Refuse a fit without a step or without an end, for which Lightning would choose 1000 epochs.

    Raises:
        ConfigError: naming the option.
    """
    if max_steps == 0:
        raise ConfigError("trainer.max_steps=0: expected at least 1, or -1 with trainer.max_epochs")
    if max_epochs == 0:
        raise ConfigError("trainer.max_epochs=0: expected at least 1, or null with trainer.max_steps")
    if max_steps == -1 and max_epochs in (None, -1):
        raise ConfigError("the run has no end: set trainer.max_steps=1000 or trainer.max_epochs=2 for its schedules")


def limited(batches: int, limit: int | float) -> int:
    """How many of an epoch's batches remain under a limit, which is a number of them (int) or a share (float)."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def is_last_step(trainer: L.Trainer) -> bool:
    """Whether the optimizer step just taken was the last of the fit; for ``on_train_batch_end``."""
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or (trainer.is_last_batch and last_epoch)


def to_steps(name: str, value: int | float, total: int) -> int:
    """Optimizer steps (int), or a share of a run (float in [0, 1]), as optimizer steps.

    Args:
        name: of the option, for the message.
        value: steps or share.
        total: optimizer steps of the run.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(value, int):
        if value < 0:
            raise ConfigError(f"{name}={value}: expected a number of steps >= 0 or a share of the run in [0, 1]")
        return value
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}={value}: a share of the run must be in [0, 1]; write whole steps without a point")
    return max(round(value * total), int(value > 0))  # however short the run, no phase that was asked for vanishes
