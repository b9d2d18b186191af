from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from evomoe.errors import ConfigError
from evomoe.models.sequence_classifier import SequenceClassifier
from evomoe.routing import (
    DTSGate,
    ExpertChoice,
    HashLayer,
    LossFreeBias,
    ReMoE,
    ScheduleValues,
    StableMoE,
    Switch,
)
from evomoe.tasks import Optimization, SequenceClassification

V, S, C = 32, 12, 3
DROPLESS = partial(Switch, capacity_factor=None)


class Sequences(L.LightningDataModule):
    """Rows whose label is their second word modulo C, or that word as a number; evaluations end in a row of padding.

    Most labels of the training are 2.
    """

    def __init__(self, regression: bool = False) -> None:
        super().__init__()
        self.regression = regression
        draws = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, V, (24, S), generator=draws)
        self.tokens[:14, 1] = 2 + C * torch.randint(0, 8, (14,), generator=draws)
        self.valid = torch.arange(S) < torch.randint(2, S + 1, (24,), generator=draws)[:, None]

    def labels(self) -> Tensor:
        words = self.tokens[:, 1]
        return words / V if self.regression else words % C

    def training_labels(self) -> np.ndarray:
        return self.labels().numpy()

    def training_ids(self) -> np.ndarray:
        return self.tokens.numpy().reshape(-1)

    def batches(self, valid: Tensor) -> Any:
        parts = zip(self.tokens.split(8), valid.split(8), self.labels().split(8), strict=True)
        return DataLoader([dict(zip(("tokens", "valid", "labels"), part, strict=True)) for part in parts], None)

    def train_dataloader(self) -> Any:
        return self.batches(self.valid)

    def val_dataloader(self) -> Any:
        valid = self.valid.clone()
        valid[-1] = False
        return self.batches(valid)

    test_dataloader = val_dataloader


def make_task(router: Any = DTSGate, regression: bool = False, **options: Any) -> SequenceClassification:
    torch.manual_seed(0)
    dropout = {"dropout": 0.0, "head_dropout": 0.0}
    classes = 1 if regression else C
    model = SequenceClassifier(
        V + 1, S, 16, 2, 2, num_classes=classes, num_experts=3, router=router, norm_first=True, **dropout
    )
    torch.nn.init.normal_(model.out.weight)
    metrics = ["pearson", "spearman"] if regression else ["accuracy", "f1", "matthews"]
    return SequenceClassification(model, Optimization(learning_rate=1e-2), metrics=metrics, **options)


def make_trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(enable_checkpointing=False, **quiet, **options)


def sharpen(task: SequenceClassification) -> None:
    """Make the two rules differ."""
    for layer in task.model.moe_layers.values():
        torch.nn.init.normal_(layer.router.gate.weight)
        layer.router.set_schedule(ScheduleValues(temperature=2.0))


@torch.no_grad()
def by_hand(task: SequenceClassification, **options: Any) -> tuple[list[Tensor], list[float]]:
    """Outputs and labels of a loop over the real rows of the evaluation, each without its padding."""
    data = Sequences(task.is_regression)
    task.eval()
    outputs = [
        task.model(tokens[None, : valid.sum()], **options)[0][0]
        for tokens, valid in zip(data.tokens[:-1], data.valid[:-1], strict=True)
    ]
    return outputs, data.labels()[:-1].tolist()


def test_evaluation_is_the_mean_over_the_real_sequences_under_both_rules():
    task = make_task()
    sharpen(task)
    trainer = make_trainer()
    trainer.test(task, datamodule=Sequences(), verbose=False)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    losses = {}
    for suffix, options in (("", {}), ("_sparse", {"final_rule": True})):
        outputs, labels = by_hand(task, **options)
        losses[suffix] = -sum(row.log_softmax(0)[label] for row, label in zip(outputs, labels, strict=True)) / 23
        right = [int(row.argmax()) == label for row, label in zip(outputs, labels, strict=True)]
        assert values[f"test/loss{suffix}"] == pytest.approx(float(losses[suffix]), rel=1e-5)
        assert values[f"test/accuracy{suffix}"] == pytest.approx(sum(right) / 23)
    assert abs(losses[""] - losses["_sparse"]) > 1e-4
    assert values["test/majority_accuracy"] == pytest.approx(labels.count(2) / 23)
    assert {"test/f1", "test/matthews", "test/f1_sparse", "test/matthews_sparse"} <= values.keys()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_numbers_in_half_precision_are_refused(precision):
    trainer = make_trainer(precision=precision)
    mixed = precision.replace("true", "mixed")
    with pytest.raises(ConfigError, match=f"^trainer.precision={precision} rounds .* to three digits: use {mixed}$"):
        trainer.test(make_task(regression=True), datamodule=Sequences(regression=True), verbose=False)


