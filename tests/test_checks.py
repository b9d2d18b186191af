"""What is refused before anything is read or built."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.programs import CONFIGS, compose
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

from evomoe.checks import check_accelerator, check_parts, check_share, check_trainer, check_validation
from evomoe.errors import ConfigError
from evomoe.tasks import LanguageModeling, MoETask

PAIRS = [
    (["experiment=gpt_switch", "model=roberta_tiny"], "the model is a RoBERTa, and task LanguageModeling trains a GPT"),
    (
        ["experiment=gpt_switch", "model=transformer_tiny"],
        "the model is a Transformer, and task LanguageModeling",
    ),
    (
        ["experiment=mlm_switch", "model=gpt_tiny"],
        "the model is a GPT, and task MaskedLanguageModeling trains",
    ),
    (["experiment=mt_switch", "model=gpt_tiny"], "the model is a GPT, and task Translation trains a Transformer"),
    (["experiment=gpt_dts", "model=vit_tiny"], "the model is a ViT, and task LanguageModeling trains a GPT"),
    (
        ["experiment=gpt_switch", "data=locale_pairs"],
        "the data are sentence pairs, and task LanguageModeling reads",
    ),
    (["experiment=mt_dts", "data=docs"], "the data are text, and task Translation reads sentence pairs"),
    (["experiment=vit_soft", "data=docs"], "the data are text, and task ImageClassification reads images"),
    (["experiment=glue_switch", "data=docs"], "the data are text, and task SequenceClassification reads labelled sent"),
]


@pytest.mark.parametrize(("overrides", "message"), PAIRS)
def test_parts_that_are_made_for_others_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=f"{message}.*choose .* that go together"):
        check_parts(compose(*overrides, run_dir=Path("run")))


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml")))
def test_the_parts_of_an_experiment_go_together(experiment):
    config = compose(f"experiment={experiment}", "trainer.accelerator=auto", run_dir=Path("run"))
    check_parts(config)
    check_trainer(config.trainer)


class Inheriting(LanguageModeling):
    """Says nothing of its model itself."""


class Open(MoETask):
    """Takes any network."""


def test_a_task_of_the_users_own_is_judged_by_what_it_says():
    config = compose("experiment=gpt_switch", "model=roberta_tiny", run_dir=Path("run"))
    config.task._target_ = f"{__name__}.Inheriting"
    with pytest.raises(ConfigError, match="the model is a RoBERTa, and task Inheriting trains a GPT"):
        check_parts(config)
    config.task._target_ = f"{__name__}.Open"
    check_parts(config)


def test_a_class_that_cannot_be_imported_is_named():
    config = compose("experiment=gpt_switch", run_dir=Path("run"))
    config.task._target_ = "evomoe.tasks.LanguageModelling"
    with pytest.raises(ConfigError, match=r"^task\._target_=evomoe\.tasks\.LanguageModelling cannot be imported: "):
        check_parts(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.check_val_every_n_epoch=0", "check_val_every_n_epoch=0: expected a whole number of at least 1"),
        ("trainer.accumulate_grad_batches=0", "accumulate_grad_batches=0: expected a whole number of at least 1"),
        (
            "trainer.val_check_interval=0",
            "val_check_interval=0: expected a number of batches of at least 1, or a",
        ),
        ("trainer.val_check_interval=1.5", "val_check_interval=1.5: expected a number of batches of at least 1, or a"),
        ("trainer.gradient_clip_val=-1", "gradient_clip_val=-1: expected a number above 0, or null"),
        ("trainer.accelerator=gpuu", "accelerator=gpuu is unknown: expected cpu, gpu or auto"),
        ("trainer.devices=two", r"devices=two: expected a number of devices, a list such as \[0,1\], or auto"),
        ("+trainer.num_nodes=two", "num_nodes=two: expected a whole number of at least 1"),
        ("+trainer.limit_train_batches=all", "limit_train_batches=all: expected a number of batches of at least 1"),
        ("+trainer.overfit_batches=1.5", "overfit_batches=1.5: expected a number of batches of at least 1"),
    ],
)
def test_options_that_lightning_stumbles_over_later_are_refused(override, message):
    with pytest.raises(ConfigError, match=f"^trainer.{message}"):
        check_trainer(compose("experiment=gpt_dts", override, run_dir=Path("run")).trainer)


def test_a_run_without_end_is_refused():
    with pytest.raises(ConfigError, match=r"^the run has no end: set trainer\.max_steps=1000 or trainer\.max_epochs=2"):
        check_trainer(compose("trainer.max_steps=-1", run_dir=Path("run")).trainer)
    check_trainer(compose("trainer.max_steps=-1", "trainer.max_epochs=2", run_dir=Path("run")).trainer)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.devices=2"], "devices=2 means 2 processes, .*: add trainer=ddp trainer.devices=2$"),
        (["trainer.devices=[0,3]"], r"devices=\[0,3\] means 2 .*: add trainer=ddp trainer.devices=\[0,3\]$"),
        (["trainer.devices='0,1,2'"], "devices=0,1,2 means 3 processes"),
        (["trainer.devices=auto"], "devices=auto means 8 processes"),
        (["+trainer.num_nodes=2"], r"devices=1 \+trainer.num_nodes=2 means 2 processes"),
        (["trainer.devices=2", "+trainer.strategy=auto"], "devices=2 means 2 processes"),
        (["trainer.devices=2", "+trainer.strategy=ddp"], "devices=2 means 2 processes"),
        (["trainer.devices=2", "trainer.precision=bf16-mixed"], ".*add trainer=ddp .*=2 trainer.precision=bf16-mixed$"),
    ],
)
def test_several_processes_need_a_strategy(monkeypatch, overrides, message):
    monkeypatch.setattr(CUDAAccelerator, "auto_device_count", lambda: 8)
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=f"^trainer.{message}"):
        check_trainer(compose(*overrides, run_dir=Path("run")).trainer)
    chosen = [override for override in overrides if "strategy" not in override]
    check_trainer(compose("trainer=ddp", *chosen, run_dir=Path("run")).trainer)


@pytest.mark.parametrize("devices", ["-1", "[0]", "[0,1]", "'0,'"])
@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_devices_of_a_cpu_are_a_number(monkeypatch, accelerator, devices):
    for kind in (CUDAAccelerator, MPSAccelerator):
        monkeypatch.setattr(kind, "is_available", lambda: False)
    options = ["trainer=ddp", f"trainer.accelerator={accelerator}", f"trainer.devices={devices}"]
    with pytest.raises(ConfigError, match=r"^trainer.devices=.* on the CPU: expected a number of processes$"):
        check_trainer(compose(*options, run_dir=Path("run")).trainer)


@pytest.mark.parametrize(
    ("devices", "gpus"), [("1", 0), ("auto", 0), *((devices, 1) for devices in ("1", "auto", "-1", "[0]", "'0,'"))]
)
def test_one_process_needs_none(monkeypatch, devices, gpus):
    monkeypatch.setattr(CUDAAccelerator, "auto_device_count", lambda: gpus)
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: gpus > 0)
    check_trainer(compose(f"trainer.devices={devices}", run_dir=Path("run")).trainer)


@pytest.mark.parametrize(
    ("override", "batches"),
    [
        ("trainer.devices=1", 20),
        ("trainer.devices=2", 10),
        ("+trainer.limit_train_batches=7", 7),
        ("+trainer.limit_train_batches=70", 20),
        ("+trainer.limit_train_batches=0.25", 5),
        ("+trainer.overfit_batches=3", 3),
    ],
)
def test_a_validation_beyond_the_end_of_an_epoch_is_refused(override, batches):
    data = SimpleNamespace(train_dataloader=lambda: range(20))
    within = ["trainer.check_val_every_n_epoch=1", override]
    check_validation(compose(*within, f"trainer.val_check_interval={batches}", run_dir=Path("run")).trainer, data)
    with pytest.raises(ConfigError, match=f"val_check_interval={batches + 1} is more than the {batches} batches of an"):
        check_validation(
            compose(*within, f"trainer.val_check_interval={batches + 1}", run_dir=Path("run")).trainer, data
        )


@pytest.mark.parametrize("value", [0, -1, 0.0, 1.5, "all", True])
def test_neither_a_number_of_batches_nor_a_share(value):
    with pytest.raises(ConfigError, match=f"limit_batches={value}: expected a number of batches"):
        check_share("limit_batches", value)


def test_what_is_there_passes():
    for value in (1, 20, 0.5, 1.0):
        check_share("limit_batches", value)
    check_accelerator("accelerator", "cpu", "")
    check_accelerator("accelerator", "auto", "")
