"""Runs inside this process: what they return, restore, measure and write; the programs are tested in tests/cli."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.programs import CONFIGS, HARD, PLAIN, compose, equal, load
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import OmegaConf

from evomoe import run, writing
from evomoe.callbacks import EvolutionProgress
from evomoe.callbacks.evolution import moe_layers
from evomoe.checkpointing import checkpoint_path, list_checkpoints, save_checkpoint
from evomoe.cli import quote_text
from evomoe.errors import ConfigError, NonFiniteError


@pytest.fixture(scope="session")
def trained(train, tmp_path_factory) -> SimpleNamespace:
    """A run of all three phases with all callbacks, left as it ended."""
    logs = tmp_path_factory.mktemp("logs")
    folder = logs / "gpt_dts" / "first"
    plan = [
        "evolution.diversify=7",
        "evolution.harden=13",
        "evolution.temperature.length=6",
        "evolution.noise.length=6",
    ]
    saves = [
        "callbacks.checkpoint.every_n_steps=5",
        "+callbacks.checkpoint.keep_last=9",
        "trainer.val_check_interval=5",
    ]
    whole = ["trainer.limit_val_batches=1.0", "trainer.limit_test_batches=1.0", "data.eval_batch_size=64"]
    values, objects = train(folder, "logger=csv", *plan, *saves, *whole)
    return SimpleNamespace(values=values, folder=folder, logs=logs, **vars(objects))


# -- train ------------------------------------------------------------------------------------------------------------


def test_a_run_returns_its_metrics_and_its_objects(trained):
    assert {"train/loss", "val/loss", "val/loss_sparse", "test/loss", "test/bits_per_byte"} <= trained.values.keys()
    assert {"moe/active_experts", "moe/block_1/dropped", "evolution/temperature"} <= trained.values.keys()
    assert all(type(value) is float for value in trained.values.values())
    assert trained.trainer.global_step == 20
    assert trained.config.model.vocab_size == trained.data.vocab_size == trained.task.model.vocab_size
    assert {"checkpoints", "csv", "summary.json", "summary.md"} <= {path.name for path in trained.folder.iterdir()}
    assert trained.values["val/loss"] == trained.values["val/loss_sparse"]  # hardened


def read_csv(folder: Path) -> list[dict[str, str]]:
    header, *lines = (folder / "csv" / "metrics.csv").read_text().splitlines()
    return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]


def test_what_is_logged_reaches_the_logger_at_its_steps(train, tmp_path):
    train(tmp_path, "logger=csv", "test=false", "trainer.log_every_n_steps=4", "callbacks.samples=null")
    rows = read_csv(tmp_path)
    for name in ("train/loss", "moe/block_1/load_max_violation", "throughput/training_flops", "evolution/phase"):
        assert [int(row["step"]) for row in rows if row[name]] == [3, 7, 11, 15, 19], name
    assert [float(row["evolution/phase"]) for row in rows if row["evolution/phase"]] == [1, 1, 2, 2, 2]
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [9, 19]


def test_checkpoints_hold_plain_values_and_the_whole_configuration(trained):
    paths = list_checkpoints(trained.folder)
    assert list(paths) == [5, 10, 15, 20]
    checkpoint = torch.load(paths[20], weights_only=True)
    config = checkpoint["evomoe"]["config"]
    assert config["model"]["vocab_size"] == trained.data.vocab_size
    assert config["evolution"]["temperature"]["shape"] == "exponential"
    assert config["callbacks"]["checkpoint"]["run_dir"] == str(trained.folder)


def test_a_run_leaves_the_loss_at_its_seed(train, tmp_path):
    first, _ = train(tmp_path / "a", *PLAIN, *HARD, "trainer.max_steps=4", "trainer.val_check_interval=4")
    again, _ = train(tmp_path / "b", *PLAIN, *HARD, "trainer.max_steps=4", "trainer.val_check_interval=4")
    other, _ = train(tmp_path / "c", *PLAIN, *HARD, "trainer.max_steps=4", "trainer.val_check_interval=4", "seed=2")
    assert first == again
    assert first["train/loss"] != other["train/loss"]


def test_a_learning_run_learns(train, tmp_path):
    values, objects = train(
        tmp_path, *PLAIN, "trainer.max_steps=60", "trainer.val_check_interval=60", experiment="gpt_switch"
    )
    assert values["val/loss"] < 4.9  # ln(300) = 5.70 for a model that knows nothing
    assert objects.trainer.global_step == 60


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml")))
def test_every_experiment_trains_and_comes_back(train, tmp_path, experiment):
    one_process = ["trainer=default", "trainer.devices=1", "trainer.precision=32-true"]
    short = ["trainer.accumulate_grad_batches=1", "trainer.max_steps=8", "trainer.val_check_interval=4"]
    plan = ["evolution.harden=6"] if "dts" in experiment else []
    optimization = "task.optimization.warmup=2"
    _, objects = train(tmp_path, *PLAIN, *one_process, *short, *plan, optimization, experiment=experiment)
    restored = run.restore(str(tmp_path))
    assert restored.step == 8
    assert equal(dict(restored.task.state_dict()), dict(objects.task.state_dict()))


def test_three_batches_are_learnt_by_heart(train, tmp_path):
    steps = ["trainer.max_steps=200", "trainer.val_check_interval=1.0", "task.optimization.learning_rate=1e-2"]
    values, _ = train(tmp_path, *PLAIN, "debug=overfit", *steps)
    assert values["train/loss"] < 1


def test_without_a_logger_the_learning_rate_is_not_monitored(train, tmp_path):
    _, objects = train(tmp_path, "logger=none", "test=false", "trainer.max_steps=4")
    assert not [callback for callback in objects.callbacks if isinstance(callback, LearningRateMonitor)]
    assert [callback for callback in objects.callbacks if isinstance(callback, EvolutionProgress)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_experts=0"], "num_experts=0: expected at least 1"),
        (["model.num_experts=2.5"], "model.num_experts=2.5: expected a whole number"),
        (["router=top2", "router.gate.top_k=9"], "top_k=9 with 4 experts"),
        (["router.gate.final_top_k=9"], "top_k=9 with 4 experts"),
        (["model.d_model=33"], "d_model=33 is not divisible by num_heads=2"),
        (["model.moe_every=9"], "moe_every=9 leaves no MoE layer among num_layers=2"),
        (["model.moe_every=0"], "evolution needs a model with MoE layers: set evolution=none"),
        (["router=none"], "router=None with moe_every=2"),
        (["data.train=nowhere.txt"], "data.train=nowhere.txt is no file"),
        (["data.context=100000"], "fewer than one window of data.context=100000"),
        (["data.vocab_size=10"], "data.vocab_size=10 is too small"),
        (["router.gate.threshold=0"], "threshold=0: expected a score in (0, 1)"),
        (["router.gate.threshold=1.0"], "threshold=1.0: expected a score in (0, 1)"),
        (["evolution.harden=1"], "evolution.harden=1 is step 1, not after the spawn at step 2"),
        (["evolution.harden=20"], "evolution.harden=20 is step 20, past the end of a run of 20"),
        (["evolution.temperature.length=19"], "evolution.temperature.length=19 is 19 steps from the spawn"),
        (
            ["router=top2", "router.gate.capacity_factor=1.0", "router.gate.priority=choice"],
            "router TopK looks at later",
        ),
        (["+router.loss_coefficients.z=0.1"], "DTSGate has no such loss (it has: balance)"),
        (["resume=maybe"], "resume=maybe: expected auto or null"),
        (["ckpt_path=nowhere"], "ckpt_path=nowhere: there is no such file"),
        (["seed=-1"], "seed=-1: expected a whole number from 0"),
        (["callbacks.checkpoint.every_n_steps=0"], "every_n_steps=0 must be at least 1"),
        (["trainer.max_steps=-5"], "max_steps"),
        (["trainer.max_steps=0"], "trainer.max_steps=0: expected at least 1"),
        (
            ["trainer.check_val_every_n_epoch=1", "trainer.val_check_interval=9999"],
            "trainer.val_check_interval=9999 is more than the",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_in_one_line_and_trains_nothing(train, tmp_path, overrides, message):
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, *PLAIN, *overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list_checkpoints(tmp_path) == {}


def test_a_gpu_that_is_not_there_is_refused(train, trained, tmp_path, monkeypatch):
    for accelerator in (CUDAAccelerator, MPSAccelerator):
        monkeypatch.setattr(accelerator, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="^trainer.accelerator=gpu: no GPU is found here; use trainer=default$"):
        train(tmp_path, *PLAIN, "trainer.accelerator=gpu")
    config = compose(f"ckpt_path={trained.folder}", "accelerator=cuda", config="eval")
    with pytest.raises(ConfigError, match="^accelerator=cuda: no GPU is found here; use accelerator=cpu$"):
        run.evaluate(config)


@pytest.mark.parametrize("text", ["", " \n\n ", "A text shorter than a context."], ids=["empty", "blank", "short"])
def test_a_corpus_without_enough_text_is_refused(train, tmp_path, text):
    file = tmp_path / "text.txt"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"holds no text|fewer than one window") as caught:
        train(tmp_path, *PLAIN, *(f"data.{split}={file}" for split in ("train", "val", "test")))
    assert "\n" not in str(caught.value)


def test_a_leaking_router_is_admitted_on_demand(train, tmp_path):
    leak = [
        "router=top2",
        "router.gate.capacity_factor=1.0",
        "router.gate.priority=choice",
        "model.allow_future_leak=true",
    ]
    _, objects = train(tmp_path, *PLAIN, *leak, "trainer.max_steps=4", experiment="gpt_top2")
    assert objects.trainer.global_step == 4


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_weights(train, tmp_path):
    overrides = [
        *PLAIN,
        "task.optimization.learning_rate=1e30",
        "task.optimization.warmup=0",
        "task.optimization.weight_decay=0",
    ]
    with pytest.raises(NonFiniteError, match="optimizer step 2, epoch 0, batch 1: the loss is "):
        train(tmp_path, *overrides, "callbacks.checkpoint.every_n_steps=1")
    assert list(list_checkpoints(tmp_path)) == [1]
    assert all(tensor.isfinite().all() for tensor in load(tmp_path)["state_dict"].values())


# -- where a checkpoint is --------------------------------------------------------------------------------------------


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
    assert run.resolve_checkpoint("last", tmp_path) == newest
    assert run.resolve_checkpoint(str(tmp_path / "exp" / "one"), tmp_path).name == "step_00000900.ckpt"
    assert run.resolve_checkpoint(str(newest), tmp_path / "elsewhere") == newest
    assert run.resolve_checkpoint(str(newest.parents[2]), tmp_path / "elsewhere") == newest  # a folder of runs
    with pytest.raises(ConfigError, match="ckpt_path=last: there is no checkpoint below"):
        run.resolve_checkpoint("last", tmp_path / "empty")
    with pytest.raises(ConfigError, match="no best checkpoint yet"):
        run.resolve_checkpoint("best", tmp_path)


def test_last_falls_back_over_a_damaged_file(tmp_path):
    whole = touch(tmp_path / "exp" / "one", 1, age=10)
    os.truncate(touch(tmp_path / "exp" / "one", 2, age=0), 10)
    with pytest.warns(UserWarning, match=r"step_00000002\.ckpt is damaged"):
        assert run.resolve_checkpoint("last", tmp_path) == whole


# -- restore and evaluate ---------------------------------------------------------------------------------------------


def evaluate(trained, *overrides: str) -> dict[str, float]:
    return run.evaluate(compose(f"log_dir={trained.logs}", "accelerator=cpu", *overrides, config="eval"))


@pytest.mark.parametrize("step", [5, 10, 15, 20], ids=["diversify", "sparsify", "hardened", "end"])
def test_a_checkpoint_measures_what_training_logged_there(trained, step):
    (logged,) = (row for row in read_csv(trained.folder) if row["val/loss"] and int(row["step"]) == step - 1)
    measured = evaluate(trained, "split=val", f"ckpt_path={list_checkpoints(trained.folder)[step]}")
    for name in ("val/loss", "val/loss_sparse", "val/perplexity", "val/perplexity_sparse", "val/bits_per_byte"):
        assert measured[name] == pytest.approx(float(logged[name]), abs=1e-5, rel=1e-5), name
    assert (measured["val/loss"] == measured["val/loss_sparse"]) == (step != 10)


def test_the_test_split_measures_what_the_run_returned(trained, capsys):
    measured = evaluate(trained)
    for name, value in measured.items():
        assert value == pytest.approx(trained.values[name], abs=1e-5, rel=1e-5), name
    table = capsys.readouterr().out
    assert "step 20, test split" in " ".join(table.split())
    assert f"{measured['test/loss_sparse']:.4f}" in table


def test_overrides_change_how_a_checkpoint_is_measured(trained):
    whole = evaluate(trained, "split=val")
    small = evaluate(trained, "split=val", 'overrides="data.eval_batch_size=3 data.num_workers=0"')
    assert small["val/loss"] == pytest.approx(whole["val/loss"], abs=1e-5)
    assert evaluate(trained, "split=val", "limit_batches=1")["val/loss"] != whole["val/loss"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["split=train"], "split=train: expected val or test"),
        (["ckpt_path=nowhere"], "ckpt_path=nowhere: there is no such file"),
        (['overrides="data.batchsize=3"'], "there is no key 'data.batchsize'; did you mean 'data.batch_size'?"),
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
        evaluate(trained, *overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_that_its_tokenizer_is_not_of_is_refused(train, tmp_path):
    """Other text to train on brings another tokenizer, whose numbers mean nothing to the model."""
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.txt").write_text(f"The {split} text of which no line is like the next. " * 40)
    files = [f"data.{split}={tmp_path / split}.txt" for split in ("train", "val", "test")]
    train(tmp_path / "run", *PLAIN, *files, "trainer.max_steps=4", "trainer.val_check_interval=4")

    def measure(*overrides: str) -> dict[str, float]:
        return run.evaluate(compose(f"ckpt_path={tmp_path / 'run'}", "accelerator=cpu", *overrides, config="eval"))

    before = measure()
    (tmp_path / "other.txt").write_text("Quite another one. " * 100)
    assert measure(f'overrides="data.test={tmp_path / "other.txt"}"') != before
    (tmp_path / "train.txt").write_text("Something else is trained on by now. " * 40)
    with pytest.raises(
        ConfigError, match="^the checkpoint's tokenizer is not that of this data, .*files.train"
    ) as caught:
        measure()
    assert "\n" not in str(caught.value)


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
        return run.evaluate(compose(f"ckpt_path={tmp_path / 'run'}", "accelerator=cpu", *overrides, config="eval"))

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


@pytest.fixture(scope="module")
def classifier(train, tmp_path_factory) -> SimpleNamespace:
    """A run on digits, with the callbacks of images."""
    folder = tmp_path_factory.mktemp("images")
    values, objects = train(folder, "trainer.limit_test_batches=1.0", "logger=none", experiment="vit_soft")
    return SimpleNamespace(values=values, folder=folder, **vars(objects))


def test_a_probe_of_a_checkpoint_is_that_of_the_run(classifier):
    assert (classifier.folder / "pictures" / "block_1_step_00000020.png").exists()
    config = compose("accelerator=cpu", f"ckpt_path={classifier.folder}", "probe=[1,10]", config="eval")
    measured = run.evaluate(config)
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
    ],
)
def test_a_probe_that_cannot_be_is_refused_in_one_line(classifier, overrides, message):
    with pytest.raises(ConfigError) as caught:
        run.evaluate(compose("accelerator=cpu", f"ckpt_path={classifier.folder}", *overrides, config="eval"))
    assert str(caught.value).startswith(message)


def test_text_has_no_probe(trained):
    with pytest.raises(ConfigError, match=r"probe=\[1\] is for images, which .* does not read: leave it out"):
        evaluate(trained, "probe=[1]")


def test_a_restored_model_is_the_trained_one_at_the_schedule_of_its_step(trained):
    restored = run.restore("last", str(trained.logs))
    assert restored.step == 20
    assert equal(dict(restored.task.state_dict()), dict(trained.task.state_dict()))
    assert not restored.task.training
    ((_, layer),) = moe_layers(restored.task)
    assert layer.router.hardened
    assert layer.router.temperature.item() == pytest.approx(0.05)
    young = run.restore(str(list_checkpoints(trained.folder)[10]))
    ((_, layer),) = moe_layers(young.task)
    assert not layer.router.hardened
    assert layer.router.temperature.item() == pytest.approx(2 * (0.05 / 2) ** (3 / 6))
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
        run.restore(str(path))


# -- write ------------------------------------------------------------------------------------------------------------


def write(trained, *overrides: str) -> list[str]:
    return writing.write(compose(f"log_dir={trained.logs}", "max_new_tokens=8", *overrides, config="generate"))


def test_what_is_written_begins_with_the_prompt_and_is_printed_unchanged(trained, capsys):
    prompt = "def f(x): # [not markup] :smile: " + "a long line that a terminal would wrap " * 3
    (text,) = write(trained, quote_text(f"prompt={prompt}"))
    assert text.startswith(prompt)
    assert text != prompt
    assert re.sub(r"[\a\b\v\f\r]", "", text) in capsys.readouterr().out  # control codes do not reach the terminal


def test_several_prompts_are_continued_each_by_itself(trained):
    both = write(trained, 'prompt=["The value ","If "]', "seed=3")
    assert [both[0][:10], both[1][:3]] == ["The value ", "If "]
    assert both == write(trained, 'prompt=["The value ","If "]', "seed=3")
    assert both == [*write(trained, 'prompt="The value "', "seed=3"), *write(trained, 'prompt="If "', "seed=3")]
    assert both != write(trained, 'prompt=["The value ","If "]', "seed=4")
    greedy = [write(trained, 'prompt="If "', "temperature=0", f"seed={seed}") for seed in (3, 4)]
    assert greedy[0] == greedy[1]


def test_the_experts_of_each_token_are_shown(trained, capsys):
    write(trained, 'prompt="If "', "show_experts=true")
    rows = [line for line in capsys.readouterr().out.splitlines() if re.search(r"\d:\d\.\d\d", line)]
    assert len(rows) == len(trained.data.tokenizer.encode("If ")) + 8
    assert all(re.search(r"│ [0-3]:[01]\.\d\d +│$", row) for row in rows)  # hardened: one expert a token


@pytest.mark.parametrize("prompt", ['""', "[]", '["a",""]', "null"])
def test_an_empty_prompt_is_refused(trained, prompt):
    with pytest.raises(ConfigError, match="^prompt is empty"):
        write(trained, f"prompt={prompt}")


def test_hidden_words_are_guessed(train, tmp_path, capsys):
    train(tmp_path / "mlm" / "run", *PLAIN, "trainer.max_steps=4", experiment="mlm_switch")
    ask = (f"log_dir={tmp_path}", "candidates=3")
    texts = writing.write(compose(*ask, 'prompt=["Return the <mask> of a <mask>.","<mask>"]', config="generate"))
    assert re.fullmatch(r"Return the.* of a.*\.", texts[0], re.DOTALL)
    assert len(texts) == 2
    assert all("<mask>" not in text for text in texts)
    shown = capsys.readouterr().out
    assert "Return the <mask> of a <mask>." in shown
    assert len(re.findall(r"\d+\.\d%", shown)) == 9  # three guesses for each of three masks
    with pytest.raises(ConfigError, match="prompt holds no <mask>"):
        writing.write(compose(*ask, 'prompt="Return"', config="generate"))


def test_a_masked_model_without_a_mask_token_is_refused(train, tmp_path):
    with pytest.raises(ConfigError, match=r"data.mask_token=false: masked language modelling needs a token"):
        train(tmp_path, *PLAIN, "data.mask_token=false", experiment="mlm_dense")


def test_sentences_are_translated(train, tmp_path, capsys):
    folder = tmp_path / "mt" / "run"
    values, _ = train(folder, *PLAIN[:2], "trainer.max_steps=4", "trainer.val_check_interval=4", experiment="mt_dts")
    assert {"test/bleu", "test/chrf", "test/exact_match", "val/bleu", "val/loss_sparse"} <= values.keys()
    ask = (f"log_dir={tmp_path}", "beam=2")

    def translate(*overrides: str) -> list[str]:
        capsys.readouterr()
        return writing.write(compose(*ask, *overrides, config="generate"))

    sentences = ["Return the value.", "If it is, print", "The"]
    (tmp_path / "in.txt").write_text("\n".join(sentences) + "\n")
    all_at_once = translate(f"source_file={tmp_path / 'in.txt'}")
    assert capsys.readouterr().out.split("\n")[:-1] == all_at_once
    assert all_at_once == translate(f"source_file={tmp_path / 'in.txt'}", "batch_size=1")
    assert all_at_once[1] == translate('source="If it is, print"')[0]
    translate("source=The", "n_best=2")
    assert len(re.findall(r"-\d+\.\d{3}", capsys.readouterr().out)) == 2

    (tmp_path / "gap.txt").write_text("one\n\ntwo\n")
    for overrides, message in [
        ([], 'expected source="a sentence" or source_file=sentences.txt, one of the two'),
        (["source=a", "source_file=b"], "one of the two"),
        (["source=[]"], "^source is empty"),
        (["prompt=a"], "prompt is for a model that writes on, and .* translates: give source"),
        (["source_file=none.txt"], "source_file=none.txt: there is no such file"),
        ([f"source_file={tmp_path / 'gap.txt'}"], r"gap.txt, line 2 is empty: expected a sentence in every line"),
        (
            [quote_text("source=" + "again " * 40)],
            r"sentence 1 has \d+ tokens, its end included, and the model reads 32: shorten",
        ),
        (["source=a", "n_best=3"], r"n_best=3: expected 1 to beam=2"),
    ]:
        with pytest.raises(ConfigError, match=message):
            translate(*overrides)


def test_a_model_that_does_not_translate_refuses_a_source(trained):
    with pytest.raises(ConfigError, match="source is for a model that translates, which .* is not: give prompt"):
        write(trained, "source=a")


def test_a_model_of_images_reads_no_text(classifier):
    with pytest.raises(ConfigError, match="classifies images and reads no text: measure it with eval.py"):
        writing.write(compose(f"ckpt_path={classifier.folder}", "prompt=a", config="generate"))


def test_a_model_that_reads_one_text_refuses_a_second(trained):
    with pytest.raises(
        ConfigError, match="second is for a model that classifies pairs, which .* does not: leave it out"
    ):
        write(trained, "prompt=a", "second=b")
