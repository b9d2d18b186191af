"""Checkpoints measured by eval.py, inside this process."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from helpers.programs import PLAIN, compose, read_csv

from evomoe.checkpointing import list_checkpoints
from evomoe.errors import ConfigError
from evomoe.evaluation import evaluate


def evaluate_trained(trained, *overrides: str) -> dict[str, float]:
    return evaluate(compose(f"log_dir={trained.logs}", "accelerator=cpu", *overrides, config="eval"))


@pytest.mark.parametrize("step", [5, 10, 15, 20], ids=["diversify", "sparsify", "hardened", "end"])
def test_a_checkpoint_measures_what_training_logged_there(trained, step):
    (logged,) = (row for row in read_csv(trained.folder) if row["val/loss"] and int(row["step"]) == step - 1)
    measured = evaluate_trained(trained, "split=val", f"ckpt_path={list_checkpoints(trained.folder)[step]}")
    for name in ("val/loss", "val/loss_sparse", "val/perplexity", "val/perplexity_sparse", "val/bits_per_byte"):
        assert measured[name] == pytest.approx(float(logged[name]), abs=1e-5, rel=1e-5), name
    assert (measured["val/loss"] == measured["val/loss_sparse"]) == (step != 10)


def test_the_test_split_measures_what_the_run_returned(trained, capsys):
    measured = evaluate_trained(trained)
    for name, value in measured.items():
        assert value == pytest.approx(trained.values[name], abs=1e-5, rel=1e-5), name
    table = capsys.readouterr().out
    assert "step 20, test split" in " ".join(table.split())
    assert f"{measured['test/loss_sparse']:.4f}" in table


def test_overrides_change_how_a_checkpoint_is_measured(trained):
    whole = evaluate_trained(trained, "split=val")
    small = evaluate_trained(trained, "split=val", 'overrides="data.eval_batch_size=3 data.num_workers=0"')
    assert small["val/loss"] == pytest.approx(whole["val/loss"], abs=1e-5)
    assert evaluate_trained(trained, "split=val", "limit_batches=1")["val/loss"] != whole["val/loss"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["split=train"], "split=train: expected val or test"),
        (["ckpt_path=nowhere"], "ckpt_path=nowhere: there is no such file"),
        (['overrides="data.batchsize=3"'], "there is no key 'data.batchsize'; did you mean 'data.batch_size'?"),
        (
            ['overrides="data=text_files data.test=a.txt"'],
            "overrides=data=text_files chooses a group, and a checkpoint",
        ),
        (['overrides="trainer.limit_test_batches=1"'], "would change nothing: what is measured is decided by data.*"),
        (['overrides="router.gate.threshold=0.5"'], "overrides=router.gate.threshold=0.5 would change nothing"),
        (['overrides="task.optimization.learning_rate=5"'], "would change nothing"),
        (['overrides="model.d_model=64"'], "describe another model than the one in"),
        (['overrides="model.d_model=2.5"'], "model.d_model=2.5: expected a whole number"),
        (
            ['overrides="model._target_=evomoe.run.Path"'],
            "names the target evomoe.run.Path, which is no class of evomoe",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(trained, overrides, message):
    with pytest.raises(ConfigError) as caught:
        evaluate_trained(trained, *overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_text_is_measured_with_the_tokenizer_of_the_checkpoint(train, tmp_path, capsys):
    """Other text to train on would bring another tokenizer, whose numbers mean nothing to the model."""

    def write(name: str, word: str) -> Path:
        (tmp_path / name).write_text("".join(f"Line {number} is of the {word} text.\n\n" for number in range(2000)))
        return tmp_path / name

    given = write("train.txt", "first")
    other = write("other.txt", "second")
    _, objects = train(
        tmp_path / "run",
        *PLAIN,
        *(f"data.train={given}", "data.val=null", "data.test=null"),
        *("trainer.max_steps=4", "trainer.val_check_interval=4"),
    )

    def measure(*overrides: str, split: str = "test") -> dict[str, float]:
        chosen = [f"split={split}", f'overrides="{" ".join(overrides)}"']
        return evaluate(compose(f"ckpt_path={tmp_path / 'run'}", "accelerator=cpu", *chosen, config="eval"))

    assert measure()["test/loss"] > 0
    assert "ther data" not in capsys.readouterr().out
    measured = measure(f"data.test={other}")  # nothing is held out for a test now: there is more to train on
    shown = capsys.readouterr().out
    assert "Other data than those of the run: files.test None -> " in shown
    assert "test split of other data" in " ".join(shown.split())
    ids = objects.data.tokenizer.encode(other.read_text())
    assert measured["test/bits_per_byte"] == pytest.approx(
        measured["test/loss"] * (len(ids) + 1) / len(other.read_bytes()) / math.log(2), rel=1e-2
    )
    write("train.txt", "third")
    assert measure(f"data.test={other}") == measured
    for overrides, split in (([], "test"), (["data.holdout=0.1"], "test"), ([f"data.test={other}"], "val")):
        with pytest.raises(ConfigError) as caught:
            measure(*overrides, split=split)
        message = str(caught.value)
        assert message.startswith(f"split={split} would be held out of a text that is not the one of the run (")
        assert message.endswith(f'give a file for it, as in overrides="data.{split}=FILE"')
        assert "\n" not in message


@pytest.mark.parametrize("experiment", ["mlm_switch", "mt_switch"])
def test_other_text_is_measured_whatever_the_task(train, tmp_path, experiment):
    short = ["trainer.max_steps=2", "trainer.val_check_interval=2"]
    train(tmp_path / "run", *PLAIN[:2], *short, experiment=experiment)
    lines = "".join(f"Line {number} of another text.\n" for number in range(300))
    for name in ("other.txt", "other.en", "other.up"):
        (tmp_path / name).write_text(lines)
    test = tmp_path / ("other" if experiment == "mt_switch" else "other.txt")
    chosen = f'overrides="data.test={test}"'
    values = evaluate(compose(f"ckpt_path={tmp_path / 'run'}", "accelerator=cpu", chosen, config="eval"))
    assert values["test/loss"] > 0


@pytest.mark.parametrize(
    ("experiment", "guess"), [("mlm_switch", "unigram_accuracy"), ("glue_switch", "majority_accuracy")]
)
def test_the_constant_guess_is_of_a_test_alone(train, tmp_path, experiment, guess):
    train(tmp_path / "run", *PLAIN, "trainer.max_steps=2", "trainer.val_check_interval=2", experiment=experiment)
    for split in ("val", "test"):
        config = compose(f"ckpt_path={tmp_path / 'run'}", "accelerator=cpu", f"split={split}", config="eval")
        assert (f"{split}/{guess}" in evaluate(config)) == (split == "test")


def test_sentences_are_measured_by_the_tokenizer_and_the_classes_of_the_checkpoint(train, tmp_path):
    rows = [f"number {number} is here\t{'odd' if number % 2 else 'even'}" for number in range(200)]

    def write(name: str, lines: list[str]) -> str:
        (tmp_path / name).write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
        return str(tmp_path / name)

    given = [f"data.train={write('train.tsv', rows)}", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    values, objects = train(
        tmp_path / "run", *PLAIN[:2], *given, "trainer.limit_test_batches=1.0", experiment="glue_switch"
    )
    fields = [
        objects.data.tokenizer.decode(row[valid][1:-1].tolist())
        for batch in objects.data.test_dataloader()
        for row, valid in zip(batch["tokens"], batch["valid"], strict=True)
    ]
    held_out = [row for row in rows if row.partition("\t")[0] in fields]
    assert len(held_out) == len(fields) > 10

    def measure(*overrides: str) -> dict[str, float]:
        return evaluate(compose(f"ckpt_path={tmp_path / 'run'}", "accelerator=cpu", *overrides, config="eval"))

    # The test as a file of its own leaves more to train on, of which a tokenizer would be another one.
    other = write("other.tsv", held_out)
    measured = measure(f'overrides="data.test={other}"')
    assert measured["test/loss"] == pytest.approx(values["test/loss"], rel=1e-5)
    write("train.tsv", [row.replace("odd", "a") for row in rows])
    write("other.tsv", [row.replace("odd", "a") for row in held_out])
    with pytest.raises(ConfigError) as caught:
        measure(f'overrides="data.test={other}"')
    assert str(caught.value) == (
        "the checkpoint was trained on other classes (['even', 'odd']) than this data have (['a', 'even']); restore "
        "data.train"
    )


def test_a_probe_of_a_checkpoint_is_that_of_the_run(classifier):
    assert (classifier.folder / "pictures" / "block_1_step_00000020.png").exists()
    config = compose("accelerator=cpu", f"ckpt_path={classifier.folder}", "probe=[1,10]", config="eval")
    measured = evaluate(config)
    assert {name for name in measured if "probe" in name} == {"test/probe_1shot", "test/probe_10shot"}
    for name, value in measured.items():
        assert value == pytest.approx(classifier.values[name], abs=1e-5), name
    assert measured["test/probe_10shot"] > 0.3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["probe=[1]", "split=val"], "probe=[1] is for the test split: leave it out, or use split=test"),
        (["probe=5"], "probe=5: expected images of each class, as in probe=[1,5,10]"),
        (["probe=[a]"], "probe=['a']: expected images of each class, as in probe=[1,5,10]"),
        (["probe=[]"], "probe shots=[]: expected images of each class, such as [1,5,10]"),
        (["probe=[999]"], "probe shots=[999]: the class"),
        (["pictures=0"], "pictures=0: expected a number of images, as in pictures=8"),
        (["pictures=[8]"], "pictures=[8]: expected a number of images, as in pictures=8"),
    ],
)
def test_what_images_cannot_have_is_refused_in_one_line(classifier, overrides, message):
    with pytest.raises(ConfigError) as caught:
        evaluate(compose("accelerator=cpu", f"ckpt_path={classifier.folder}", *overrides, config="eval"))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert "callbacks." not in str(caught.value)


def test_text_has_neither_probe_nor_pictures(trained):
    for option in ("probe=[1]", "pictures=8"):
        with pytest.raises(
            ConfigError, match=re.escape(option) + " is for images, which .* does not read: leave it out"
        ):
            evaluate_trained(trained, option)


def test_a_probe_is_drawn_as_in_the_run(train, tmp_path):
    draws = ["callbacks.probe.draws=2", "+callbacks.probe.seed=7", "callbacks.probe.shots=[1]"]
    whole = ["trainer.limit_test_batches=1.0", "logger=none", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    values, _ = train(tmp_path / "run", *whole, *draws, experiment="vit_soft")

    def measure(*overrides: str) -> float:
        given = ["accelerator=cpu", f"ckpt_path={tmp_path / 'run'}", "probe=[1]", *overrides]
        return evaluate(compose(*given, config="eval"))["test/probe_1shot"]

    assert measure() == pytest.approx(values["test/probe_1shot"], abs=1e-6)
    assert measure('overrides="callbacks.probe.seed=8"') != measure()


def test_pictures_of_a_checkpoint_are_those_of_the_run(classifier, tmp_path, capsys):
    given = ["accelerator=cpu", f"ckpt_path={classifier.folder}", "pictures=8"]
    evaluate(compose(*given, "split=val", "limit_batches=2", config="eval"))
    pictures = classifier.folder / "pictures"
    assert f"Pictures: {pictures}/*_val_step_00000020.png" in capsys.readouterr().out
    drawn = sorted(pictures.glob("*_val_step_00000020.png"))
    assert [path.name.partition("_val")[0] for path in drawn] == list(classifier.task.model.moe_layers)
    for path in drawn:
        assert path.read_bytes() == (pictures / path.name.replace("_val", "")).read_bytes()

    evaluate(compose(*given, f"pictures_dir={tmp_path / 'given'}", config="eval"))
    assert len(list((tmp_path / "given").glob("*_test_step_00000020.png"))) == len(drawn)


def test_a_model_that_routes_nothing_has_no_pictures(train, tmp_path):
    short = [*PLAIN, "trainer.max_steps=2", "trainer.val_check_interval=2"]
    train(tmp_path / "run", *short, experiment="vit_dense")
    given = ["accelerator=cpu", f"ckpt_path={tmp_path / 'run'}", "pictures=8"]
    with pytest.raises(ConfigError, match=r"^pictures=8 shows who goes where, and .* routes nothing: leave it out$"):
        evaluate(compose(*given, config="eval"))
