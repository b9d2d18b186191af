"""What is logged of a validation's routing. Shapes: B batch, S sequence, E experts."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from helpers.programs import equal, load
from helpers.typed_routing import routing_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evomoe.callbacks import RoutingReport
from evomoe.callbacks.monitoring.routing_report import is_collapsed, specialized_words
from evomoe.errors import ConfigError
from evomoe.routing import Words

SETTING = ["callbacks.report.figures=true", "test=false", "callbacks.samples=null"]
SCALARS = {
    "active_experts",
    "balance_entropy",
    "co_activation_max",
    "dead_experts",
    "dropped",
    "last_fluctuation",
    "load_max_violation",
    "load_max_violation_batch",
    "mutual_information",
    "router_entropy",
    "routing_fluctuation",
    "uncovered",
    "vocabulary_specialization",
}


def report_of(objects) -> RoutingReport:
    (report,) = (callback for callback in objects.callbacks if isinstance(callback, RoutingReport))
    return report


@pytest.fixture(scope="module")
def run(train, tmp_path_factory) -> SimpleNamespace:
    """20 steps of the whole evolution, validated at steps 10 (sparsify) and 20 (hardened)."""
    folder = tmp_path_factory.mktemp("report")
    values, objects = train(folder, *SETTING)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    return SimpleNamespace(folder=folder, values=values, objects=objects, events=events)


def test_the_scalars_of_a_real_run(run):
    logged = {name: value for name, value in run.values.items() if name.startswith("val_moe/")}
    assert {name.removeprefix("val_moe/block_1/") for name in logged} == SCALARS
    tags = {tag for tag in run.events.Tags()["scalars"] if tag.startswith("val_moe/")}
    assert tags == {*logged, "val_moe/block_1/saturation"}
    for name in ("active_experts", "load_max_violation", "router_entropy", "dropped"):
        assert f"moe/block_1/{name}" in run.events.Tags()["scalars"], "the names of the training batch"


@torch.no_grad()
def test_the_values_are_those_of_the_sparse_rule_on_the_validation(run):
    model, loads, entropies = run.objects.task.model.eval(), [], []
    batches = [batch for batch, _ in zip(run.objects.data.val_dataloader(), range(2), strict=False)]
    for batch in batches:
        routing = model(batch["tokens"][:, :-1], valid=batch["valid"], final_rule=True)[1][0]
        loads.append(routing.tokens_per_expert.float())
        entropies.append(-(routing.scores * routing.scores.clamp(min=1e-30).log()).sum(dim=1)[batch["valid"].flatten()])
    total = torch.stack(loads).sum(dim=0)
    expected = {
        "active_experts": 1.0,
        "dropped": 0.0,
        "uncovered": 0.0,
        "co_activation_max": 0.0,
        "load_max_violation": (total.max() / total.mean() - 1).item(),
        "load_max_violation_batch": torch.stack([load.max() / load.mean() - 1 for load in loads]).mean().item(),
        "dead_experts": (total == 0).float().mean().item(),
        "router_entropy": torch.cat(entropies).mean().item(),
    }
    logged = {name: run.values[f"val_moe/block_1/{name}"] for name in expected}
    assert logged == pytest.approx(expected, abs=1e-5)


def test_saturation_is_written_for_the_step_of_each_validation(run):
    points = run.events.Scalars("val_moe/block_1/saturation")
    fluctuation = run.events.Scalars("val_moe/block_1/routing_fluctuation")
    assert [point.step for point in points] == [10, 20]
    assert points[-1].value == 1
    assert len(fluctuation) == 1
    assert points[0].value == pytest.approx(1 - fluctuation[0].value)  # the second validation is the last


def test_pictures_histograms_and_words(run):
    tags = run.events.Tags()
    assert set(tags["images"]) == {"val_moe/load", "val_moe/block_1/co_activation"}
    assert {"val_moe/block_1/load", "val_moe/block_1/experts_per_token"} <= set(tags["histograms"])
    bars = run.events.Histograms("val_moe/block_1/experts_per_token")[-1].histogram_value
    assert list(bars.bucket_limit) == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert list(bars.bucket) == [0, 1, 0, 0, 0], "one expert a token"
    (written, _) = run.events.Tensors("val_moe/block_1/words/text_summary")
    text = written.tensor_proto.string_val[0].decode()
    assert [line.split(":")[0] for line in text.splitlines()] == [f"    expert {expert}" for expert in range(4)]


def test_a_resumed_run_compares_with_the_validations_before(train, run, tmp_path):
    saved = load(run.folder)["callbacks"]["RoutingReport"]
    assert saved["block_1"]["steps"] == [10, 20]
    first = run.folder / "checkpoints" / "step_00000010.ckpt"
    values, objects = train(tmp_path, *SETTING, f"ckpt_path={first}")
    assert equal(load(tmp_path)["callbacks"]["RoutingReport"], saved)
    assert report_of(objects).stability["block_1"].steps == [10, 20]
    name = "val_moe/block_1/routing_fluctuation"
    assert values[name] == run.values[name]


def test_one_living_expert_is_not_reported(train, tmp_path):
    # Born at step 15: the validation at step 10 finds one expert, the one at step 20 finds four.
    values, objects = train(
        tmp_path, *SETTING, "evolution=diversify", "evolution.diversify=15", experiment="gpt_switch"
    )
    assert report_of(objects).stability["block_1"].steps == [20]
    assert "val_moe/block_1/dead_experts" in values
    assert "val_moe/block_1/routing_fluctuation" not in values


def test_a_dense_model_has_nothing_to_report(train, tmp_path):
    values, objects = train(tmp_path, *SETTING, experiment="gpt_dense")
    assert not any(name.startswith(("val_moe/", "evolution/")) for name in values)
    assert report_of(objects).state_dict() == {}


def test_a_layer_that_falls_to_one_expert_is_named(train, tmp_path, monkeypatch):
    """A gate of zeros, which nothing moves, breaks every tie in favour of the first expert."""
    told: list[str] = []
    monkeypatch.setattr("evomoe.callbacks.monitoring.routing_report.rank_zero_info", told.append)
    still = ["router.gate.init=zeros", "task.optimization.learning_rate=1e-60"]  # nothing in fp32
    train(tmp_path, *SETTING, *still, experiment="gpt_switch")
    assert told == [
        "block_1: in the last validation one of 4 experts had 100% of the tokens, so that the others hardly learn; more"
        " of router.loss_coefficients.balance spreads the load"
    ]


def test_collapse_typed_by_hand():
    assert is_collapsed(torch.tensor([0.94, *[0.004] * 15]))
    assert is_collapsed(torch.tensor([0.97, 0.01, 0.01, 0.01]))
    assert is_collapsed(torch.tensor([1.0, 0.0]))
    assert not is_collapsed(torch.tensor([1.0]))
    assert not is_collapsed(torch.tensor([0.55, 0.15, 0.15, 0.15]))
    assert not is_collapsed(torch.tensor([0.3, 0.3, 0.3, *[0.1 / 13] * 13]))  # three experts, but none alone
    assert not is_collapsed(torch.full((64,), 1 / 64))


def test_training_does_not_notice(train, run, tmp_path):
    _, objects = train(tmp_path, *SETTING, "callbacks.report=null", "callbacks.similarity=null")
    assert equal(objects.task.state_dict(), run.objects.task.state_dict())


def test_without_matplotlib_nothing_is_drawn(monkeypatch):
    find = importlib.util.find_spec
    module = "evomoe.callbacks.monitoring.routing_report"
    monkeypatch.setattr(f"{module}.find_spec", lambda name: None if name == "matplotlib" else find(name))
    report = RoutingReport(figures=True)
    with pytest.warns(UserWarning, match=r"figures=true needs matplotlib"):
        report.setup(None, None, "fit")
    assert not report.figures


@pytest.mark.parametrize("options", [{"followed_tokens": 1}, {"words": -1}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        RoutingReport(**options)


def test_specialized_words_typed_by_hand():
    share = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.25, 0.75], [0.9, 0.1], [0.0, 1.0]])
    count = torch.tensor([3, 10, 20, 40, 10])
    words = specialized_words(share, count, number=2, decode=lambda ids: f"<{ids[0]}>")
    assert words == [
        "expert 0: '<3>' 90%, '<1>' 90%",  # the more frequent first; word 0 is too rare
        "expert 1: '<4>' 100%, '<2>' 75%",
    ]
    assert specialized_words(share, count, 1, str, least=100) == ["expert 0: -", "expert 1: -"]


def test_batches_without_padding_validated_outside_a_fit():
    active = torch.tensor([[1, 0], [0, 1], [1, 0], [1, 0]]).bool()
    logged: dict[str, float] = {}
    module = SimpleNamespace(
        model=SimpleNamespace(moe_layers={"block_1": SimpleNamespace(routes=True)}, vocab_size=9),
        log_dict=lambda values, sync_dist: logged.update({name: float(value) for name, value in values.items()}),
    )
    trainer = SimpleNamespace(
        sanity_checking=False,
        world_size=1,
        state=SimpleNamespace(fn="validate"),
        loggers=[],
        is_global_zero=True,
    )
    report = RoutingReport()
    for _ in range(2):  # the second validation begins anew
        report.on_validation_epoch_start(trainer, module)
        words = Words(torch.tensor([[1, 1], [3, 1]]), None)
        outputs = {"final_routings": [routing_of(active)], "words": [words]}
        report.on_validation_batch_end(trainer, module, outputs, None, 0)
        report.on_validation_epoch_end(trainer, module)
    assert logged["val_moe/block_1/load_max_violation"] == pytest.approx(0.5)
    # Word 1 goes twice to expert 0 and once to expert 1, word 3 once to expert 0.
    assert logged["val_moe/block_1/vocabulary_specialization"] == pytest.approx(3 / 4)
    assert report.state_dict() == {}, "outside a fit there is no validation before"
