"""What train.py does: build everything from a configuration, fit, test, and say what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, OmegaConf, open_dict

from evomoe.callbacks import RandomState, RunSummary, SafeCheckpoint, print_closing
from evomoe.callbacks.resuming.epoch_restart import EpochRestart
from evomoe.callbacks.resuming.final_validation import FinalValidation
from evomoe.checkpointing import VerifiedCheckpointIO, newest_checkpoint
from evomoe.checks import check_parts, check_resume, check_trainer, check_validation
from evomoe.errors import ConfigError
from evomoe.instantiation import instantiate
from evomoe.pretrained import Pretrained, find_pretrained
from evomoe.quiet import hush
from evomoe.restoring import resolve_checkpoint
from evomoe.tasks import MoETask


def train(config: DictConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Fit a model, measure it on the test split, and print what happened.

    Returns:
        The last value of every metric, and the objects of the run by name.
    """
    hush()
    _check(config)
    resume_from = _find_resume(config)
    pretrained = find_pretrained(config, resume_from)
    if pretrained is not None:
        pretrained.configure(config, HydraConfig.get().overrides.task if HydraConfig.initialized() else ())
    _check_evolution(config)

    data = _build_data(config, pretrained)
    done = 0 if resume_from is None else check_resume(config, resume_from, data)
    task = _build_task(config, pretrained)
    loggers = _build_loggers(config.logger)
    callbacks = _build_callbacks(config, logs=bool(loggers))
    trainer = instantiate(
        config.trainer,
        callbacks=callbacks,
        logger=loggers or False,
        plugins=[VerifiedCheckpointIO()],
        # Else Lightning adds one of its own where the configuration has none.
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
    )
    # From here on each process draws dropout and noise of its own; Lightning seeds them alike.
    torch.manual_seed(config.seed + trainer.global_rank)

    rank_zero_info(data.describe())
    rank_zero_info(
        f"Model: {task.model.num_parameters() / 1e6:.2f}M parameters, "
        f"{task.model.num_active_parameters() / 1e6:.2f}M active with one expert a token"
    )
    if resume_from is not None:
        rank_zero_info(f"Resuming from {resume_from}")
    elif pretrained is not None:
        rank_zero_info(pretrained.describe())
    trainer.fit(task, datamodule=data, ckpt_path=resume_from)
    if trainer.global_step == done and not trainer.interrupted:
        rank_zero_info(f"No step was left to train after the {done} of the checkpoint")
    metrics = dict(trainer.callback_metrics)
    if config.test and not trainer.interrupted:
        trainer.test(task, datamodule=data, verbose=False)
        metrics.update(trainer.callback_metrics)
    values = {name: float(value) for name, value in metrics.items()}
    objects = {"config": config, "data": data, "task": task, "trainer": trainer, "callbacks": callbacks}
    if trainer.is_global_zero:
        for summary in (callback for callback in callbacks if isinstance(callback, RunSummary)):
            print_closing(summary, trainer, values)
    return values, objects


def _check(config: DictConfig) -> None:
    """Refuse, before anything is read, what cannot become a run."""
    if not (type(config.seed) is int and 0 <= config.seed < 2**32):
        raise ConfigError(f"seed={config.seed}: expected a whole number from 0 to {2**32 - 1}")
    check_parts(config)
    check_trainer(config.trainer)


def _check_evolution(config: DictConfig) -> None:
    """Refuse phases that cannot be before the data are read, where the length of the run is known by then."""
    if config.evolution is not None:
        evolution = instantiate(config.evolution)
        if config.trainer.max_steps > 0 and config.trainer.get("max_epochs") in (None, -1):
            evolution.make_plan(config.trainer.max_steps)


def _build_data(config: DictConfig, pretrained: Pretrained | None) -> Any:
    """The datamodule, set up; the configuration gets the sizes that the model takes from it."""
    L.seed_everything(config.seed, workers=True, verbose=False)
    with open_dict(config):
        config.paths.cache_dir = str(Path(config.paths.cache_dir).expanduser())
    data = instantiate(config.data)
    if pretrained is not None:
        data.adopt_tokenizer(pretrained.tokenizer)
    data.prepare_data()
    data.setup("fit")
    with open_dict(config):
        config.model.update(data.model_sizes())
    check_validation(config.trainer, data)
    return data


def _build_task(config: DictConfig, pretrained: Pretrained | None) -> MoETask:
    """The task with its model, whose weights depend on the seed alone."""
    L.seed_everything(config.seed, workers=True, verbose=False)  # whatever was drawn while the data were built
    task: Any = instantiate(config.task, model=instantiate(config.model))
    if pretrained is not None:
        pretrained.initialize(task)
    if config.compile:
        task.model.compile()
    return task


def _build_loggers(node: Any) -> list[Logger]:
    """What a configuration logs to: one logger, several by name as the callbacks are, or none."""
    nodes = [node] if node and "_target_" in node else (node or {}).values()
    return [instantiate(node) for node in nodes if node is not None]


def _build_callbacks(config: DictConfig, logs: bool) -> list[L.Callback]:
    """Those of the configuration, and those that every run has.

    Args:
        config: of the run, which goes into its checkpoints.
        logs: whether the run has a logger.
    """
    callbacks = [instantiate(node) for node in (config.callbacks or {}).values() if node is not None]
    if not logs:  # Lightning's monitor refuses to run without one
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    plain_config: Any = OmegaConf.to_container(config, resolve=True)
    for callback in callbacks:
        if isinstance(callback, SafeCheckpoint):
            callback.config = plain_config
    evolution = [] if config.evolution is None else [instantiate(config.evolution)]
    # RandomState before the others, whose draws are part of the run that a resume repeats.
    return [RandomState(), EpochRestart(), FinalValidation(), *evolution, *callbacks]


def _find_resume(config: DictConfig) -> Path | None:
    """The checkpoint to go on from: by ``resume=auto`` that of the run's own folder, else that of ``ckpt_path``."""
    if config.resume not in (None, "auto"):
        raise ConfigError(f"resume={config.resume}: expected auto or null; a file is given by ckpt_path")
    if config.resume == "auto" and (newest := newest_checkpoint(Path(config.paths.run_dir))) is not None:
        return newest
    if config.ckpt_path is not None:
        return resolve_checkpoint(config.ckpt_path, Path(config.paths.log_dir) / config.experiment_name)
    if config.resume == "auto":
        rank_zero_info(
            f"resume=auto: no checkpoint in {config.paths.run_dir}, so this run starts at step 0; run_name=..."
            " names the folder of an earlier one, and ckpt_path=last goes on from the newest"
        )
    return None
