from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from data.tiny_images import draw
from hypothesis import given
from hypothesis import strategies as st

from evomoe.data.images.augmentation import POLICIES, Augmentation, crop_at, cut_out
from evomoe.errors import ConfigError

IMAGE = draw(1, size=5).images[0]


def test_a_crop_typed_by_hand():
    image = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3)
    assert crop_at(image, 1, 0, 2, 77)[0].tolist() == [[77, 77, 77], [2, 3, 77], [5, 6, 77]]
    assert np.array_equal(crop_at(image, 1, 1, 1, 77), image)


def test_every_shift_is_drawn_equally_often():
    augment = Augmentation(crop=1)
    seen = [augment(IMAGE, 0, 0, number).tobytes() for number in range(1800)]
    shifts = [crop_at(IMAGE, 1, top, left, 0).tobytes() for top in range(3) for left in range(3)]
    counts = np.array([seen.count(shift) for shift in shifts])
    assert counts.sum() == 1800
    assert ((counts - 200) ** 2 / 200).sum() < 26.1  # chi square with 8 degrees of freedom: 0.1 %


@given(st.floats(0.01, 1), *[st.integers(0, 2**64 - 1)] * 4)
def test_a_part_is_cut_out_and_scaled_as_pillow_does(area, share, aspect, top, left):
    Image = pytest.importorskip("PIL.Image")
    smooth = np.add.outer(np.arange(24), 3 * np.arange(24)).astype(np.uint8)
    scaled = cut_out(np.stack([smooth, smooth.T]), area, share, aspect, top, left)
    assert scaled.shape == (2, 24, 24)
    pixels = 24 * 24 * (area + (1 - area) * share / 2**64)
    width_by_height = np.exp((2 * aspect / 2**64 - 1) * np.log(4 / 3))
    width = min(24, max(1, round(float(np.sqrt(pixels * width_by_height)))))
    height = min(24, max(1, round(float(np.sqrt(pixels / width_by_height)))))
    x, y = left % (25 - width), top % (25 - height)
    part = Image.fromarray(smooth).crop((x, y, x + width, y + height))
    expected = np.asarray(part.resize((24, 24), Image.Resampling.BILINEAR)).astype(int)
    assert abs(scaled[0] - expected).max() <= 1


def test_parts_have_all_sizes_and_places():
    ramp = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (1, 24, 1))
    parts = [Augmentation(area=0.25)(ramp, 0, 0, number)[0].astype(int) for number in range(400)]
    widths = np.array([part[0, -1] - part[0, 0] + 10 for part in parts]) / 240
    assert widths.min() < 0.55
    assert widths.max() > 0.95
    assert abs(np.mean([part.mean() for part in parts]) - ramp.mean()) < 5
    assert max(abs(part - part[:1]).max() for part in parts) <= 1  # halves are rounded either way


def test_every_second_image_is_mirrored():
    augment = Augmentation(flip=True)
    mirrored = [np.array_equal(augment(IMAGE, 0, epoch, 3), IMAGE[:, :, ::-1]) for epoch in range(1000)]
    assert 450 < sum(mirrored) < 550
    kept = [np.array_equal(augment(IMAGE, 0, epoch, 3), IMAGE) for epoch in range(1000)]
    assert [not mirror for mirror in mirrored] == kept


@given(st.integers(0, 3), st.integers(0, 100), st.integers(0, 1000))
def test_the_key_alone_decides(seed, epoch, index):
    augment = Augmentation(crop=2, flip=True)
    before = torch.get_rng_state()
    first = augment(IMAGE, seed, epoch, index)
    torch.rand(3)
    np.random.rand(3)
    assert np.array_equal(first, augment(IMAGE, seed, epoch, index))
    torch.set_rng_state(before)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_of_torchvision_follow_the_key_and_leave_the_generator_alone(policy):
    pytest.importorskip("torchvision")
    image = draw(1, size=16).images[0]
    augment = Augmentation(policy=policy)
    before = torch.get_rng_state()
    changed = [augment(image, 0, epoch, 0) for epoch in range(12)]
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    again = [augment(image, 0, epoch, 0) for epoch in range(12)]
    assert all(np.array_equal(first, second) for first, second in zip(changed, again, strict=True))
    assert len({picture.tobytes() for picture in changed}) > 4
    assert all(picture.dtype == np.uint8 and picture.shape == image.shape for picture in changed)


@pytest.mark.parametrize("error", [ImportError("no module"), RuntimeError("operator torchvision::nms does not exist")])
def test_a_policy_without_a_working_torchvision_is_refused(monkeypatch, error):
    class Broken:
        def __getattr__(self, name):
            raise error

    monkeypatch.setitem(sys.modules, "torchvision.transforms", Broken())
    with pytest.raises(ConfigError, match="policy=augmix needs the package torchvision, which cannot be imported here"):
        Augmentation(policy="augmix")


def test_no_augmentation_is_the_image_itself():
    assert Augmentation()(IMAGE, 0, 0, 0) is IMAGE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"area": 0.0}, "data.augmentation.area=0.0: expected a share above 0"),
        ({"area": 1.1}, "data.augmentation.area=1.1: expected a share above 0"),
        ({"crop": -1}, "data.augmentation.crop=-1: expected 0 or more"),
        ({"crop_fill": 256}, "data.augmentation.crop_fill=256: expected a value of a pixel, 0 to 255"),
        ({"policy": "auto"}, "data.augmentation.policy=auto is unknown: expected one of rand_augment, trivial_augment"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Augmentation(**options)
