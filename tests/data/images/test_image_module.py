from __future__ import annotations

import re
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from data.test_resume import checkpoints
from data.tiny_images import Drawn
from data.tiny_text import trainer
from torch import nn
from torch.nn import functional as F

from evomoe.data import Augmentation, ImageDataModule
from evomoe.data.images.module import ImageSampler
from evomoe.data.images.source import ImageSet
from evomoe.data.sampling import EvaluationSampler
from evomoe.errors import ConfigError

AUGMENTATION = Augmentation(crop=2, flip=True)


def module(source: Drawn | None = None, **options: Any) -> ImageDataModule:
    data = ImageDataModule(source or Drawn(), **{"batch_size": 4, "seed": 5, "augmentation": AUGMENTATION, **options})
    data.prepare_data()
    data.setup()
    return data


def test_images_are_normalised_by_the_training_split():
    data = module(augmentation=Augmentation(), batch_size=30)
    (batch,) = data.train_dataloader()
    assert batch["images"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64
    assert batch["valid"].tolist() == [True] * 30
    torch.testing.assert_close(batch["images"].mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(batch["images"].var(dim=(0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-5)
    pixels = data.images.splits["train"].images / 255
    np.testing.assert_allclose(data.mean, pixels.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(data.std, pixels.std(axis=(0, 2, 3)))
    images = data.dataset("test")
    test = torch.from_numpy(np.stack([images[index]["images"] for index in range(7)]))
    expected = (data.images.splits["test"].images / 255 - data.mean[:, None, None]) / data.std[:, None, None]
    torch.testing.assert_close(test, torch.from_numpy(expected).float())


def test_the_normalisation_needs_less_memory_than_the_images():
    data = Drawn(train=1500, size=32).load()
    images = data.splits["train"].images
    tracemalloc.start()
    try:
        data.summary  # noqa: B018
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < images.nbytes


def test_an_epoch_has_each_image_once_and_the_next_one_another_order_and_other_crops():
    data = module(Drawn(train=32))
    loader = data.train_dataloader()
    epochs = [list(loader), list(loader)]
    orders = [ImageSampler.order(loader.sampler, epoch) for epoch in (0, 1)]
    assert [sorted(index for _, index in order) for order in orders] == [list(range(32))] * 2
    assert orders[0] != [(0, index) for _, index in orders[1]]
    assert {epoch for epoch, _ in orders[1]} == {1}
    pictures = [{image.numpy().tobytes() for batch in epoch for image in batch["images"]} for epoch in epochs]
    assert len(pictures[0] & pictures[1]) < 8


def test_evaluation_has_every_image_once_and_unchanged():
    data = module(eval_batch_size=3)
    batches = list(data.test_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [3, 3, 1]
    images = data.dataset("test")
    expected = [(images[index]["images"].tolist(), int(images[index]["labels"])) for index in range(7)]
    shown = [
        (image.tolist(), int(label))
        for batch in batches
        for image, label in zip(batch["images"], batch["labels"], strict=True)
    ]
    assert sorted(shown) == sorted(expected)


def test_processes_share_the_images_and_pad_to_equal_numbers():
    data = module()
    images = data.dataset("test")
    seen: list[tuple[int, bool]] = []
    for rank in range(4):
        items = [(index, images[index]) for index in EvaluationSampler(images, rank, 4)]
        assert len(items) == 2
        seen += [(index, item["valid"]) for index, item in items]
        assert all((item["images"] == 0).all() for _, item in items if not item["valid"])
    assert sorted(seen) == [*((index, True) for index in range(7)), (7, False)]


def test_what_the_model_and_the_reader_are_told():
    data = module()
    assert data.model_sizes() == {"num_classes": 3, "channels": 3, "image_size": 8}
    assert data.classes == ["red", "green", "blue"]
    assert data.describe().startswith("drawn: train 30, val 6, test 7 images of 3 x 8 x 8 in 3 classes (")
    assert module().fingerprint == data.fingerprint != module(Drawn(train=33)).fingerprint


def test_a_checkpoint_of_other_images_is_refused():
    state = module().state_dict()
    module().load_state_dict(state)
    message = r"trained on other data \(train 30 -> 33, content \w+ -> \w+\); restore these or start a new run"
    with pytest.raises(ConfigError, match=message):
        module(Drawn(train=33)).load_state_dict(state)


class Renamed(Drawn):
    def load(self):
        return ImageSet(super().load().splits, ["blue", "green", "red"])


def test_a_checkpoint_is_measured_on_images_of_its_classes_and_scale():
    state = module().state_dict()
    module(Drawn(test=9)).check_meaning(state)
    older = {name: value for name, value in state.items() if name not in ("mean", "std")}
    module(Drawn(train=33)).check_meaning(older)
    with pytest.raises(ConfigError, match=r"on other classes \(\['red', .*\]\) than .* \(\['blue', .*; restore the"):
        module(Renamed()).check_meaning(state)
    with pytest.raises(ConfigError, match="on images of another mean of the channels"):
        module(Drawn(train=33)).check_meaning(state)


def test_other_images_that_a_checkpoint_is_measured_on_are_named():
    state = module().state_dict()

    def changes(**counts: int) -> str:
        return ImageDataModule(Drawn(**counts), batch_size=4).adapt_to(state, "test")

    assert changes() == ""
    assert re.fullmatch(r"test 7 -> 9, content \w+ -> \w+", changes(test=9))


class Constant(Drawn):
    channels = slice(None)

    def load(self):
        images = super().load()
        images.splits["train"].images[:, self.channels] = 7
        return images


class Red(Constant):
    channels = slice(1, None)


class Wide(Drawn):
    def load(self):
        images = super().load()
        for split in images.splits.values():
            object.__setattr__(split, "images", split.images[:, :, 2:])
        return images


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: module(batch_size=0), "data.batch_size=0 must be at least 1"),
        (lambda: module(eval_batch_size=0), "data.eval_batch_size=0 must be at least 1"),
        (lambda: module(batch_size=31).train_dataloader(), "the training split has 30 images, fewer than one batch"),
        (lambda: module(Constant()), "every channel of the training images is constant"),
        (lambda: module(Wide()), "the images have 6 x 8 pixels: expected square ones"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_constant_channel_is_only_moved():
    (batch,) = module(Red(), augmentation=Augmentation(), batch_size=30).train_dataloader()
    torch.testing.assert_close(batch["images"][:, 1:], torch.zeros(30, 2, 8, 8), rtol=0, atol=1e-6)
    torch.testing.assert_close(batch["images"][:, 0].var(correction=0), torch.tensor(1.0), rtol=0, atol=1e-5)


class Linear(L.LightningModule):
    """One layer, which records what it sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 8 * 8, 3)
        self.seen: list[bytes] = []
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.layer(batch["images"].flatten(1)), batch["labels"])
        self.seen.append(batch["images"].numpy().tobytes())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_sees_the_same_augmented_images(tmp_path: Path, num_workers: int):
    """Over the end of an epoch of seven batches, whatever the workers have read ahead."""
    whole = Linear()
    saving = checkpoints(tmp_path, every_n_train_steps=1)
    trainer(tmp_path, max_steps=18, callbacks=[saving]).fit(whole, datamodule=module(num_workers=num_workers))
    assert len(set(whole.seen)) == 18
    for step in (3, 6, 7, 8):
        resumed = Linear()
        options = {"max_steps": 18}
        trainer(tmp_path, **options).fit(
            resumed, datamodule=module(num_workers=num_workers), ckpt_path=tmp_path / f"step={step}.ckpt"
        )
        assert resumed.seen == whole.seen[step:]
        assert resumed.losses == whole.losses[step:]


def test_another_augmentation_does_not_go_on(tmp_path: Path):
    saving = checkpoints(tmp_path, every_n_train_steps=2)
    trainer(tmp_path, max_steps=2, callbacks=[saving]).fit(Linear(), datamodule=module())
    with pytest.raises(ConfigError, match=r"made with data.augmentation.crop=2 and this run has 1, so its batches"):
        trainer(tmp_path, max_steps=4).fit(
            Linear(),
            datamodule=module(augmentation=Augmentation(crop=1, flip=True)),
            ckpt_path=tmp_path / "step=2.ckpt",
        )


def test_an_option_that_is_younger_than_the_checkpoint_was_off():
    loader = module().train_dataloader()
    state = loader.state_dict()
    del state["identity"]["data.augmentation.area"]
    loader.load_state_dict(state)
    younger = module(augmentation=replace(AUGMENTATION, area=0.5)).train_dataloader()
    message = "the checkpoint was made with data.augmentation.area=None and this run has 0.5"
    with pytest.raises(ConfigError, match=message):
        younger.load_state_dict(state)


def test_overfitting_repeats_the_same_batches(tmp_path: Path):
    task = Linear()
    trainer(tmp_path, overfit_batches=2, max_steps=6).fit(task, datamodule=module())
    assert task.seen[:2] == task.seen[2:4] == task.seen[4:]
