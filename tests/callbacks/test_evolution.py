"""The plan of an evolution, and what the callback makes of it during a run."""

import warnings
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger

from evomoe.callbacks.evolution import Decay, Evolution, EvolutionPlan, moe_layers
from evomoe.errors import ConfigError, EvomoeWarning
from evomoe.models.gpt import GPT
from evomoe.moe import Spawn
from evomoe.routing import DTSGate, Schedule, Switch
from evomoe.tasks import LanguageModeling, Optimization


class Tokens(L.LightningDataModule):
    """Sixty-four sequences of a small alphabet."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        tokens = torch.randint(0, 30, (64, 9), generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader([{"tokens": row} for row in tokens], batch_size=self.batch_size)

    val_dataloader = train_dataloader

    def units(self, split: str) -> dict[str, int]:
        return {"tokens": 512, "words": 128, "bytes": 1024}


class Log(Logger):
    """Keeps the evolution's metrics by step."""

    name, version = "log", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, list[float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        keys = ("evolution/phase", "evolution/temperature", "evolution/noise_scale")
        if any(key in metrics for key in keys):
            self.steps[step] = [metrics[key] for key in keys]

    def log_hyperparams(self, *_: Any) -> None: ...


class Diary(L.Callback):
    """Writes down what each batch met."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        (_, layer), *_ = moe_layers(pl_module)
        evolution = next(callback for callback in trainer.callbacks if isinstance(callback, Evolution))
        self.entries.append(
            {
                "step": trainer.global_step,
                "phase": evolution.state.phase,
                "live": layer.live_experts,
                "active": outputs["routings"][0].active_experts.item(),
                "temperature": evolution.state.temperature,
                "unborn_has_gradient": layer.experts.expert_parameters(1)["w_in"].grad is not None,
            }
        )


def make_task(router: Any = DTSGate) -> LanguageModeling:
    torch.manual_seed(0)
    model = GPT(30, 8, 16, 2, 2, num_experts=4, router=partial(router), dropout=0.0)
    return LanguageModeling(model, Optimization())


def run(evolution: Evolution, task: LanguageModeling | None = None, **trainer: Any) -> list[dict[str, Any]]:
    diary = Diary()
    options = {"max_steps": 20, "limit_val_batches": 0, "logger": False, **trainer}
    L.Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[evolution, diary],
        **options,
    ).fit(task or make_task(), datamodule=Tokens())
    return diary.entries


def evolution(**options: Any) -> Evolution:
    return Evolution(**{"diversify": 5, "harden": 15, "temperature": Decay(2.0, 0.1, 8, "exponential"), **options})


def test_a_run_goes_through_its_phases_at_the_planned_steps() -> None:
    entries = run(evolution())
    assert [entry["phase"] for entry in entries] == ["diversify"] * 5 + ["sparsify"] * 10 + ["hardened"] * 5
    assert [entry["live"] for entry in entries] == [1] * 5 + [4] * 15
    assert [entry["active"] for entry in entries[:6]] == [1, 1, 1, 1, 1, 4]
    assert [entry["active"] for entry in entries[15:]] == [1.0] * 5
    assert 1 < entries[12]["active"] < 4


def test_the_temperature_counts_from_the_spawn() -> None:
    entries = run(evolution())
    schedule = Schedule(2.0, 0.1, 8, "exponential")
    assert [entry["temperature"] for entry in entries] == [schedule.at(max(step - 5, 0)) for step in range(20)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_log_has_the_values_of_its_own_step(accumulate: int) -> None:
    log = Log()
    run(evolution(noise=Decay(1.0, 0.0, 10)), logger=log, log_every_n_steps=4, accumulate_grad_batches=accumulate)
    temperature, noise = Schedule(2.0, 0.1, 8, "exponential"), Schedule(1.0, 0.0, 10)
    assert log.steps == {
        step: pytest.approx([phase, temperature.at(max(step - 5, 0)), noise.at(max(step - 5, 0))])
        for step, phase in [(3, 0), (7, 1), (11, 1), (15, 2), (19, 2)]
    }


def test_a_trainer_that_never_logs_evolves_all_the_same() -> None:
    log = Log()
    entries = run(evolution(), logger=log, log_every_n_steps=0)
    assert [entry["live"] for entry in entries] == [1] * 5 + [4] * 15
    assert log.steps == {}


def test_unborn_experts_have_no_gradient() -> None:
    assert [entry["unborn_has_gradient"] for entry in run(evolution())] == [False] * 5 + [True] * 15


def test_nothing_changes_inside_an_accumulation_window() -> None:
    entries = run(evolution(), max_steps=20, accumulate_grad_batches=4)
    assert [entry["phase"] for entry in entries] == ["diversify"] * 20 + ["sparsify"] * 40 + ["hardened"] * 20


def test_shares_of_the_run_become_steps_with_max_epochs() -> None:
    callback = Evolution(diversify=0.25, harden=0.75, temperature=Decay(2.0, 0.1, 0.5))
    entries = run(callback, max_steps=-1, max_epochs=2)  # 32 steps
    assert [entry["phase"] for entry in entries] == ["diversify"] * 8 + ["sparsify"] * 16 + ["hardened"] * 8


def test_any_router_can_follow_the_diversify_phase() -> None:
    entries = run(Evolution(diversify=5), task=make_task(partial(Switch, capacity_factor=None)))
    assert [entry["live"] for entry in entries] == [1] * 5 + [4] * 15
    assert {entry["active"] for entry in entries} == {1.0}


def test_without_a_diversify_phase_all_experts_live_and_keep_their_initial_weights() -> None:
    task = make_task()
    expected = moe_layers(make_task())[0][1].experts.expert_parameters(1)["w_in"].clone()
    callback = evolution(diversify=0, harden=None)
    callback.setup(L.Trainer(accelerator="cpu", logger=False), task, "fit")
    assert moe_layers(task)[0][1].live_experts == 4
    assert torch.equal(moe_layers(task)[0][1].experts.expert_parameters(1)["w_in"], expected)


def test_an_adaptive_run_never_hardens() -> None:
    assert {entry["phase"] for entry in run(evolution(harden=None))[5:]} == {"sparsify"}


def test_the_noise_scale_has_its_own_schedule() -> None:
    plan = evolution(noise=Decay(1.0, 0.0, 10)).make_plan(20)
    assert [plan.at(step).noise_scale for step in (0, 5, 10, 15, 19)] == [1.0, 1.0, 0.5, 0.0, 0.0]


def test_the_plan_survives_save_and_load_without_a_trainer() -> None:
    trained = evolution(diversify=0.25, harden=0.75)
    trained.plan = trained.make_plan(40)
    loaded = evolution(diversify=0.25, harden=0.75)
    loaded.load_state_dict(trained.state_dict())
    assert (
        loaded.plan
        == trained.plan
        == EvolutionPlan(10, 30, 40, Schedule(2.0, 0.1, 8, "exponential"), Schedule(1.0, 1.0, 0))
    )
    task = make_task()
    loaded.apply(task, 40)
    assert moe_layers(task)[0][1].router.hardened


@pytest.mark.parametrize(
    ("options", "total", "message"),
    [
        ({"harden": 5}, 20, r"evolution.harden=5 is step 5, not after the spawn at step 5"),
        ({"diversify": 20, "harden": None}, 20, r"evolution.diversify=20 is step 20, past the end of a run of 20"),
        ({"harden": 25}, 20, r"evolution.harden=25 is step 25, past the end"),
        ({"harden": 1.5}, 20, r"evolution.harden=1.5: a share of the run must be in \[0, 1\]"),
        ({"diversify": -3}, 20, r"evolution.diversify=-3"),
        ({"temperature": Decay(2.0, 0.1, 18)}, 20, r"evolution.temperature.length=18 is 18 steps from the spawn"),
        ({"temperature": Decay(2.0, 0.0, 8)}, 20, r"evolution.temperature ends at 0.0"),
        ({"temperature": Decay(2.0, 0.0, 8, "exponential")}, 20, r"both ends must be above zero"),
        ({"temperature": Decay(2.0, 0.1, 8, "square")}, 20, r"shape='square' is unknown"),
        ({"noise": Decay(1.0, -1.0, 8)}, 20, r"evolution.noise ends at -1.0"),
    ],
)
def test_a_plan_that_cannot_happen_is_refused_in_one_line(options: dict[str, Any], total: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        evolution(**options).make_plan(total)
    assert "\n" not in str(caught.value)


def test_a_refused_plan_trains_nothing() -> None:
    task = make_task()
    before = {name: value.clone() for name, value in task.state_dict().items() if "born" not in name}
    with pytest.raises(ConfigError, match="past the end"):
        run(evolution(harden=30), task=task)
    assert all(torch.equal(task.state_dict()[name], value) for name, value in before.items())


def test_a_dense_model_is_refused() -> None:
    task = LanguageModeling(GPT(30, 8, 16, 2, 2, moe_every=0), Optimization())
    with pytest.raises(ConfigError, match="needs a model with MoE layers"):
        run(evolution(), task=task)


def test_the_spawn_of_a_run_is_seeded() -> None:
    final = []
    for seed in (0, 0, 1):
        task = make_task()
        torch.manual_seed(7)
        run(evolution(seed=seed, spawn=Spawn("mask", 0.5)), task=task, max_steps=16)
        final.append(moe_layers(task)[0][1].experts.expert_parameters(1)["w_in"].detach())
    assert torch.equal(final[0], final[1])
    assert not torch.equal(final[0], final[2])


def test_a_share_of_a_short_run_keeps_at_least_one_step() -> None:
    assert Evolution(diversify=0.01, harden=0.5).make_plan(20).spawn_at == 1


def test_shares_of_a_short_run_that_round_to_one_step_stay_apart() -> None:
    plan = evolution(diversify=0.01, harden=0.06, temperature=Decay(2.0, 0.5, 0.05)).make_plan(20)
    assert (plan.spawn_at, plan.harden_at) == (1, 2)
    with pytest.raises(ConfigError, match=r"^evolution.harden=0.01 is step 1, not after the spawn at step 1"):
        evolution(diversify=0.01, harden=0.01).make_plan(20)


@pytest.mark.parametrize("total", range(2, 30))
@pytest.mark.parametrize("diversify", [0.1, 0.35, 0.5])
def test_shares_that_fill_a_run_fit_into_it_whatever_its_length(total: int, diversify: float) -> None:
    decay = Decay(2.0, 0.1, 1 - diversify)
    plan = Evolution(diversify=diversify, temperature=decay, noise=decay).make_plan(total)
    assert total - 1 <= plan.spawn_at + plan.temperature.length <= total
    with pytest.raises(ConfigError, match="temperature.length=1.0 is"):
        Evolution(diversify=diversify, temperature=Decay(2.0, 0.1, 1.0)).make_plan(total)


def test_the_plan_of_a_checkpoint_is_restored_as_it_was() -> None:
    trained = evolution()
    trained.plan = trained.make_plan(20)
    other = Evolution(diversify=100, harden=150)  # impossible within 20 steps, but it is not this plan's
    other.load_state_dict(trained.state_dict())
    assert other.plan == trained.plan


def test_a_longer_run_does_not_take_the_gate_back() -> None:
    callback = evolution(diversify=0.25, harden=0.75, noise=Decay(1.0, 0.0, 0.5))
    callback.plan = callback.make_plan(20)
    kept = "evolution.diversify=5 evolution.harden=15 evolution.temperature.length=8 evolution.noise.length=10"

    def prolong(**options: Any) -> None:
        longer = evolution(**options)
        longer.load_state_dict(callback.state_dict())
        longer.on_load_checkpoint(L.Trainer(accelerator="cpu", logger=False), make_task(), {"global_step": 20})
        run(longer, max_steps=40)

    with pytest.raises(ConfigError, match=f"^the checkpoint at step 20 is hardened .*back to sparsify .*with {kept}$"):
        prolong(diversify=0.25, harden=0.75, noise=Decay(1.0, 0.0, 0.5))
    with pytest.warns(EvomoeWarning, match=f"another plan .*, which {kept} would keep"):
        prolong(diversify=5, harden=18, noise=Decay(1.0, 0.0, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error", EvomoeWarning)
        prolong(diversify=5, harden=15, temperature=Decay(2.0, 0.1, 8, "exponential"), noise=Decay(1.0, 0.0, 10))


def test_a_validation_where_a_phase_ends_is_of_the_rule_that_has_trained() -> None:
    task, callback = make_task(), evolution(diversify=4, harden=12)
    callback.plan = callback.make_plan(16)
    for steps, phase in ((0, "diversify"), (4, "diversify"), (5, "sparsify"), (12, "sparsify"), (13, "hardened")):
        callback.apply_last(task, steps)
        assert (callback.state.phase, moe_layers(task)[0][1].router.hardened) == (phase, phase == "hardened")


def test_a_second_fit_goes_on_with_the_experts_it_has() -> None:
    task, callback = make_task(), evolution()
    run(callback, task=task)
    first = moe_layers(task)[0][1]
    before = first.experts.expert_parameters(3)["w_in"].detach().clone()
    task.optimization = Optimization(learning_rate=1e-9)
    run(callback, task=task, max_steps=16)
    assert first.live_experts == 4
    torch.testing.assert_close(first.experts.expert_parameters(3)["w_in"], before, atol=1e-6, rtol=0)


def test_a_schedule_that_the_router_cannot_hear_is_named() -> None:
    with pytest.warns(UserWarning, match="Switch has no schedule: evolution.temperature, evolution.harden do nothing"):
        run(evolution(), task=make_task(partial(Switch, capacity_factor=None)), max_steps=16)


def test_a_test_of_an_earlier_checkpoint_uses_the_values_of_its_step() -> None:
    task, callback = make_task(), evolution()
    run(callback, task=task)
    trainer = L.Trainer(accelerator="cpu", logger=False)
    callback.on_load_checkpoint(trainer, task, {"global_step": 7})
    callback.on_test_start(trainer, task)
    assert callback.state.phase == "sparsify"
    assert callback.state.temperature == Schedule(2.0, 0.1, 8, "exponential").at(1)
    assert not moe_layers(task)[0][1].router.hardened


def test_a_plan_is_described_in_one_line() -> None:
    decayed = Evolution(diversify=4, harden=30, temperature=Decay(2.0, 0.1, 8, "exponential")).make_plan(40)
    line = "diversify [0, 4); sparsify [4, 30), temperature 2 to 0.1 (exponential) over 8; hardened [30, 40)"
    assert decayed.describe() == line
    assert Evolution(diversify=4).make_plan(40).describe() == "diversify [0, 4); sparsify [4, 40)"
    assert Evolution(harden=4).make_plan(40).describe() == "sparsify [0, 4); hardened [4, 40)"
