"""What must hold before a run begins: parts that go together, options of the trainer, a checkpoint to go on from."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning as L
from lightning.pytorch.accelerators import AcceleratorRegistry, CUDAAccelerator, MPSAccelerator
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, ListConfig, OmegaConf

from evomoe.checkpointing import load_checkpoint
from evomoe.errors import ConfigError
from evomoe.instantiation import annotations_of, defaults_of
from evomoe.restoring import FREE_KEYS, config_of
from evomoe.run_length import check_length, limited


def check_parts(config: DictConfig) -> None:
    """Refuse a task with a model or data that are made for another one.

    A task says by the annotation of its argument ``model`` what it trains, and by ``reads`` what its batches hold, as
    a datamodule does by ``holds``.

    Raises:
        ConfigError: naming the two that do not go together.
    """
    task, model, data = (_class_of(config, group) for group in ("task", "model", "data"))
    wanted: Any = annotations_of(config.task._target_).get("model")
    is_class = isinstance(wanted, type) and not getattr(wanted, "_is_protocol", False)
    if is_class and isinstance(model, type) and not issubclass(model, wanted):
        raise ConfigError(
            f"the model is a {model.__name__}, and task {task.__name__} trains a {wanted.__name__}: choose a model and"
            " a task that go together, as one experiment has them"
        )
    reads, holds = getattr(task, "reads", None), getattr(data, "holds", None)
    if reads and holds and reads != holds:
        raise ConfigError(
            f"the data are {holds}, and task {task.__name__} reads {reads}: choose data and a task that go together, as"
            " one experiment has them"
        )


def _class_of(config: DictConfig, group: str) -> Any:
    try:
        return hydra.utils.get_class(config[group]._target_)
    except Exception as error:  # whatever importing a module of a user raises
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{group}._target_={config[group]._target_} cannot be imported: {reason}") from error


def check_accelerator(key: str, accelerator: Any, remedy: str) -> None:
    """Refuse an accelerator that does not exist, or a GPU that is not there."""
    if isinstance(accelerator, str) and accelerator not in {"auto", "gpu", *AcceleratorRegistry}:
        raise ConfigError(f"{key}={accelerator} is unknown: expected cpu, gpu or auto")
    if accelerator in ("gpu", "cuda") and not _has_gpu():
        raise ConfigError(f"{key}={accelerator}: no GPU is found here; use {remedy}")


def _has_gpu() -> bool:
    return CUDAAccelerator.is_available() or MPSAccelerator.is_available()


def check_share(key: str, value: Any) -> None:
    """Refuse what is neither a number of batches nor a share of them."""
    is_share = type(value) is float and 0 < value <= 1
    if not (is_share or (type(value) is int and value >= 1)):
        raise ConfigError(f"{key}={value}: expected a number of batches of at least 1, or a share such as 0.5")


def split_words(key: str, text: str) -> list[str]:
    """The words of a text, as a shell would split it.

    Raises:
        ConfigError: a quote is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{key}={text} cannot be read ({error}): quote as in {key}=\"data.test='a b.txt'\"") from None


def check_trainer(trainer: DictConfig) -> None:
    """Refuse options of the trainer that Lightning takes and stumbles over later."""
    check_length(trainer.get("max_steps", -1), trainer.get("max_epochs"))
    check_accelerator("trainer.accelerator", trainer.accelerator, "trainer=default")
    for key in ("val_check_interval", "limit_train_batches", "overfit_batches"):
        if trainer.get(key) is not None and (key, trainer[key]) != ("overfit_batches", 0):
            check_share(f"trainer.{key}", trainer[key])
    counts_epochs = trainer.get("check_val_every_n_epoch") is not None
    for key in ("accumulate_grad_batches", "num_nodes", *(["check_val_every_n_epoch"] if counts_epochs else [])):
        number = trainer.get(key, 1)
        if type(number) is not int or number < 1:
            raise ConfigError(f"trainer.{key}={number}: expected a whole number of at least 1")
    bound = trainer.get("gradient_clip_val")
    if bound is not None and not (type(bound) in (int, float) and bound > 0):
        raise ConfigError(f"trainer.gradient_clip_val={bound}: expected a number above 0, or null to clip nothing")
    processes = count_processes(trainer)
    if processes > 1 and trainer.get("strategy") in (None, "auto", "ddp", "ddp_spawn"):
        devices = str(trainer.devices).replace(" ", "")
        nodes = f" +trainer.num_nodes={trainer.num_nodes}" if trainer.get("num_nodes", 1) > 1 else ""
        precision = trainer.get("precision")
        kept = f" trainer.precision={precision}" if precision not in (None, "32-true") else ""
        raise ConfigError(
            f"trainer.devices={devices}{nodes} means {processes} processes, which need a strategy that admits experts"
            f" without a gradient: add trainer=ddp trainer.devices={devices}{kept}"
        )


