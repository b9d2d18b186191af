from __future__ import annotations

import numpy as np
import pytest
from data.tiny_images import draw
from hypothesis import given
from hypothesis import strategies as st

from evomoe.data.images.source import ImageSet, LabelledImages, hold_out, with_validation
from evomoe.errors import ConfigError

NAMES = ["red", "green", "blue"]


def three(**changed: LabelledImages) -> dict[str, LabelledImages]:
    return {"train": draw(30), "val": draw(6, seed=1), "test": draw(7, seed=2)} | changed


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    val=st.floats(0.01, 0.45),
    test=st.floats(0.01, 0.45),
    seed=st.integers(0, 5),
)
def test_held_out_splits_are_disjoint_whole_and_stratified(counts, val, test, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(seed).shuffle(labels)
    parts = hold_out(labels, {"val": val, "test": test}, seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(labels)))
    for label, count in enumerate(counts):
        taken = {name: int((labels[part] == label).sum()) for name, part in parts.items()}
        assert abs(taken["val"] - val * count) <= 0.5
        assert abs(taken["val"] + taken["test"] - (val + test) * count) <= 0.5
    again = hold_out(labels, {"val": val, "test": test}, seed)
    assert all(np.array_equal(parts[name], again[name]) for name in parts)


def test_another_seed_holds_out_other_images():
    labels = np.zeros(100, dtype=int)
    first, second = (hold_out(labels, {"val": 0.2}, seed)["val"] for seed in (0, 1))
    assert len(first) == len(second) == 20
    assert set(first) != set(second)


@pytest.mark.parametrize("shares", [{"val": 0.0}, {"val": -0.1}, {"val": 1.0}, {"val": 0.4, "test": 0.6}])
def test_shares_that_leave_nothing_are_refused(shares):
    with pytest.raises(ConfigError, match="data.holdout: expected shares above 0 that leave images to train on"):
        hold_out(np.zeros(10, dtype=int), shares)


def test_given_validation_images_stay():
    train, val, test = three().values()
    given_val = with_validation(train, test, 0.1, val)
    assert given_val["val"] is val
    assert len(given_val["train"]) == 30
    held_out = with_validation(train, test, 0.2)
    assert [len(split) for split in held_out.values()] == [24, 6, 7]
    assert list(held_out) == ["train", "val", "test"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val": draw(0)}, "the val split has no image"),
        ({"test": draw(6, size=9)}, "the test split has images of 3 x 9 x 9 and the training split of 3 x 8 x 8"),
        ({"test": draw(6, channels=1)}, "the test split has images of 1 x 8 x 8 and"),
        ({"val": draw(6, classes=4)}, "the val split has the label 3, and there are 3 classes: expected labels from 0"),
        ({"train": draw(30, classes=2)}, "the class 'blue' of the val split has no training image: add some, or leave"),
    ],
)
def test_images_that_do_not_fit_together_are_refused(changed, message):
    with pytest.raises(ConfigError, match=message) as caught:
        ImageSet(three(**changed), NAMES)
    assert "\n" not in str(caught.value)


def test_the_digest_sees_every_pixel_label_and_name():
    def changed(split: str, images: int = 0, labels: int = 0) -> ImageSet:
        splits = three()
        splits[split].images[-1, -1, -1, -1] += images
        splits[split].labels[-1] = (splits[split].labels[-1] + labels) % 3
        return ImageSet(splits, NAMES)

    sets = [
        ImageSet(three(), NAMES),
        ImageSet(three(), ["red", "green", "violet"]),
        *(changed(split, images=1) for split in three()),
        *(changed(split, labels=1) for split in three()),
    ]
    assert len({images.summary.digest for images in sets}) == len(sets)
    assert ImageSet(three(), NAMES).summary.digest == sets[0].summary.digest


def test_the_values_of_the_training_pixels_are_counted():
    splits = three()
    counts = ImageSet(splits, NAMES).summary.counts
    for channel in range(3):
        for value in (0, 7, 255):
            assert counts[channel, value] == (splits["train"].images[:, channel] == value).sum()
