from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from data.tiny_images import Drawn
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from evomoe.callbacks.monitoring.few_shot_probe import FewShotProbe, draw_shots, features_of, predict
from evomoe.data import ImageDataModule
from evomoe.data.images.source import ImageSet, LabelledImages
from evomoe.errors import ConfigError
from evomoe.models.vit import ViT
from evomoe.routing import SoftmaxTokenChoice
from evomoe.tasks import ImageClassification, Optimization


@pytest.mark.parametrize(("n", "width"), [(30, 6), (6, 30)])
def test_the_regression_is_that_of_scikit_learn(n, width):
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(n)
    features, queries = (torch.randn(count, width, generator=generator) * 3 + 1 for count in (n, 50))
    labels = torch.arange(n) % 3
    targets = F.one_hot(labels, 3).float()
    penalties = [0.01, 1.0, 100.0]
    mean, std = features.mean(0), features.std(0, correction=0)
    predicted = predict(features, targets, queries, penalties)
    for row, penalty in zip(predicted, penalties, strict=True):
        ridge = linear_model.Ridge(alpha=penalty).fit((features - mean) / std, targets)
        assert row.tolist() == ridge.predict((queries - mean) / std).argmax(axis=1).tolist()
    assert len({tuple(row.tolist()) for row in predicted}) > 1


def test_a_constant_feature_does_no_harm():
    features = torch.tensor([[0.0, 7.0], [1.0, 7.0]])
    assert predict(features, torch.eye(2), torch.tensor([[0.2, 7.0], [0.8, 7.0]]), [1.0]).tolist() == [[0, 1]]


@given(
    counts=st.lists(st.integers(3, 9), min_size=1, max_size=5),
    shots=st.integers(1, 3),
    seed=st.tuples(st.integers(0, 3), st.integers(0, 9)),
)
def test_a_draw_takes_equally_many_of_each_class(counts, shots, seed):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    drawn = draw_shots(labels, shots, seed)
    assert len(set(drawn)) == len(drawn)
    assert np.bincount(labels[drawn]).tolist() == [shots] * len(counts)
    assert np.array_equal(drawn, draw_shots(labels, shots, seed))


class FirstPixel(nn.Module):
    """Features of which one is the class, and the others noise."""

    def features(self, images, final_rule=False):
        assert final_rule
        return images[:, :, 0, :2].flatten(1), []


class Task(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = FirstPixel()

    def test_step(self, batch, batch_idx): ...


def make_data() -> ImageDataModule:
    data = ImageDataModule(Drawn(train=60, val=30, test=31), batch_size=8)
    data.setup()
    return data


def probe(task: L.LightningModule | None = None, precision: str = "32-true", **options) -> dict[str, float]:
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[FewShotProbe(**options)],
    )
    trainer.test(task or Task(), datamodule=make_data(), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_a_test_logs_each_number_of_shots():
    values = probe(shots=[1, 5, 20], draws=4)
    assert set(values) == {"test/probe_1shot", "test/probe_5shot", "test/probe_20shot"}
    assert 1 / 3 < values["test/probe_1shot"] < values["test/probe_20shot"]
    assert values == probe(shots=[1, 5, 20], draws=4) != probe(shots=[1, 5, 20], draws=4, seed=1)


def test_it_is_the_mean_over_the_draws_at_the_penalty_that_validation_prefers(monkeypatch):
    data, task = make_data(), Task()
    splits = data.images.splits
    penalties = (0.1, 1e3)
    monkeypatch.setattr("evomoe.callbacks.monitoring.few_shot_probe.PENALTIES", penalties)
    table = {split: np.zeros((3, 2)) for split in ("val", "test")}
    for draw in range(3):
        drawn = draw_shots(splits["train"].labels, 2, (0, 2, draw))
        targets = F.one_hot(torch.from_numpy(splits["train"].labels[drawn]), 3).float()
        train = features_of(task, data, "train", drawn)
        for split, rows in table.items():
            predicted = predict(train, targets, features_of(task, data, split), penalties)
            rows[draw] = (predicted.numpy() == splits[split].labels).mean(axis=1)
    best = table["val"].mean(axis=0).argmax()
    assert probe(shots=[2], draws=3)["test/probe_2shot"] == pytest.approx(table["test"].mean(axis=0)[best])


def test_features_of_chosen_images_are_those_of_all():
    data, task = make_data(), Task()
    chosen = np.array([7, 3, 50])
    everything = features_of(task, data, "train")
    assert torch.equal(features_of(task, data, "train", chosen), everything[chosen])
    in_order = np.stack([data.dataset("train")[number]["images"][:, 0, :2].ravel() for number in range(60)])
    np.testing.assert_array_equal(everything.numpy(), in_order)


class Colours(Drawn):
    """Images of three colours, as they lie in files: by class."""

    def load(self) -> ImageSet:
        def sort(split: LabelledImages) -> LabelledImages:
            labels = np.sort(split.labels)
            images = split.images // 4
            images[np.arange(len(labels)), labels] += 128
            return LabelledImages(images, labels)

        images = super().load()
        return ImageSet({name: sort(split) for name, split in images.splits.items()}, images.classes)


def make_classifier(router) -> ImageClassification:
    torch.manual_seed(0)
    model = ViT(8, 4, 3, 3, 16, 2, 2, num_experts=3, moe_every=1, router=router, dropout=0.0)
    return ImageClassification(model, Optimization()).eval()


@torch.no_grad()
def test_images_sorted_by_class_meet_a_router_of_the_batch_as_in_an_evaluation(monkeypatch):
    task = make_classifier(SoftmaxTokenChoice)
    data = ImageDataModule(Colours(train=96), batch_size=16)
    data.setup()
    features, seen = task.model.features, []

    def watched(images, final_rule):
        pooled, routings = features(images, final_rule=final_rule)
        seen.append(float(sum(routing.dropped for routing in routings)))
        return pooled, routings

    monkeypatch.setattr(task.model, "features", watched)
    features_of(task, data, "train")
    of_probe, _ = sum(seen), seen.clear()
    images = torch.from_numpy(np.stack([item["images"] for item in map(data.dataset("train").__getitem__, range(96))]))
    for batch in images.split(16):
        watched(batch, final_rule=True)
    of_files, _ = sum(seen), seen.clear()
    for batch in images[torch.randperm(96)].split(16):
        watched(batch, final_rule=True)
    of_evaluation = sum(seen)
    assert of_files > 1.5 * of_evaluation
    assert of_probe == pytest.approx(of_evaluation, rel=0.2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_features_are_taken_in_the_precision_of_the_run(precision):
    values = probe(make_classifier(SoftmaxTokenChoice), precision, shots=[20], draws=2)
    assert values["test/probe_20shot"] > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": []}, r"probe shots=\[\]: expected images of each class"),
        ({"shots": [0, 5]}, r"probe shots=\[0, 5\]: expected"),
        ({"draws": 0}, "probe draws=0: expected at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FewShotProbe(**options)


def test_too_few_images_are_refused_before_training():
    trainer = SimpleNamespace(datamodule=make_data())
    with pytest.raises(ConfigError) as error:
        FewShotProbe(shots=[1, 21]).setup(trainer, Task(), "fit")
    assert str(error.value) == (
        "probe shots=[1, 21]: the class 'red' has 20 training images; ask for no more by callbacks.probe.shots, or for "
        "none by callbacks.probe=null"
    )
    with pytest.raises(ConfigError, match="has 20 training images; ask for less$"):
        FewShotProbe(shots=[21], remedy="ask for less").setup(trainer, Task(), "fit")