def count_processes(trainer: DictConfig) -> int:
    """How many processes a trainer starts: one for each device of each node.

    Raises:
        ConfigError: Lightning could not read its devices.
    """
    devices, nodes = trainer.devices, trainer.get("num_nodes", 1)
    on_cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not _has_gpu())
    if on_cpu and (isinstance(devices, ListConfig) or str(devices).startswith("-") or "," in str(devices)):
        raise ConfigError(f"trainer.devices={devices} on the CPU: expected a number of processes")
    if isinstance(devices, ListConfig):
        return len(devices) * nodes
    text = str(devices)
    if text in ("auto", "-1"):
        return max(CUDAAccelerator.auto_device_count() if trainer.accelerator != "cpu" else 1, 1) * nodes
    numbers = [part for part in text.split(",") if part.strip()]
    if not numbers or not all(part.strip().isdecimal() for part in numbers):
        raise ConfigError(f"trainer.devices={text}: expected a number of devices, a list such as [0,1], or auto")
    return (len(numbers) if "," in text else int(text)) * nodes


def check_validation(trainer: DictConfig, data: L.LightningDataModule) -> None:
    """Refuse validations that lie beyond the end of an epoch, where they are counted within epochs."""
    every = trainer.val_check_interval
    if trainer.check_val_every_n_epoch is None or not isinstance(every, int):
        return
    # Before the processes exist, the loader counts for all of them.
    batches = len(data.train_dataloader()) // max(count_processes(trainer), 1)
    limit = trainer.get("overfit_batches") or trainer.get("limit_train_batches")
    if limit is not None:
        batches = limited(batches, limit)
    if every > batches:
        raise ConfigError(
            f"trainer.val_check_interval={every} is more than the {batches} batches of an epoch: choose fewer, or add"
            " trainer.check_val_every_n_epoch=null to count on through epochs"
        )


def check_resume(config: DictConfig, path: Path, data: L.LightningDataModule) -> int:
    """Refuse to go on from the checkpoint of other data, another router or another size of model.

    Args:
        config: of the run.
        path: the checkpoint.
        data: of the run, set up.

    Returns:
        The optimizer steps that the checkpoint has behind it.
    """
    checkpoint = load_checkpoint(path)
    there = config_of(checkpoint, path)
    _check_equal(path, there, config, ["data._target_"])
    if (there.evolution is None) != (config.evolution is None):
        before, now = (
            "no evolution" if node is None else "an evolution" for node in (there.evolution, config.evolution)
        )
        raise ConfigError(
            f"cannot resume from {path}: it was trained with {before} and this run has {now}; restore the group"
            " evolution=..., or start a new run with another run_name"
        )
    # Before Lightning would load the weights, whose shapes follow from the data.
    if state := checkpoint.get(type(data).__qualname__):
        data.load_state_dict(state)
    keys = [key for key in config.model if key not in FREE_KEYS]
    # An option that is younger than the checkpoint was at its default there.
    defaults = defaults_of(config.model._target_)
    younger = {key: defaults[key] for key in keys if key not in there.model and key in defaults}
    there.model.update(younger)
    _check_equal(path, there, config, [*(f"model.{key}" for key in keys), "router.gate._target_"])
    keys = [
        "trainer.max_steps",
        "trainer.max_epochs",
        *(f"task.optimization.{key}" for key in config.task.optimization),
    ]
    if changes := _differences(there, config, keys):
        rank_zero_info(
            f"Going on with {', '.join(f'{key}={now} (before: {then})' for key, then, now in changes)}; what is a share"
            " of the run, such as the decay of the learning rate, follows from the new values"
        )
    return checkpoint["global_step"]


def _check_equal(path: Path, there: DictConfig, here: DictConfig, keys: Sequence[str]) -> None:
    for key, before, now in _differences(there, here, keys):
        raise ConfigError(
            f"cannot resume from {path}: it was trained with {key}={before} and this run has {now}; restore it, or"
            " start a new run with another run_name"
        )


def _differences(there: DictConfig, here: DictConfig, keys: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Keys of which two configurations have another value, with both values."""
    values = [(key, OmegaConf.select(there, key), OmegaConf.select(here, key)) for key in keys]
    return [(key, before, now) for key, before, now in values if before != now]
