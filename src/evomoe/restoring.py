"""What a checkpoint says of its run: where it lies, what may be built from it, and its trained task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from evomoe.callbacks import Evolution
from evomoe.checkpointing import find_checkpoint, load_checkpoint
from evomoe.data import Tokenizer
from evomoe.errors import ConfigError
from evomoe.instantiation import instantiate
from evomoe.suggestions import unknown_key
from evomoe.tasks import MoETask

RESTORED = ("data", "model", "router", "task", "evolution")
"""Groups of a checkpoint's configuration that are built again: a file must not choose what else is called."""

WITHOUT_EFFECT = ("trainer.", "evolution.", "router.", "logger.", "task.optimization.", "paths.", "seed=")
"""Keys of a checkpoint's configuration that decide about training alone, or whose values stand elsewhere too."""

FREE_KEYS = (
    "dropout",
    "attention_dropout",
    "checkpoint_activations",
    "expert_backend",
    "allow_future_leak",
    "router",  # its options; its class is looked at
    "vocab_size",  # the data say more about it
)
"""Keys of the model that may differ from those of its checkpoint, or that are checked elsewhere."""


def resolve_checkpoint(given: str, logs: Path, key: str = "ckpt_path") -> Path:
    """A checkpoint file, from what a user may write.

    Args:
        given: a file, a run's folder, a folder of runs for the one which saved last, or ``last`` or ``best`` for that
            of the run below ``logs`` which saved last.
        logs: folder of runs.
        key: under which it was written.
    """
    if given in ("last", "best"):
        runs = runs_below(logs)
        if not runs:
            raise ConfigError(f"{key}={given}: there is no checkpoint below {logs}; train first, or give a file")
        return find_checkpoint(runs[0], given)
    path = Path(str(given)).expanduser()  # what Hydra has read as a number is a name here
    if path.is_dir():
        below = [] if (path / "checkpoints").is_dir() else runs_below(path)
        return find_checkpoint(below[0] if below else path, "last")
    if not path.is_file():
        raise ConfigError(f"{key}={given}: there is no such file or folder; `last` means the newest one")
    return path


def runs_below(logs: Path) -> list[Path]:
    """The folders below ``logs`` of runs that have a checkpoint, those that saved last first."""
    saved = {path.parent.parent: path.stat().st_mtime for path in sorted(logs.glob("**/checkpoints/step_*.ckpt"))}
    return sorted(saved, key=saved.__getitem__, reverse=True)


def check_targets(config: DictConfig, path: Path) -> None:
    """Refuse a configuration from a file that would call anything but classes of this package."""
    package = __name__.partition(".")[0]
    groups: Any = OmegaConf.to_container(config)
    for target in _targets([groups.get(name) for name in RESTORED]):
        found: Any = None
        if str(target).startswith(f"{package}."):
            with contextlib.suppress(Exception):  # no such thing, or no class
                found = hydra.utils.get_class(target)
        # Not by its name alone, as that may lead through a module of this package into another that it imports.
        if found is None or not found.__module__.startswith(f"{package}."):
            raise ConfigError(f"{path} names the target {target}, which is no class of {package}")


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)


def config_of(checkpoint: Mapping[str, Any], path: Path) -> DictConfig:
    """The configuration that a checkpoint was trained with.

    Args:
        checkpoint: the loaded file.
        path: its path, for the message.

    Raises:
        ConfigError: it has none, as another callback than :class:`~evomoe.callbacks.SafeCheckpoint` saved it.
    """
    if "evomoe" not in checkpoint:
        raise ConfigError(
            f"{path} says nothing of the run that it is from: expected a checkpoint of callbacks.checkpoint, such as"
            " callbacks=default has it"
        )
    return OmegaConf.create(checkpoint["evomoe"]["config"])


def trained_evolution(checkpoint: Mapping[str, Any], config: DictConfig) -> Evolution | None:
    """The schedule that a checkpoint was trained under, its plan known; None if it had none.

    Args:
        checkpoint: the loaded file.
        config: its configuration.
    """
    if config.evolution is None:
        return None
    evolution: Evolution = instantiate(config.evolution)
    evolution.load_state_dict(checkpoint["callbacks"][evolution.state_key])
    return evolution


@dataclass
class Restored:
    """A trained task, ready to be used.

    Args:
        path: the checkpoint.
        config: the configuration that it was trained with.
        task: with its weights, and its routers set to the checkpoint's step.
        step: optimizer steps it was trained for.
        data_state: what its datamodule keeps: identity, tokenizer, names of the classes.
    """

    path: Path
    config: DictConfig
    task: MoETask
    step: int
    data_state: Mapping[str, Any]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of its data, if they are text."""
        return Tokenizer.from_checkpoint({"data": self.data_state})


def restore(ckpt_path: str, log_dir: str = "logs", overrides: list[str] | None = None) -> Restored:
    """Load a checkpoint; neither its corpus nor its run's folder is needed.

    Args:
        ckpt_path: a file, a run's folder, or ``last``.
        log_dir: where ``last`` looks.
        overrides: changes to the checkpoint's configuration, ``key=value``.
    """
    path = resolve_checkpoint(ckpt_path, Path(log_dir))
    checkpoint = load_checkpoint(path)
    config = config_of(checkpoint, path)
    check_targets(config, path)
    for override in overrides or []:
        if override.startswith(WITHOUT_EFFECT):
            raise ConfigError(
                f"overrides={override} would change nothing: what is measured is decided by data.*, model.* and task.*,"
                " and how much of it by limit_batches"
            )
        if isinstance(config.get(override.partition("=")[0]), DictConfig):
            raise ConfigError(
                f"overrides={override} chooses a group, and a checkpoint keeps those of its run: change single keys, as"
                " in data.eval_batch_size=4"
            )
    OmegaConf.set_struct(config, True)  # a key that the checkpoint lacks is a mistake
    try:
        config.merge_with_dotlist(overrides or [])
    except (ConfigAttributeError, ConfigKeyError) as error:
        known = OmegaConf.to_container(config, resolve=False)
        raise ConfigError(f"overrides={overrides}: {unknown_key(str(error.full_key), known)}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"overrides={overrides}: {' '.join(str(error).split())}") from None
    check_targets(config, path)
    task = instantiate(config.task, model=instantiate(config.model))
    try:
        task.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:  # other shapes or layers
        raise ConfigError(
            f"overrides={overrides} describe another model than the one in {path}: leave out model.* and router.gate.*"
        ) from error
    evolution = trained_evolution(checkpoint, config)
    if evolution is not None:
        evolution.apply_last(task, checkpoint["global_step"])
    datamodule = hydra.utils.get_class(config.data._target_)
    return Restored(path, config, task.eval(), checkpoint["global_step"], checkpoint[datamodule.__qualname__])
