"""Fine-tuning runs that begin with a pretrained encoder, inside this process."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.programs import PLAIN, KeepLosses, compose, equal, load, timeless
from hydra.core.override_parser.types import Quote, QuotedString

from evomoe import run
from evomoe.callbacks import Evolution, HeldEvolution
from evomoe.checkpointing import list_checkpoints, newest_checkpoint
from evomoe.cli import quote_text
from evomoe.errors import ConfigError
from evomoe.evaluation import evaluate
from evomoe.prediction import predict
from evomoe.pretrained import find_pretrained
from evomoe.restoring import restore

SHORT = ["trainer.max_steps=4", "trainer.val_check_interval=4"]
STILL = ["task.optimization.learning_rate=1e-30", "trainer.max_steps=2"]  # every weight stays as it is
HEAD = ("model.dense.", "model.out.")


@pytest.fixture(scope="module")
def pretrained(train, tmp_path_factory) -> SimpleNamespace:
    """A masked language model of 20 steps in phases of 7, 6 and 7, and all its checkpoints."""
    logs = tmp_path_factory.mktemp("logs")
    folder = logs / "mlm_dts" / "first"
    plan = ["evolution.diversify=7", "evolution.harden=13"]
    plan += ["evolution.temperature.length=6", "evolution.noise.length=6"]
    saves = ["callbacks.checkpoint.every_n_steps=1", "+callbacks.checkpoint.keep_last=99"]
    _, objects = train(folder, *PLAIN, *plan, *saves, experiment="mlm_dts")
    return SimpleNamespace(logs=logs, folder=folder, paths=list_checkpoints(folder), **vars(objects))


@pytest.fixture(scope="module")
def switch(train, tmp_path_factory) -> Path:
    """Another one, with Switch."""
    folder = tmp_path_factory.mktemp("switch")
    train(folder, *PLAIN, *SHORT, experiment="mlm_switch")
    return folder


@pytest.fixture
def fine_tune(train, tmp_path):
    def fine_tune(*overrides: str, experiment: str = "glue_dts", folder: Path = tmp_path / "fine_tuned"):
        return train(folder, *PLAIN, *SHORT, *overrides, experiment=experiment)[1]

    return fine_tune


def encoder(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.startswith((*HEAD, "model.head"))}


# -- what is taken ----------------------------------------------------------------------------------------------------


def test_encoder_router_phase_and_tokenizer_come_with_the_checkpoint(fine_tune, pretrained):
    objects = fine_tune(f"init_from={pretrained.folder}", "data.vocab_size=999", *STILL)
    theirs, ours = encoder(load(pretrained.folder)["state_dict"]), encoder(dict(objects.task.state_dict()))
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-20)
    assert objects.data.tokenizer.to_json() == pretrained.data.tokenizer.to_json()
    assert objects.config.init_from == str(pretrained.paths[20])
    (evolution,) = (callback for callback in objects.callbacks if isinstance(callback, Evolution))
    assert type(evolution) is HeldEvolution
    assert evolution.plan.describe() == "hardened [0, 2)"
    (layer,) = objects.task.model.moe_layers.values()
    assert layer.live_experts == 4
    assert layer.router.temperature == pytest.approx(pretrained.config.evolution.temperature.end)
    assert not layer.router.rules_differ


@pytest.mark.parametrize(
    ("step", "phase", "live"), [(5, "diversify", 1), (7, "diversify", 1), (8, "sparsify", 4), (14, "hardened", 4)]
)
def test_a_checkpoint_of_any_phase_goes_on_in_it_for_good(fine_tune, pretrained, step, phase, live):
    objects = fine_tune(f"init_from={pretrained.paths[step]}")
    (evolution,) = (callback for callback in objects.callbacks if isinstance(callback, Evolution))
    (layer,) = objects.task.model.moe_layers.values()
    assert (evolution.plan.at(0).phase, evolution.plan.at(4).phase, layer.live_experts) == (phase, phase, live)
    assert restore(str(newest_checkpoint(objects.config.paths.run_dir))).task.model.moe_layers


def test_a_schedule_stands_where_it_stood(fine_tune, pretrained):
    plan = next(callback for callback in pretrained.callbacks if isinstance(callback, Evolution)).plan
    objects = fine_tune(f"init_from={pretrained.paths[11]}")
    (layer,) = objects.task.model.moe_layers.values()
    assert float(layer.router.temperature) == pytest.approx(plan.at(10).temperature)
    assert float(layer.router.noise_scale) == pytest.approx(plan.at(10).noise_scale)


def test_sizes_are_those_of_the_checkpoint_and_dropout_is_not(fine_tune, pretrained):
    objects = fine_tune(f"init_from={pretrained.folder}", "model=roberta_mini", "model.dropout=0.3", "data.context=16")
    assert objects.config.model.d_model == pretrained.config.model.d_model == 32
    assert objects.config.model.context == 32
    assert objects.config.model.dropout == 0.3
    assert objects.task.model.position_embedding.weight.shape == (32, 32)


def test_frozen_routers_leave_as_they_came(fine_tune, pretrained):
    objects = fine_tune(f"init_from={pretrained.folder}", "task.freeze_routers=true")
    before, after = load(pretrained.folder)["state_dict"], objects.task.state_dict()
    routers = [name for name in before if ".router." in name]
    assert routers
    assert all(torch.equal(before[name], after[name]) for name in routers)
    assert not torch.equal(before["model.position_embedding.weight"], after["model.position_embedding.weight"])


def test_routers_are_frozen_only_after_a_pretraining(fine_tune):
    with pytest.raises(
        ConfigError, match="^task.freeze_routers=true keeps routers as they were pretrained, .*init_from"
    ):
        fine_tune("task.freeze_routers=true")


def test_a_fine_tuned_model_is_measured_with_its_own_tokenizer(train, tmp_path, pretrained):
    whole = ["trainer.limit_test_batches=1.0", "test=true"]
    values, _ = train(
        tmp_path / "run", *PLAIN[:2], *SHORT, *whole, f"init_from={pretrained.folder}", experiment="glue_dts"
    )
    measured = evaluate(compose(f"ckpt_path={tmp_path / 'run'}", "accelerator=cpu", config="eval"))
    assert measured["test/majority_accuracy"] > 0.5
    assert measured == {name: pytest.approx(values[name], rel=1e-5) for name in measured}


def test_a_fine_tuned_model_may_be_fine_tuned_again(fine_tune, pretrained, tmp_path):
    fine_tune(f"init_from={pretrained.folder}")
    objects = fine_tune(f"init_from={tmp_path / 'fine_tuned'}", *STILL, folder=tmp_path / "again")
    first, second = (encoder(load(tmp_path / name)["state_dict"]) for name in ("fine_tuned", "again"))
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=1e-20) for name in first)
    assert objects.data.tokenizer.to_json() == pretrained.data.tokenizer.to_json()


# -- which checkpoint -------------------------------------------------------------------------------------------------


def at(path: Path, age: float) -> None:
    for file in path.rglob("*.ckpt"):
        os.utime(file, (1e9 - age, 1e9 - age))


def test_last_is_the_newest_masked_model_that_is_whole(pretrained, switch, tmp_path):
    for name, source, age in (("mlm/old", switch, 3), ("mlm/new", pretrained.folder, 2), ("mlm/broken", switch, 1)):
        shutil.copytree(source, tmp_path / name)
        at(tmp_path / name, age)
    for file in (tmp_path / "mlm/broken").rglob("*.ckpt"):
        os.truncate(file, 1000)
        os.utime(file, (1e9 - 1, 1e9 - 1))
    config = compose("experiment=glue_dts", f"paths.log_dir={tmp_path}", "init_from=last", run_dir=tmp_path / "run")
    with pytest.warns(UserWarning, match="passed over"):
        found = find_pretrained(config, None)
    assert found is not None
    assert found.path == list_checkpoints(tmp_path / "mlm/new")[20]


def test_last_passes_over_other_tasks(train, tmp_path):
    train(tmp_path / "gpt" / "run", *PLAIN, *SHORT)
    config = compose("experiment=glue_dts", f"paths.log_dir={tmp_path}", "init_from=last", run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="init_from=last: there is no run of masked language modelling below"):
        find_pretrained(config, None)
    config.init_from = str(tmp_path / "gpt" / "run")
    with pytest.raises(ConfigError, match="is a run of LanguageModeling: expected one of masked language modelling"):
        find_pretrained(config, None)


@pytest.mark.parametrize(
    ("overrides", "experiment", "message"),
    [
        (["init_from=nowhere"], "glue_dts", "init_from=nowhere: there is no such file or folder"),
        (["init_from=[a,b]"], "glue_dts", "expected a file, a run's folder, or last"),
        (["init_from=PATH"], "glue_switch", "was trained with DTSGate and this run has Switch: choose the"),
        (["init_from=PATH"], "glue_dense", "was trained with DTSGate and this run has no router"),
        (["init_from=PATH", "data.context=64"], "glue_dts", "data.context=64 is more than the 32 tokens that"),
        (["init_from=PATH"], "gpt_dts", "is for fine-tuning: use it with experiment=glue_dts"),
        (["task.metrics=[pearson]"], "glue_dts", "task.metrics names 'pearson', and labels are 2 classes"),
    ],
)
def test_what_cannot_begin_is_refused_in_one_line(fine_tune, pretrained, tmp_path, overrides, experiment, message):
    overrides = [text.replace("PATH", str(pretrained.folder)) for text in overrides]
    with pytest.raises(ConfigError) as caught:
        fine_tune(*overrides, experiment=experiment)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("init_from", ["null", "last"])
def test_text_without_labels_is_refused(tmp_path, init_from):
    config = compose("experiment=glue_dts", "data=docs", f"init_from={init_from}", run_dir=tmp_path)
    with pytest.raises(
        ConfigError, match="^the data are text, and task SequenceClassification reads labelled sentences"
    ):
        run.train(config)


def configured(pretrained: SimpleNamespace, tmp_path: Path, *overrides: str) -> Any:
    """The configuration of a run whose user typed these overrides."""
    config = compose("experiment=glue_dts", f"init_from={pretrained.folder}", *overrides, run_dir=tmp_path)
    config.data.context = 16
    found = find_pretrained(config, None)
    assert found is not None
    found.configure(config, overrides)
    return config


def test_options_of_the_router_may_be_chosen_anew_and_sizes_and_schedule_may_not(pretrained, tmp_path):
    typed = ["router.loss_coefficients.balance=0.5", "router.gate.threshold=0.01", "model.head_dropout=0.2"]
    config, plain = configured(pretrained, tmp_path, *typed), configured(pretrained, tmp_path)
    assert config.router.loss_coefficients.balance == config.task.loss_coefficients.balance == 0.5
    assert config.model.router.threshold == 0.01
    assert config.model.head_dropout == 0.2
    assert plain.router == pretrained.config.router
    assert {**config.router.gate, "threshold": 0} == {**plain.router.gate, "threshold": 0}
    for override in ("model.d_model=64", "model.num_experts=4", "evolution.harden=0.5", "evolution=none"):
        with pytest.raises(ConfigError) as caught:
            configured(pretrained, tmp_path, override)
        assert str(caught.value).startswith(f"{override} cannot be chosen with init_from={pretrained.paths[20]}")


def test_what_the_checkpoint_replaces_is_named(pretrained, tmp_path):
    def described(*overrides: str) -> str:
        config = compose("experiment=glue_dts", f"init_from={pretrained.folder}", *overrides, run_dir=tmp_path)
        config.data.context = 16
        found = find_pretrained(config, None)
        assert found is not None
        found.configure(config, [override for override in overrides if override.startswith("router")])
        return found.describe()

    # Values of groups, and of an experiment of the user's own: what is typed is refused, or wins.
    same = ["model=roberta_tiny", "evolution.diversify=7", "evolution.harden=13"]
    same += ["evolution.temperature.length=6", "evolution.noise.length=6", "router.gate.threshold=0.01"]
    plain = described(*same)
    assert plain.endswith(": its encoder with DTSGate, hardened for good")
    other = described(
        *same,
        "router.loss_coefficients={balance:0.3}",
        "model.num_layers=5",
        "model.num_heads=4",
        "evolution.harden=9",
        "model.dropout=0.3",
    )
    assert other == f"{plain}; its own values replace model.num_layers=5, model.num_heads=4, evolution.harden=9"


def test_a_run_looks_at_what_its_user_typed(fine_tune, pretrained, monkeypatch):
    typed = SimpleNamespace(overrides=SimpleNamespace(task=["experiment=glue_dts", "model.num_experts=4"]))
    monkeypatch.setattr(run, "HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: typed))
    with pytest.raises(ConfigError, match="^model.num_experts=4 cannot be chosen with init_from"):
        fine_tune(f"init_from={pretrained.folder}", "model.num_experts=4")


def test_a_router_of_other_shapes_is_refused(train, tmp_path):
    train(tmp_path / "mlm", *PLAIN, *SHORT, experiment="mlm_stable")
    overrides = [f"init_from={tmp_path / 'mlm'}", "router.gate.light_dim=8"]
    config = compose("experiment=glue_stable", *overrides, run_dir=tmp_path)
    config.data.context = 16
    found = find_pretrained(config, None)
    assert found is not None
    found.configure(config, overrides)
    config.model.update({"vocab_size": found.config.model.vocab_size, "num_classes": 2})
    task = run.instantiate(config.task, model=run.instantiate(config.model))
    with pytest.raises(ConfigError, match=r"do not fit this run's model: leave out router.gate.\*"):
        found.initialize(task)


# -- going on ---------------------------------------------------------------------------------------------------------

EPOCHS = [
    *("trainer.max_steps=-1", "trainer.max_epochs=2", "+trainer.limit_train_batches=5", "model.dropout=0.1"),
    *("trainer.check_val_every_n_epoch=1", "trainer.val_check_interval=1.0"),
    *("callbacks.checkpoint.every_n_steps=1", "+callbacks.checkpoint.keep_last=99"),
    "+callbacks.losses._target_=helpers.programs.KeepLosses",
]


def losses(objects: SimpleNamespace) -> list[float]:
    (keeper,) = (callback for callback in objects.callbacks if isinstance(callback, KeepLosses))
    return keeper.seen


def test_a_fine_tuning_run_resumes_to_the_last_bit(fine_tune, pretrained, tmp_path):
    whole = fine_tune(f"init_from={pretrained.folder}", *EPOCHS, folder=tmp_path / "whole")
    paths = list_checkpoints(tmp_path / "whole")
    assert len(losses(whole)) == 10
    for step, given in ((3, [f"init_from={pretrained.folder}"]), (5, []), (7, ["init_from=last"])):
        folder = tmp_path / f"from_{step}"
        # With what it began from, without, or with what would by now mean another file: its checkpoint has it all.
        part = fine_tune(*given, *EPOCHS, f"ckpt_path={paths[step]}", folder=folder)
        assert losses(part) == losses(whole)[step:]
        assert part.config.init_from == whole.config.init_from
        assert equal(timeless(load(folder)), timeless(load(tmp_path / "whole")))


def test_a_run_from_scratch_does_not_go_on_from_a_pretrained_one(fine_tune, pretrained, tmp_path):
    fine_tune()
    path = newest_checkpoint(tmp_path / "fine_tuned")
    with pytest.raises(ConfigError, match="it began from scratch and this run has init_from=.*; leave that out"):
        fine_tune(f"ckpt_path={path}", f"init_from={pretrained.folder}", folder=tmp_path / "other")


# -- generate.py ------------------------------------------------------------------------------------------------------


def classify(folder: Path, *overrides: str) -> list[str]:
    return predict(compose(f"ckpt_path={folder}", *overrides, config="generate"))


def test_sentences_are_classified(fine_tune, pretrained, tmp_path, capsys, monkeypatch):
    objects = fine_tune(f"init_from={pretrained.folder}")
    batch = next(iter(objects.data.test_dataloader()))
    shares = restore(str(tmp_path / "fine_tuned")).task(batch["tokens"], batch["valid"]).softmax(dim=1)
    texts = [
        objects.data.tokenizer.decode(row[valid][1:-1].tolist())
        for row, valid in zip(batch["tokens"], batch["valid"], strict=True)
    ]
    capsys.readouterr()
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # a terminal, for rich
    quoted = ",".join(QuotedString(text, Quote.single).with_quotes() for text in texts)  # also with a backslash
    answers = classify(tmp_path / "fine_tuned", f"prompt=[{quoted}]")
    assert answers == [objects.data.classes[index] for index in shares.argmax(dim=1)]
    shown = capsys.readouterr().out
    assert all(text in shown for text in texts)
    in_order = shares.sort(descending=True).values.flatten()
    assert re.findall(r"(\d+\.\d%)", shown) == [f"{share:.1%}" for share in in_order]
    assert "of which the model reads" not in shown
    classify(tmp_path / "fine_tuned", quote_text("prompt=" + "again " * 40), "candidates=1")
    shown = capsys.readouterr().out
    assert re.search(r"\(\d+ tokens, of which the model reads 32\)", shown)
    assert len(re.findall(r"\d%", shown)) == 1
    for overrides, message in [
        (["prompt=[]"], "^prompt is empty"),
        (["prompt=a", "second=b"], "second is for pairs, and .* classifies single sentences: leave it out"),
        (["source=a"], "source is for a model that translates"),
        (["prompt=a", "candidates=0"], "candidates=0: expected at least 1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            classify(tmp_path / "fine_tuned", *overrides)


def test_a_pair_is_rated(train, tmp_path, capsys, monkeypatch):
    rows = [f"first {number}\tsecond {number % 7}\t{number % 5 / 2}" for number in range(80)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n")
    data = [f"data.train={tmp_path / 'pairs.tsv'}", "data.regression=true", "task.metrics=[pearson,spearman]"]
    values, _ = train(tmp_path / "run", *PLAIN[:2], *SHORT, *data, experiment="glue_switch")
    assert {"val/pearson", "test/spearman_sparse"} <= values.keys()
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # a terminal, for rich
    (answer,) = classify(tmp_path / "run", "prompt=one", "second=two")
    assert f"one\ntwo\n{float(answer):.4g}\n" in capsys.readouterr().out
    for overrides, message in [
        (["prompt=one"], "^second is empty"),
        (["prompt=[one,two]", "second=[three]"], "prompt has 2 texts and second has 1: give as many of both"),
    ]:
        with pytest.raises(ConfigError, match=message):
            classify(tmp_path / "run", *overrides)
