"""Where a checkpoint is, and what comes back from it."""

from __future__ import annotations

import os
from pathlib import Path

import lightning as L
import pytest
from helpers.programs import compose, equal, load
from omegaconf import OmegaConf

from evomoe.callbacks.evolution import moe_layers
from evomoe.checkpointing import checkpoint_path, list_checkpoints, save_checkpoint
from evomoe.checks import check_resume
from evomoe.errors import ConfigError
from evomoe.pretrained import find_pretrained
from evomoe.restoring import resolve_checkpoint, restore


def touch(folder: Path, step: int, age: float) -> Path:
    path = checkpoint_path(folder, step)
    save_checkpoint({"pytorch-lightning_version": "2", "state_dict": {}}, path)
    moment = path.stat().st_mtime - age
    os.utime(path, (moment, moment))
    return path


def test_last_is_the_newest_step_of_the_run_that_saved_last(tmp_path):
    touch(tmp_path / "exp" / "one", 900, age=100)
    touch(tmp_path / "exp" / "two", 5, age=0)
    newest = touch(tmp_path / "exp" / "two", 7, age=50)
    assert resolve_checkpoint("last", tmp_path) == newest
    assert resolve_checkpoint(str(tmp_path / "exp" / "one"), tmp_path).name == "step_00000900.ckpt"
    assert resolve_checkpoint(str(newest), tmp_path / "elsewhere") == newest
    assert resolve_checkpoint(str(newest.parents[2]), tmp_path / "elsewhere") == newest  # a folder of runs
    with pytest.raises(ConfigError, match="ckpt_path=last: there is no checkpoint below"):
        resolve_checkpoint("last", tmp_path / "empty")
    with pytest.raises(ConfigError, match="no best checkpoint yet"):
        resolve_checkpoint("best", tmp_path)
    with pytest.raises(ConfigError, match="^ckpt_path=5: there is no such file or folder"):
        resolve_checkpoint(5, tmp_path)


def test_last_falls_back_over_a_damaged_file(tmp_path):
    whole = touch(tmp_path / "exp" / "one", 1, age=10)
    os.truncate(touch(tmp_path / "exp" / "one", 2, age=0), 10)
    with pytest.warns(UserWarning, match=r"step_00000002\.ckpt is damaged"):
        assert resolve_checkpoint("last", tmp_path) == whole


def test_a_checkpoint_of_another_callback_is_refused_by_all_who_read_one(tmp_path):
    """Such as Lightning's own, which tells nothing of the configuration."""
    path = touch(tmp_path / "run", 1, age=0)
    config = compose("experiment=glue_dts", f"init_from={path}", run_dir=tmp_path)
    for read in (
        lambda: restore(str(path)),
        lambda: check_resume(config, path, L.LightningDataModule()),
        lambda: find_pretrained(config, None),
        lambda: find_pretrained(config, path),
    ):
        with pytest.raises(ConfigError, match=r"step_00000001\.ckpt says nothing of the run .* callbacks\.checkpoint"):
            read()


def test_an_option_younger_than_a_checkpoint_was_at_its_default(tmp_path):
    config = compose("experiment=vit_soft", run_dir=tmp_path)
    older = OmegaConf.to_container(config, resolve=False)
    del older["model"]["stem"], older["model"]["expert_backend"]  # the model's own, and one of its blocks'
    path = checkpoint_path(tmp_path, 3)
    save_checkpoint(
        {"pytorch-lightning_version": "2", "state_dict": {}, "global_step": 3, "evomoe": {"config": older}}, path
    )
    assert check_resume(config, path, L.LightningDataModule()) == 3
    changed = compose("experiment=vit_soft", "model.stem=conv", run_dir=tmp_path)
    with pytest.raises(ConfigError, match="it was trained with model.stem=patch and this run has conv; restore it"):
        check_resume(changed, path, L.LightningDataModule())


def test_a_restored_model_is_the_trained_one_at_the_schedule_of_its_step(trained):
    restored = restore("last", str(trained.logs))
    assert restored.step == 20
    assert equal(dict(restored.task.state_dict()), dict(trained.task.state_dict()))
    assert not restored.task.training
    ((_, layer),) = moe_layers(restored.task)
    assert layer.router.hardened
    assert layer.router.temperature.item() == pytest.approx(0.05)
    young = restore(str(list_checkpoints(trained.folder)[10]))
    ((_, layer),) = moe_layers(young.task)
    assert not layer.router.hardened
    assert layer.router.temperature.item() == pytest.approx(2 * (0.05 / 2) ** (2 / 6))
    assert layer.live_experts == 4
    assert restored.tokenizer.encode("the same") == trained.data.tokenizer.encode("the same")


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("task.optimization", "os.system"),
        ("model", "evomoe.checkpointing.os.mkdir"),
        ("model", "evomoe.run.Path"),
        ("router.gate", "torch.utils.cpp_extension.load_inline"),
        ("data", "evomoe.no.such.Class"),
        ("evolution.noise", "${oc.env:HOME}"),
    ],
)
def test_a_checkpoint_cannot_choose_what_is_called(trained, tmp_path, key, target):
    checkpoint = load(trained.folder)
    config = OmegaConf.create(checkpoint["evomoe"]["config"])
    OmegaConf.update(config, f"{key}._target_", target)
    checkpoint["evomoe"]["config"] = OmegaConf.to_container(config, resolve=False)
    path = tmp_path / "hostile.ckpt"
    save_checkpoint(checkpoint, path)
    with pytest.raises(ConfigError, match="hostile.ckpt names the target .*, which is no class of evomoe"):
        restore(str(path))
