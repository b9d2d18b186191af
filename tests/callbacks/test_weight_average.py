"""The moving average of the weights, in runs that evolve."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers.keep_states import KeepStates
from helpers.programs import HARD, PLAIN, KeepLosses, equal, load, timeless
from torch import Tensor

from evomoe.callbacks import Evolution, WeightAverage
from evomoe.callbacks.evolution import moe_layers
from evomoe.checkpointing import list_checkpoints
from evomoe.errors import ConfigError
from evomoe.restoring import restore

DECAY = 0.8
SPAWN = 5
AVERAGED = [
    "+callbacks.average._target_=evomoe.callbacks.WeightAverage",
    f"+callbacks.average.decay={DECAY}",
    "+callbacks.losses._target_=helpers.programs.KeepLosses",
    "+callbacks.seen._target_=helpers.keep_states.KeepStates",
    f"evolution.diversify={SPAWN}",
    "evolution.harden=12",
    "evolution.temperature.length=6",
    "evolution.noise.length=8",
]
SAVES = [
    "callbacks=minimal",
    "logger=none",
    "callbacks.checkpoint.every_n_steps=1",
    "+callbacks.checkpoint.keep_last=99",
    "trainer.val_check_interval=6",
    *HARD,
]


@pytest.fixture(scope="module")
def averaged(train, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("averaged")
    values, objects = train(folder, *SAVES, *AVERAGED, experiment="vit_dts")
    (kept,) = (callback for callback in objects.callbacks if isinstance(callback, KeepStates))
    (losses,) = (callback.seen for callback in objects.callbacks if isinstance(callback, KeepLosses))
    return SimpleNamespace(folder=folder, values=values, kept=kept, losses=losses, **vars(objects))


def averages(states: list[dict[str, Tensor]], names: list[str]) -> list[dict[str, Tensor]]:
    """By the definition, beginning anew with the step that follows the spawn."""
    found: list[dict[str, Tensor]] = []
    for step, state in enumerate(states):
        fresh = step in (0, SPAWN)
        found.append(
            {
                name: state[name] if fresh or name not in names else DECAY * found[-1][name] + (1 - DECAY) * state[name]
                for name in state
            }
        )
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_validations_the_test_and_checkpoints_hold_the_average(averaged):
    names = [name for name, _ in averaged.task.named_parameters()]
    expected = averages(averaged.kept.trained, names)
    assert len(expected) == 20
    assert {3, 6, 9, 12, 15, 18} < set(averaged.kept.validated)
    for step, state in averaged.kept.validated.items():
        assert_close(state, expected[step - 1])
    for step, path in list_checkpoints(averaged.folder).items():
        checkpoint = torch.load(path, weights_only=True)
        assert_close(checkpoint["state_dict"], expected[step - 1])
        assert equal(checkpoint["current_model_state"], averaged.kept.trained[step - 1])
    assert_close(averaged.kept.tested, expected[-1])
    assert_close(restore(str(averaged.folder)).task.state_dict(), expected[-1])


def test_a_validation_of_the_average_has_the_temperature_of_its_step(averaged):
    (evolution,) = (callback for callback in averaged.callbacks if isinstance(callback, Evolution))
    assert len(set(averaged.kept.temperatures.values())) > 2
    for step, temperature in averaged.kept.temperatures.items():
        assert temperature == pytest.approx(evolution.plan.at(step - 1).temperature)


def test_a_resumed_run_validates_inside_a_window_as_if_it_had_not_stopped(train, tmp_path):
    inside = [*SAVES, *AVERAGED, "trainer.val_check_interval=5", "test=false"]
    train(tmp_path / "whole", *inside, experiment="vit_dts")
    start = list_checkpoints(tmp_path / "whole")[7]  # the next validation is after the fifteenth batch
    train(tmp_path / "resumed", *inside, f"ckpt_path={start}", experiment="vit_dts")
    assert equal(timeless(load(tmp_path / "resumed")), timeless(load(tmp_path / "whole")))


def test_training_does_not_see_the_average(train, averaged, tmp_path):
    without = [text for text in AVERAGED if "average." not in text]
    _, objects = train(tmp_path, *SAVES, *without, "test=false", experiment="vit_dts")
    (kept,) = (callback for callback in objects.callbacks if isinstance(callback, KeepStates))
    assert all(map(equal, kept.trained, averaged.kept.trained))


@pytest.mark.parametrize("step", [4, 5, 6, 13], ids=["diversify", "spawn", "sparsify", "hardened"])
def test_a_resumed_run_ends_as_if_it_had_not_stopped(train, averaged, tmp_path, step):
    start = list_checkpoints(averaged.folder)[step]
    values, objects = train(tmp_path, *SAVES, *AVERAGED, f"ckpt_path={start}", experiment="vit_dts")
    (losses,) = (callback.seen for callback in objects.callbacks if isinstance(callback, KeepLosses))
    assert losses == averaged.losses[2 * step :]
    assert values == averaged.values
    assert equal(timeless(load(tmp_path)), timeless(load(averaged.folder)))


def test_a_run_without_a_step_left_is_tested_by_the_average(train, averaged, tmp_path):
    last = list_checkpoints(averaged.folder)[20]
    values, objects = train(tmp_path, *SAVES, *AVERAGED, f"ckpt_path={last}", experiment="vit_dts")
    (kept,) = (callback for callback in objects.callbacks if isinstance(callback, KeepStates))
    assert equal(kept.tested, averaged.kept.tested)
    assert equal(objects.task.state_dict(), averaged.task.state_dict())
    tested = {name for name in values if name.startswith("test/")}
    assert {name: values[name] for name in tested} == {name: averaged.values[name] for name in tested}
    assert "test/loss_sparse" in tested


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_it_is_kept_in_full_precision(train, tmp_path, precision):
    options = [*SAVES, *AVERAGED, f"trainer.precision={precision}", "trainer.max_steps=14"]
    _, objects = train(tmp_path / "whole", *options, experiment="vit_dts")
    (kept,) = (callback for callback in objects.callbacks if isinstance(callback, KeepStates))
    names = [name for name, _ in objects.task.named_parameters()]
    assert kept.trained[0][names[0]].dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    full = [
        {name: value.float() if name in names else value for name, value in state.items()} for state in kept.trained
    ]
    expected = averages(full, names)
    checkpoint = load(tmp_path / "whole")
    assert all(checkpoint["state_dict"][name].dtype == torch.float32 for name in names)
    for found, step in ((checkpoint["state_dict"], 14), (kept.validated[9], 9), (kept.tested, 14)):
        for name in names:
            torch.testing.assert_close(found[name], expected[step - 1][name].to(found[name].dtype))
    assert equal(checkpoint["current_model_state"], kept.trained[-1])

    start = list_checkpoints(tmp_path / "whole")[8]
    train(tmp_path / "resumed", *options, f"ckpt_path={start}", experiment="vit_dts")
    assert equal(timeless(load(tmp_path / "resumed")), timeless(checkpoint))


def test_a_second_fit_of_a_model_in_bf16_has_an_average_in_full_precision():
    task = L.LightningModule()
    task.layer = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    average = WeightAverage()
    average.setup(L.Trainer(accelerator="cpu", logger=False), task, "fit")
    assert {parameter.dtype for parameter in average._average_model.parameters()} == {torch.float32}


def test_it_begins_with_all_experts_where_none_is_to_be_born(train, tmp_path: Path):
    options = [*AVERAGED[:2], "callbacks=minimal", "logger=none", "test=false", "trainer.max_steps=4"]
    _, objects = train(tmp_path, *options, experiment="vit_soft")
    assert all(layer.live_experts == layer.num_experts for _, layer in moe_layers(objects.task))
    assert int(load(tmp_path)["averaging_state"]["n_averaged"]) == 4


def test_running_states_of_routers_are_copied(train, tmp_path):
    options = [*AVERAGED[:2], "router=loss_free", "callbacks=minimal", "logger=none", "test=false"]
    _, objects = train(tmp_path, *options, experiment="vit_switch")
    checkpoint = load(tmp_path)
    average, weights = checkpoint["state_dict"], checkpoint["current_model_state"]
    states = [name for name, _ in objects.task.named_buffers() if name in average]
    assert any(name.endswith("router.bias") for name in states)
    assert all(torch.equal(average[name], weights[name]) for name in states)
    assert not any(torch.equal(average[name], weights[name]) for name, _ in objects.task.named_parameters())


def test_what_a_task_learns_of_the_data_after_the_average_was_made_is_copied(train, tmp_path):
    average = "+callbacks.average._target_=evomoe.callbacks.WeightAverage"
    options = [*PLAIN[:2], average, "task.whole_words=true", "trainer.max_steps=4", "trainer.val_check_interval=2"]
    values, objects = train(tmp_path, *options, experiment="mlm_switch")
    assert not objects.task.word_starts.all()
    assert math.isfinite(values["test/loss_sparse"])


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_is_no_share_is_refused(decay):
    with pytest.raises(ConfigError) as error:
        WeightAverage(decay)
    assert str(error.value) == f"callbacks.average.decay={decay}: expected a share in [0, 1), such as 0.999"
