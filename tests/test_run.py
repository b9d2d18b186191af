"""Training runs inside this process; the programs are tested in tests/cli."""

from __future__ import annotations

import pytest
import torch
from helpers.programs import CONFIGS, HARD, PLAIN, compose, equal, load, read_csv
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import LearningRateMonitor

from evomoe import run
from evomoe.callbacks import EvolutionProgress
from evomoe.checkpointing import list_checkpoints
from evomoe.errors import ConfigError, NonFiniteError
from evomoe.evaluation import evaluate
from evomoe.restoring import restore


def test_a_run_returns_its_metrics_and_its_objects(trained):
    assert {"train/loss", "val/loss", "val/loss_sparse", "test/loss", "test/bits_per_byte"} <= trained.values.keys()
    assert {"moe/active_experts", "moe/block_1/dropped", "evolution/temperature"} <= trained.values.keys()
    assert all(type(value) is float for value in trained.values.values())
    assert trained.trainer.global_step == 20
    assert trained.config.model.vocab_size == trained.data.vocab_size == trained.task.model.vocab_size
    assert {"checkpoints", "csv", "summary.json", "summary.md"} <= {path.name for path in trained.folder.iterdir()}
    assert trained.values["val/loss"] == trained.values["val/loss_sparse"]  # hardened


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
    if experiment == "mt_dts_paper":  # its phases are counted in steps
        plan += ["evolution.diversify=1", "evolution.temperature.length=3"]
    optimization = "task.optimization.warmup=2"
    _, objects = train(tmp_path, *PLAIN, *one_process, *short, *plan, optimization, experiment=experiment)
    restored = restore(str(tmp_path))
    assert restored.step == 8
    assert equal(dict(restored.task.state_dict()), dict(objects.task.state_dict()))


def test_three_batches_are_learnt_by_heart(train, tmp_path):
    steps = ["trainer.max_steps=200", "trainer.val_check_interval=1.0", "task.optimization.learning_rate=1e-2"]
    values, _ = train(tmp_path, *PLAIN, "debug=overfit", *steps)
    assert values["train/loss"] < 1


def test_several_loggers_by_name_all_receive_what_is_logged(tiny, tmp_path):
    overrides = ["test=false", "logger=csv", "trainer.max_steps=4", "trainer.val_check_interval=4"]
    config = compose("experiment=gpt_dts", *tiny, *overrides, run_dir=tmp_path)
    tensorboard = compose("logger=tensorboard", run_dir=tmp_path).logger
    config.logger = {"csv": config.logger, "tensorboard": tensorboard, "left_out": None}
    run.train(config)
    assert [int(row["step"]) for row in read_csv(tmp_path) if row["val/loss"]] == [3]
    (events,) = (tmp_path / "tensorboard").glob("events*")
    assert b"samples" in events.read_bytes()  # text, which TensorBoard alone shows


def test_without_a_logger_the_learning_rate_is_not_monitored(train, tmp_path):
    _, objects = train(tmp_path, "logger=none", "test=false", "trainer.max_steps=4")
    assert not [callback for callback in objects.callbacks if isinstance(callback, LearningRateMonitor)]
    assert [callback for callback in objects.callbacks if isinstance(callback, EvolutionProgress)]


def test_without_a_checkpoint_callback_nothing_is_saved(train, tmp_path):
    train(tmp_path, *PLAIN, "callbacks.checkpoint=null", "test=false", "trainer.max_steps=4")
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_phases_that_cannot_be_are_refused_before_the_data_are_read(train, tmp_path):
    for override, message in (
        ("evolution.diversify=1.5", "evolution.diversify=1.5: a share of the run must be in"),
        ("evolution.temperature.shape=lin", "shape='lin'"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(tmp_path, *PLAIN, override, "data.train=nowhere.txt")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_experts=0"], "num_experts=0: expected at least 1"),
        (["model.num_experts=2.5"], "model.num_experts=2.5: expected a whole number"),
        (["router=top2", "router.gate.top_k=9"], "router top_k=9: expected 1 to 4, the number of experts"),
        (["router.gate.final_top_k=9"], "router final_top_k=9: expected 1 to 4, the number of experts"),
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
        (["task.optimization.beta2=98"], "beta2=98: expected a decay in [0, 1)"),
        (["task.optimization.eps=-1"], "eps=-1: expected 0 or above"),
        (["task.optimization.weight_decay=-0.1"], "weight_decay=-0.1: expected 0 or above"),
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
        evaluate(config)


@pytest.mark.parametrize("text", ["", " \n\n ", "A text shorter than a context."], ids=["empty", "blank", "short"])
def test_a_corpus_without_enough_text_is_refused(train, tmp_path, text):
    file, other = tmp_path / "text.txt", tmp_path / "other.txt"
    file.write_text(text)
    other.write_text("Another text, that is long enough to be measured.\n" * 50)
    with pytest.raises(ConfigError, match=r"holds no text|fewer than one window") as caught:
        train(tmp_path, *PLAIN, f"data.train={file}", f"data.val={other}", f"data.test={other}")
    assert "\n" not in str(caught.value)


def test_a_masked_model_without_a_mask_token_is_refused(train, tmp_path):
    with pytest.raises(ConfigError, match=r"data.mask_token=false: masked language modelling needs a token"):
        train(tmp_path, *PLAIN, "data.mask_token=false", experiment="mlm_dense")


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
