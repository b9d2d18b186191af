"""What eval.py does: measure a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from evomoe.callbacks import EvolutionProgress, FewShotProbe
from evomoe.callbacks.monitoring.patch_pictures import CheckpointPictures
from evomoe.checks import check_accelerator, check_share, split_words
from evomoe.errors import ConfigError
from evomoe.instantiation import instantiate
from evomoe.quiet import hush
from evomoe.restoring import Restored, restore
from evomoe.tasks import ImageClassification


def evaluate(config: DictConfig) -> dict[str, float]:
    """Measure a checkpoint on a split of its data, or of other data of their kind, under both routing rules."""
    if config.split not in ("val", "test"):
        raise ConfigError(f"split={config.split}: expected val or test")
    check_accelerator("accelerator", config.accelerator, "accelerator=cpu")
    check_share("limit_batches", config.limit_batches)
    restored = restore(config.ckpt_path, config.log_dir, split_words("overrides", config.overrides))
    data = instantiate(restored.config.data)
    changes = data.adapt_to(restored.data_state, config.split)
    data.prepare_data()
    data.setup()
    data.check_meaning(restored.data_state)
    hush()
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
