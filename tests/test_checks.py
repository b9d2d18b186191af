"""What is refused before anything is read or built."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.programs import CONFIGS, compose

from evomoe.checks import check_accelerator, check_parts, check_share, check_trainer
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
        ("trainer.accumulate_grad_batches=0", "accumulate_grad_batches=0: expected a whole number of at least 1"),
        (
            "trainer.val_check_interval=0",
            "val_check_interval=0: expected a number of batches of at least 1, or a",
        ),
        ("trainer.val_check_interval=1.5", "val_check_interval=1.5: expected a number of batches of at least 1, or a"),
        ("trainer.gradient_clip_val=-1", "gradient_clip_val=-1: expected a number above 0, or null"),
        ("trainer.accelerator=gpuu", "accelerator=gpuu is unknown: expected cpu, gpu or auto"),
    ],
)
def test_options_that_lightning_stumbles_over_later_are_refused(override, message):
    with pytest.raises(ConfigError, match=f"^trainer.{message}"):
        check_trainer(compose("experiment=gpt_dts", override, run_dir=Path("run")).trainer)


@pytest.mark.parametrize("value", [0, -1, 0.0, 1.5, "all", True])
def test_neither_a_number_of_batches_nor_a_share(value):
    with pytest.raises(ConfigError, match=f"limit_batches={value}: expected a number of batches"):
        check_share("limit_batches", value)


def test_what_is_there_passes():
    for value in (1, 20, 0.5, 1.0):
        check_share("limit_batches", value)
    check_accelerator("accelerator", "cpu", "")
    check_accelerator("accelerator", "auto", "")
