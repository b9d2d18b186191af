from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from data.tiny_images import Drawn
from torch.nn import functional as F

from evomoe.data import ImageDataModule
from evomoe.errors import ConfigError
from evomoe.models.vit import ViT
from evomoe.routing import DTSGate, ExpertChoice, ScheduleValues, Switch
from evomoe.tasks import ImageClassification, Optimization


class SevenClasses(Drawn):
    """Labels of seven classes, so that the five likeliest are not all."""

    def load(self):
        images = super().load()
        for number, split in enumerate(images.splits.values()):
            split.labels[:] = (torch.arange(len(split)) * (3 + number)).numpy() % 7
        images.classes[:] = list("abcdefg")
        return images


def make_data(**options: Any) -> ImageDataModule:
    data = ImageDataModule(SevenClasses(train=42, val=14, test=17), batch_size=4, seed=1, **options)
    data.setup()
    return data


def make_task(router: Any = DTSGate, **options: Any) -> ImageClassification:
    torch.manual_seed(0)
    model = ViT(8, 4, 3, 7, 16, 2, 2, num_experts=3, router=router, dropout=0.0)
    torch.nn.init.normal_(model.head.weight)
    return ImageClassification(model, Optimization(learning_rate=1e-2), **options)


def make_trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(enable_checkpointing=False, **quiet, **options)


def by_hand(task: ImageClassification, **options: Any) -> dict[str, float]:
    """Means of a loop over the images of the test, one by one."""
    losses, firsts, fives = [], [], []
    images = make_data().dataset("test")
    for item in (images[index] for index in range(17)):
        with torch.no_grad():
            logits = task.model(torch.from_numpy(item["images"])[None], **options)[0][0]
        order = logits.argsort(descending=True).tolist()
        losses.append(-float(logits.log_softmax(0)[item["labels"]]))
        firsts.append(order[0] == item["labels"])
        fives.append(item["labels"] in order[:5])
    return {
        name: sum(values) / 17 for name, values in {"loss": losses, "accuracy": firsts, "accuracy_top5": fives}.items()
    }


def test_evaluation_is_the_mean_over_the_images_under_both_rules():
    task = make_task()
    for layer in task.model.moe_layers.values():
        torch.nn.init.normal_(layer.router.gate.weight)
        layer.router.set_schedule(ScheduleValues(temperature=2.0))
    trainer = make_trainer()
    trainer.test(task, datamodule=make_data(), verbose=False)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    task.eval()
    for name, mean in by_hand(task).items():
        assert values[f"test/{name}"] == pytest.approx(mean, rel=1e-5)
    for name, mean in by_hand(task, final_rule=True).items():
        assert values[f"test/{name}_sparse"] == pytest.approx(mean, rel=1e-5)
    assert values["test/loss"] != pytest.approx(values["test/loss_sparse"], rel=1e-5)
    assert values["test/accuracy"] < values["test/accuracy_top5"] < 1


def test_an_image_of_padding_is_not_counted():
    task = make_task(partial(Switch, capacity_factor=None)).eval()
    (whole, *_), padded = make_data(eval_batch_size=17).test_dataloader(), {}
    for name, values in whole.items():
        padded[name] = torch.cat([values, torch.zeros_like(values[:2])])
    padded["images"][-2:] = 5.0
    means = []
    for batch in (whole, padded):
        task.means.reset()
        outputs = task.evaluation_step(batch, 0, "val")
        means.append({name: float(value) for name, value in task.means.compute().items()})
        (routing,), (words,) = outputs["final_routings"], outputs["words"]
        assert routing.num_tokens == 17 * 4
        assert words.token_ids is None
        assert words.valid.sum() == 17 * 4
    assert means[0] == pytest.approx(means[1])


def test_predictions_are_the_logits_of_the_final_rule():
    data, task = make_data(), make_task()
    found = torch.cat(make_trainer().predict(task, data.test_dataloader()))
    with torch.no_grad():
        batches = [
            task.eval().model(batch["images"], valid=batch["valid"], final_rule=True)[0]
            for batch in data.test_dataloader()
        ]
    torch.testing.assert_close(found, torch.cat(batches))


@pytest.mark.parametrize("router", [DTSGate, Switch, partial(ExpertChoice, pool="sequence")])
def test_training_learns(router):
    task = make_task(router)
    with torch.no_grad():
        task.model.head.weight.zero_()
    before = make_trainer().validate(task, datamodule=make_data(), verbose=False)[0]
    make_trainer(max_steps=80, limit_val_batches=0).fit(task, make_data().train_dataloader())
    images = make_data().dataset("train")
    batch = torch.utils.data.default_collate([images[index] for index in range(42)])
    task.eval()
    loss = F.cross_entropy(task(batch["images"]), batch["labels"])
    assert loss < 1.0 < before["val/loss"]


def outputs_of(task: ImageClassification, seed: int = 3) -> dict[str, Any]:
    """What a training step of the first batch returns, without a trainer."""
    task.log = lambda *args, **kwargs: None
    torch.manual_seed(seed)
    return task.training_step(next(iter(make_data().train_dataloader())), 0)


def test_the_loss_is_that_of_smoothed_labels_and_work_is_charged():
    task = make_task(partial(Switch, capacity_factor=None, jitter=0.0), label_smoothing=0.1)
    outputs = outputs_of(task)
    batch = next(iter(make_data().train_dataloader()))
    targets = 0.9 * F.one_hot(batch["labels"], 7) + 0.1 / 7
    expected = -(targets * task(batch["images"]).log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(outputs["task_loss"], expected.detach())
    work = outputs["work"]
    assert work.tokens == 4 * 4
    assert work.forward_flops == pytest.approx(4 * task.model.flops_per_image(1.0))


@pytest.mark.parametrize("options", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}])
def test_the_loss_of_mixed_images_is_that_of_both_labels(options):
    task = make_task(partial(Switch, capacity_factor=None, jitter=0.0), **options)
    outputs = outputs_of(task)
    batch = next(iter(make_data().train_dataloader()))
    torch.manual_seed(3)
    images, labels, other, share = task._mix(batch["images"], batch["labels"])
    assert not torch.equal(images, batch["images"])
    targets = share * F.one_hot(labels, 7) + (1 - share) * F.one_hot(other, 7)
    expected = -(targets * task(images).log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(outputs["task_loss"], expected.detach())


def test_with_both_each_batch_draws_one_of_the_two():
    task = make_task(mixup=1.0, cutmix=1.0)
    batch = next(iter(make_data().train_dataloader()))
    torch.manual_seed(0)
    blended = 0
    for _ in range(60):
        images, *_ = task._mix(batch["images"], batch["labels"])
        known = (images[:, None] == batch["images"][None]).all(dim=2).any(dim=1)  # each pixel is one of the batch
        blended += not known.all()
    assert 20 < blended < 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"task.label_smoothing=1.0: expected a share in \[0, 1\)"),
        ({"mixup": -0.1}, "task.mixup=-0.1: expected 0 for none"),
        ({"cutmix": -1.0}, "task.cutmix=-1.0: expected 0 for none"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_task(**options)
