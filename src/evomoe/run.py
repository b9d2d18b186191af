"""What train.py and eval.py do: build everything from a configuration, fit, test, and say what came out."""

from __future__ import annotations

import logging
import shlex
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table

from evomoe.callbacks import EvolutionProgress, FewShotProbe, RandomState, RunSummary, SafeCheckpoint, print_closing
from evomoe.callbacks.monitoring.patch_pictures import CheckpointPictures
from evomoe.callbacks.resuming.epoch_restart import EpochRestart
from evomoe.callbacks.resuming.final_validation import FinalValidation
from evomoe.checkpointing import VerifiedCheckpointIO, newest_checkpoint
from evomoe.checks import check_accelerator, check_parts, check_resume, check_share, check_trainer, check_validation
from evomoe.errors import ConfigError
from evomoe.instantiation import instantiate
from evomoe.pretrained import find_pretrained
from evomoe.restoring import Restored, resolve_checkpoint, restore
from evomoe.tasks import ImageClassification

NOISE = ("GPU available", "TPU available", "\N{ELECTRIC LIGHT BULB} Tip", "`Trainer.fit` stopped", "`Trainer(limit_")
"""Beginnings of Lightning's messages that tell nothing about the run."""


def train(config: DictConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Fit a model, measure it on the test split, and print what happened.

    Returns:
        The last value of every metric, and the objects of the run by name.
    """
    _hush()
    if not (type(config.seed) is int and 0 <= config.seed < 2**32):
        raise ConfigError(f"seed={config.seed}: expected a whole number from 0 to {2**32 - 1}")
    L.seed_everything(config.seed, workers=True, verbose=False)
    with open_dict(config):
        config.paths.cache_dir = str(Path(config.paths.cache_dir).expanduser())
    check_parts(config)
    check_trainer(config.trainer)
    resume_from = _find_resume(config)
    pretrained = find_pretrained(config, resume_from)
    if pretrained is not None:
        pretrained.configure(config, HydraConfig.get().overrides.task if HydraConfig.initialized() else ())

    data = instantiate(config.data)
    if pretrained is not None:
        data.adopt_tokenizer(pretrained.tokenizer)
    data.prepare_data()
    data.setup("fit")
    with open_dict(config):
        config.model.update(data.model_sizes())
    check_validation(config.trainer, data)
    done = 0 if resume_from is None else check_resume(config, resume_from, data)
    L.seed_everything(config.seed, workers=True, verbose=False)  # building a corpus draws nothing that the model sees
    task = instantiate(config.task, model=instantiate(config.model))
    if pretrained is not None:
        pretrained.initialize(task)
    if config.compile:
        task.model.compile()

    callbacks = [instantiate(node) for node in (config.callbacks or {}).values() if node is not None]
    loggers = _build_loggers(config.logger)
    if not loggers:  # Lightning's monitor refuses to run without one
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    if config.evolution is not None:
        callbacks.insert(0, instantiate(config.evolution))
    # RandomState before the others, whose draws are part of the run that a resume repeats.
    callbacks = [RandomState(), EpochRestart(), FinalValidation(), *callbacks]
    plain_config: Any = OmegaConf.to_container(config, resolve=True)
    for callback in callbacks:
        if isinstance(callback, SafeCheckpoint):
            callback.config = plain_config
    plugins = [VerifiedCheckpointIO()]
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers or False, plugins=plugins)

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


def _build_loggers(node: Any) -> list[Logger]:
    """What a configuration logs to: one logger, several by name as the callbacks are, or none."""
    nodes = [node] if node and "_target_" in node else (node or {}).values()
    return [instantiate(node) for node in nodes if node is not None]


def _hush() -> None:
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", module="lightning.*")


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE)


def _find_resume(config: DictConfig) -> Path | None:
    """The checkpoint to go on from, by ``ckpt_path`` or ``resume=auto``."""
    if config.resume not in (None, "auto"):
        raise ConfigError(f"resume={config.resume}: expected auto or null; a file is given by ckpt_path")
    if config.ckpt_path is not None:
        return resolve_checkpoint(config.ckpt_path, Path(config.paths.log_dir) / config.experiment_name)
    if config.resume == "auto":
        newest = newest_checkpoint(Path(config.paths.run_dir))
        if newest is None:
            rank_zero_info(
                f"resume=auto: no checkpoint in {config.paths.run_dir}, so this run starts at step 0; run_name=..."
                " names the folder of an earlier one, and ckpt_path=last goes on from the newest"
            )
        return newest
    return None


def evaluate(config: DictConfig) -> dict[str, float]:
    """Measure a checkpoint on a split of its data, or of other data of their kind, under both routing rules."""
    if config.split not in ("val", "test"):
        raise ConfigError(f"split={config.split}: expected val or test")
    check_accelerator("accelerator", config.accelerator, "accelerator=cpu")
    check_share("limit_batches", config.limit_batches)
    restored = restore(config.ckpt_path, config.log_dir, shlex.split(config.overrides))
    data = instantiate(restored.config.data)
    changes = data.adapt_to(restored.data_state, config.split)
    data.prepare_data()
    data.setup()
    data.check_meaning(restored.data_state)
    _hush()
    probe = None if config.probe is None else _build_probe(config, restored)
    pictures = None if config.pictures is None else _build_pictures(config, restored)
    callbacks: list[L.Callback] = [EvolutionProgress(), *(extra for extra in (probe, pictures) if extra is not None)]
    trainer = L.Trainer(
        accelerator=config.accelerator,
        devices=1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=config.limit_batches,
        limit_test_batches=config.limit_batches,
        use_distributed_sampler=False,
        default_root_dir=str(restored.path.parent),
    )
    measure = trainer.validate if config.split == "val" else trainer.test
    measure(restored.task, datamodule=data, verbose=False)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print(restored.path)
    if changes:
        print(f"Other data than those of the run: {changes}")
    if pictures is not None:
        print(f"Pictures: {pictures.folder}/*_{pictures.name}.png")
    table = Table(title=f"step {restored.step}, {config.split} split{' of other data' if changes else ''}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in values.items():
        table.add_row(name, f"{value:.4f}")
    Console(markup=False, emoji=False).print(table)
    return values


def _build_probe(config: DictConfig, restored: Restored) -> FewShotProbe:
    """The probe of a checkpoint, drawn as in the test of its run if that had one."""
    if not isinstance(config.probe, ListConfig) or not all(type(shots) is int for shots in config.probe):
        raise ConfigError(f"probe={config.probe}: expected images of each class, as in probe=[1,5,10]")
    if not isinstance(restored.task, ImageClassification):
        raise ConfigError(f"probe={config.probe} is for images, which {restored.path} does not read: leave it out")
    if config.split != "test":
        raise ConfigError(f"probe={config.probe} is for the test split: leave it out, or use split=test")
    options = _options_of_run(restored, "probe", "draws", "seed")
    return FewShotProbe(config.probe, **options, remedy="ask for no more, as in probe=[1], or leave it out")


def _build_pictures(config: DictConfig, restored: Restored) -> CheckpointPictures:
    """The pictures of a checkpoint, beside those of its run unless another folder is given."""
    if type(config.pictures) is not int or config.pictures < 1:
        raise ConfigError(f"pictures={config.pictures}: expected a number of images, as in pictures=8")
    if not isinstance(restored.task, ImageClassification):
        raise ConfigError(
            f"pictures={config.pictures} is for images, which {restored.path} does not read: leave it out"
        )
    if not any(layer.routes for layer in restored.task.model.moe_layers.values()):
        raise ConfigError(
            f"pictures={config.pictures} shows who goes where, and {restored.path} routes nothing: leave it out"
        )
    folder = restored.path.parent
    run_dir = folder.parent if folder.name == "checkpoints" else folder
    return CheckpointPictures(
        images=config.pictures,
        folder=Path(config.pictures_dir or run_dir / "pictures").expanduser(),
        name=f"{config.split}_step_{restored.step:08}",
        **_options_of_run(restored, "pictures", "slots"),
    )


def _options_of_run(restored: Restored, callback: str, *names: str) -> dict[str, Any]:
    """Options that a callback had in the run of a checkpoint."""
    node = OmegaConf.select(restored.config, f"callbacks.{callback}") or {}
    return {name: node[name] for name in names if name in node}
