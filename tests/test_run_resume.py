"""Runs that go on from a checkpoint, inside this process; tests/cli/test_kills.py kills real ones."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.programs import HARD, PLAIN, KeepLosses, equal, load, timeless

from evomoe.checkpointing import list_checkpoints, newest_checkpoint
from evomoe.errors import ConfigError


def states(folder: Path) -> dict:
    """All that the last checkpoint holds, but for the names of its run and its times."""
    return timeless(load(folder))


@pytest.fixture(scope="session")
def train_hard(train):
    """Trains with dropout and accumulation, 20 steps of two batches in phases of 4, 8 and 8; keeps all checkpoints."""

    def train_hard(folder: Path, *overrides: str, experiment: str = "gpt_dts") -> SimpleNamespace:
        plan = [
            "evolution.diversify=4",
            "evolution.harden=12",
            "evolution.temperature.length=6",
            "evolution.noise.length=8",
        ]
        saves = [
            "callbacks.checkpoint.every_n_steps=1",
            "+callbacks.checkpoint.keep_last=99",
            "trainer.val_check_interval=6",
        ]
        keep = "+callbacks.losses._target_=helpers.programs.KeepLosses"
        overrides = (*PLAIN, *HARD, *plan, *saves, keep, *overrides)
        values, objects = train(folder, *overrides, experiment=experiment)
        (losses,) = (callback.seen for callback in objects.callbacks if isinstance(callback, KeepLosses))
        return SimpleNamespace(folder=folder, values=values, losses=losses)

    return train_hard


@pytest.fixture(scope="module")
def uninterrupted(train_hard, tmp_path_factory) -> SimpleNamespace:
    return train_hard(tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize("step", [2, 4, 5, 12, 17], ids=["diversify", "spawn", "sparsify", "harden", "hardened"])
def test_a_resumed_run_ends_as_if_it_had_not_stopped(train_hard, uninterrupted, tmp_path, step):
    resumed = train_hard(tmp_path, f"ckpt_path={list_checkpoints(uninterrupted.folder)[step]}")
    assert resumed.losses == uninterrupted.losses[2 * step :]
    assert resumed.values == uninterrupted.values
    assert equal(states(tmp_path), states(uninterrupted.folder))


@pytest.mark.parametrize("experiment", ["mlm_dts", "mt_dts", "glue_dts"])
def test_other_tasks_resume_as_well(train_hard, tmp_path, experiment):
    whole = train_hard(tmp_path / "whole", experiment=experiment)
    checkpoint = list_checkpoints(whole.folder)[9]
    resumed = train_hard(tmp_path / "resumed", f"ckpt_path={checkpoint}", experiment=experiment)
    assert resumed.losses == whole.losses[18:]
    assert resumed.values == whole.values
    assert equal(states(resumed.folder), states(whole.folder))


def test_resume_auto_begins_where_there_is_nothing_to_resume(train_hard, uninterrupted, tmp_path):
    assert train_hard(tmp_path, "resume=auto").losses == uninterrupted.losses


def test_resume_auto_passes_over_a_damaged_checkpoint(train_hard, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted.folder, tmp_path, dirs_exist_ok=True)
    for step in (18, 19, 20):
        os.truncate(list_checkpoints(tmp_path)[step], 1000)
    assert train_hard(tmp_path, "resume=auto").losses == uninterrupted.losses[34:]
    assert equal(states(tmp_path), states(uninterrupted.folder))


def test_a_run_of_epochs_resumes_inside_one(train_hard, tmp_path):
    epochs = ["trainer.max_steps=-1", "trainer.max_epochs=2", "+trainer.limit_train_batches=9"]
    shares = ["evolution.diversify=0.2", "evolution.harden=0.8"]
    lengths = ["evolution.temperature.length=0.5", "evolution.noise.length=0.5", "trainer.val_check_interval=4"]
    whole = train_hard(tmp_path / "whole", *epochs, *shares, *lengths)
    paths = list_checkpoints(whole.folder)
    assert len(whole.losses) == 18
    assert list(paths) == list(range(1, 11))  # five steps an epoch, the fifth of one batch
    for step, batches_left in ((2, 14), (5, 9), (7, 5)):  # each resumes the one before
        part = train_hard(tmp_path / f"from_{step}", *epochs, *shares, *lengths, f"ckpt_path={paths[step]}")
        assert part.losses == whole.losses[-batches_left:]
        assert equal(states(part.folder), states(whole.folder))
        paths = list_checkpoints(part.folder)


def test_a_file_that_is_no_checkpoint_is_refused_by_name(train, tmp_path):
    file = tmp_path / "notes.ckpt"
    file.write_text("notes")
    with pytest.raises(ConfigError, match=r"notes\.ckpt has no notes\.ckpt\.sha256 beside it"):
        train(tmp_path, *PLAIN, f"ckpt_path={file}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file.with_name("notes.ckpt.sha256").write_text(f"{digest}  notes.ckpt\n")
    with pytest.raises(ConfigError, match=r"notes\.ckpt holds content that cannot be read"):
        train(tmp_path, *PLAIN, f"ckpt_path={file}")


def test_a_checkpoint_of_other_data_is_refused(train, uninterrupted, tmp_path):
    files = []
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.txt").write_text(f"Another text to {split}, without a word of the first one.\n" * 500)
        files.append(f"data.{split}={tmp_path / f'{split}.txt'}")
    start = newest_checkpoint(uninterrupted.folder)
    with pytest.raises(ConfigError, match="the checkpoint was trained on other data"):
        train(tmp_path, *PLAIN, *files, f"ckpt_path={start}")
    with pytest.raises(ConfigError, match=r"the checkpoint was trained on other data \(vocab_size \d+ -> 270\)"):
        train(tmp_path, *PLAIN, "data.vocab_size=270", f"ckpt_path={start}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "router=switch",
            "it was trained with router.gate._target_=evomoe.routing.DTSGate and this run has evomoe.rou",
        ),
        ("model.num_experts=3", "it was trained with model.num_experts=4 and this run has 3"),
        ("model.num_layers=4", "it was trained with model.num_layers=2 and this run has 4"),
    ],
)
def test_another_method_or_size_is_refused(train_hard, uninterrupted, tmp_path, change, message):
    with pytest.raises(ConfigError, match=f"cannot resume from .*: {message}"):
        train_hard(tmp_path, change, f"ckpt_path={newest_checkpoint(uninterrupted.folder)}")


@pytest.mark.parametrize(
    ("overrides", "experiment", "message"),
    [
        (["evolution=none"], "gpt_dts", "it was trained with an evolution and this run has no evolution; restore"),
        (["evolution=diversify"], "gpt_switch", "it was trained with no evolution and this run has an evolution"),
    ],
)
def test_an_evolution_cannot_come_or_go(train, tmp_path, overrides, experiment, message):
    short = [*PLAIN, "test=false", "trainer.max_steps=10", "callbacks.checkpoint.every_n_steps=1"]
    train(tmp_path, *short, experiment=experiment)
    with pytest.raises(ConfigError, match=f"^cannot resume from .*: {message}"):
        train(tmp_path, *short, *overrides, "resume=auto", "trainer.max_steps=20", experiment=experiment)


def test_options_of_the_optimizer_may_change_in_the_middle(train_hard, uninterrupted, tmp_path, caplog):
    first = list_checkpoints(uninterrupted.folder)[17]
    options = [f"task.optimization.{key}" for key in ("learning_rate=1e-6", "weight_decay=0.5", "beta2=0.5")]
    with caplog.at_level("INFO"):
        train_hard(tmp_path, *options, f"ckpt_path={first}")
    groups = load(tmp_path)["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert {(group["initial_lr"], group["betas"]) for group in groups} == {(1e-6, (0.9, 0.5))}
    assert all(group["lr"] <= 1e-6 for group in groups)
    assert "Going on with task.optimization.learning_rate=1e-06 (before: " in caplog.text


def test_resume_auto_goes_on_in_its_folder_rather_than_from_where_it_began(train_hard, uninterrupted, tmp_path):
    """So that the same command, repeated, goes on."""
    began = f"ckpt_path={list_checkpoints(uninterrupted.folder)[14]}"
    first = train_hard(tmp_path, began, "resume=auto", "trainer.max_steps=18")
    again = train_hard(tmp_path, began, "resume=auto")
    assert (len(first.losses), len(again.losses)) == (8, 4)


def test_dropout_may_change_in_the_middle(train_hard, uninterrupted, tmp_path):
    first = list_checkpoints(uninterrupted.folder)[17]
    assert len(train_hard(tmp_path, "model.dropout=0.0", f"ckpt_path={first}").losses) == 6