def test_numbers_are_held_against_numbers():
    task = make_task(regression=True)
    sharpen(task)
    trainer = make_trainer()
    trainer.test(task, datamodule=Sequences(regression=True), verbose=False)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for suffix, options in (("", {}), ("_sparse", {"final_rule": True})):
        outputs, labels = by_hand(task, **options)
        numbers = np.array([float(row[0]) for row in outputs])
        assert values[f"test/loss{suffix}"] == pytest.approx(float(np.mean((numbers - labels) ** 2)), rel=1e-5)
        assert values[f"test/pearson{suffix}"] == pytest.approx(np.corrcoef(numbers, labels)[0, 1], abs=1e-4)
    assert "test/majority_accuracy" not in values


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("router", [DTSGate, Switch, ExpertChoice])
def test_training_learns(router, regression):
    task, data = make_task(router, regression), Sequences(regression)
    before = make_trainer().validate(task, datamodule=data, verbose=False)[0]
    make_trainer(max_steps=90, limit_val_batches=0).fit(task, datamodule=data)
    after = make_trainer().validate(task, datamodule=data, verbose=False)[0]
    assert after["val/loss"] < 0.2 * before["val/loss"]
    assert after["val/pearson" if regression else "val/accuracy"] > 0.9


def step_of(task: SequenceClassification, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What a training step returns, without a trainer."""
    task.log = lambda *args, **kwargs: None
    torch.manual_seed(3)
    return task.training_step(batch, 0)


def test_a_step_is_the_mean_of_its_sequences_and_their_work_is_charged():
    task = make_task(DROPLESS)
    batch = next(iter(Sequences().train_dataloader()))
    outputs = step_of(task, batch)
    routing = outputs["routings"][0]
    with torch.no_grad():
        logits, _ = task.model(batch["tokens"], valid=batch["valid"])
    assert outputs["task_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, batch["labels"])))
    work = outputs["work"]
    assert int(work.tokens) == int(batch["valid"].sum())
    assert routing.rows == work.tokens
    assert work.forward_flops == pytest.approx(task.model.forward_flops(8, S, int(work.tokens) / (8 * S)))


@pytest.mark.parametrize("router", [DROPLESS, DTSGate])
def test_padding_changes_no_loss_and_no_gradient(router):
    batch = next(iter(Sequences().train_dataloader()))
    longer = dict(batch)
    longer["tokens"] = torch.where(batch["valid"], batch["tokens"], (batch["tokens"] + 5) % V)
    gradients = []
    for given in (batch, longer):
        task = make_task(router)
        step_of(task, given)["loss"].backward()
        gradients.append({name: value.grad for name, value in task.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(".router." in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        if "token_embedding" not in name:  # of which a row may get a gradient of zero, or none
            torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def routers_of(task: SequenceClassification) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in task.state_dict().items() if ".router." in name}


ROUTERS = {
    "dts": (DTSGate, {"balance": 0.1}),
    "switch": (DROPLESS, {"balance": 0.1}),
    "bias": (partial(LossFreeBias, update_rate=0.1), {}),
    "lambda": (partial(ReMoE, initial_lambda=0.01), {"sparsity": 1.0}),
    "stable": (partial(StableMoE, vocab_size=V + 1), {"balance": 0.3, "distill": 0.3}),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_frozen_routers_stay_bit_for_bit_and_others_do_not(name):
    router, coefficients = ROUTERS[name]
    for frozen in (True, False):
        task = make_task(router, loss_coefficients=coefficients, freeze_routers=frozen)
        before, encoder = routers_of(task), task.model.token_embedding.weight.clone()
        make_trainer(max_steps=6, limit_val_batches=0, accumulate_grad_batches=2).fit(task, datamodule=Sequences())
        after = routers_of(task)
        assert before
        assert not torch.equal(encoder, task.model.token_embedding.weight)
        changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
        assert bool(changed) is not frozen


def test_a_pretrained_table_is_not_made_anew_from_the_labelled_text():
    router = partial(HashLayer, vocab_size=V + 1, table="balanced")
    for pretrained in (True, False):
        task = make_task(router)
        (layer,) = task.model.moe_layers.values()
        layer.router.table.copy_(torch.arange(V + 1)[None] % 3)
        weights = {name: value.clone() for name, value in task.state_dict().items()}
        if pretrained:
            layer.router.table.zero_()
            task.load_pretrained(weights)
        make_trainer(max_steps=2, limit_val_batches=0).fit(task, datamodule=Sequences())
        assert torch.equal(layer.router.table, torch.arange(V + 1)[None] % 3) is pretrained


def test_a_score_of_other_labels_is_refused():
    model = make_task().model
    with pytest.raises(ConfigError, match="task.metrics names 'spearman', and labels are 3 classes"):
        SequenceClassification(model, Optimization(), metrics=["spearman"])
