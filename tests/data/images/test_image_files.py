from __future__ import annotations

import io
import os
import pickle
import re
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data.tiny_images import draw, write_folder
from torch.utils.data import DataLoader

from evomoe.data import FolderImages
from evomoe.data.images.decoder import Decoder
from evomoe.data.images.files import HubImages, ImageFolder
from evomoe.data.images.source import ImageSet, LabelledImages
from evomoe.errors import ConfigError

pytest.importorskip("PIL")
from PIL import Image, ImageOps

NAMES = ["cat", "dog", "emu"]


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path, {"train": draw(12), "test": draw(6, seed=1)}, NAMES)
    return tmp_path


def test_a_class_is_a_folder(folder):
    images = ImageFolder(folder, folder / "cache", holdout=0.25).load()
    assert images.classes == NAMES
    assert [len(split) for split in images.splits.values()] == [9, 3, 6]
    for split in images.splits.values():
        assert np.array_equal(split.images[:, 0, 0, 0], split.labels)
    expected = {image.tobytes() for image in draw(6, seed=1).images}
    assert {image.tobytes() for image in images.splits["test"].images} == expected


def test_a_folder_of_validation_images_is_used(folder):
    write_folder(folder, {"val": draw(3, seed=2)}, NAMES)
    assert [len(split) for split in ImageFolder(folder, folder / "cache").load().splits.values()] == [12, 3, 6]


def test_grey_and_other_modes_become_the_wanted_channels(folder):
    Image.new("LA", (8, 8), (7, 128)).save(folder / "train" / "cat" / "extra.png")
    assert ImageFolder(folder, folder / "cache", holdout=0.25).load().shape == (3, 8, 8)
    assert ImageFolder(folder, folder / "cache", channels=1, holdout=0.25).load().shape == (1, 8, 8)


def test_a_file_that_is_no_image_is_named(folder):
    path = folder / "train" / "dog" / "broken.jpg"
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=re.escape(f"{path} is no image that can be read: replace or delete it")):
        ImageFolder(folder, folder / "cache", holdout=0.25).load()
    whole = (folder / "train" / "dog" / "001.png").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=re.escape(f"{path} is no image that can be read (")):
        ImageFolder(folder, folder / "cache", holdout=0.25).load()
    path.rename(path.with_name("notes.txt"))
    assert len(ImageFolder(folder, folder / "cache", holdout=0.25).load().splits["test"]) == 6


def test_pixels_of_more_than_eight_bits_are_refused(folder):
    path = folder / "train" / "cat" / "deep.png"
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(path)
    with pytest.raises(ConfigError, match=r"deep.png has pixels of more than 8 bits \(mode I;16\): convert it to 8"):
        ImageFolder(folder, folder / "cache", holdout=0.25).load()
    path.unlink()
    path = path.with_suffix(".tiff")
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(path)
    with pytest.raises(ConfigError, match=r"deep.tiff has pixels of more than 8 bits \(mode F\)"):
        ImageFolder(folder, folder / "cache", holdout=0.25).load()


def test_an_image_stands_as_the_camera_was_held(tmp_path):
    pixels = np.zeros((2, 3, 3), dtype=np.uint8)
    pixels[0, 0] = 255  # the corner at the upper left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    decoded = Decoder(None, 3).decode(tmp_path / "turned.png", "turned")
    assert decoded.shape == (3, 3, 2)
    assert decoded[:, 0, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("orientation", "method"), [(None, None), *enumerate([None, *range(7)], start=1)])
def test_every_orientation_is_turned_as_by_pillow(tmp_path, orientation, method):
    """`method`: the transpositions of Pillow by name, in the order of the values of EXIF."""
    turns = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(tmp_path / "image.png", exif=exif)
    expected = image if method is None else image.transpose(Image.Transpose[turns[method]])
    assert np.array_equal(Decoder(None, 1).decode(tmp_path / "image.png", "image")[0], np.asarray(expected))
    with Image.open(tmp_path / "image.png") as opened:
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(opened)), np.asarray(expected))


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [(0x0100, 1, b"\x07"), (0x0128, 4, struct.pack("<I", 2**31)), (0x010F, 11, struct.pack("<f", 1.5))],
    ids=["a width of one byte", "a unit beyond two bytes", "a maker that is a number"],
)
def test_untidy_entries_of_exif_do_not_matter(tmp_path, tag, kind, value):
    """Pillow reads them, and its `exif_transpose` fails at writing them."""
    entries = sorted([(0x0112, struct.pack("<HI", 3, 1) + struct.pack("<I", 6)), (tag, None)])
    packed = [
        struct.pack("<H", number) + (given or struct.pack("<HI", kind, 1) + value.ljust(4, b"\0"))
        for number, given in entries
    ]
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(packed)) + b"".join(packed) + struct.pack("<I", 0)
    Image.new("RGB", (3, 2)).save(tmp_path / "photo.jpg", exif=exif)
    with Image.open(tmp_path / "photo.jpg") as opened, pytest.raises(Exception):  # noqa: B017, PT011
        ImageOps.exif_transpose(opened)
    assert Decoder(None, 3).decode(tmp_path / "photo.jpg", "photo").shape == (3, 3, 2)


def test_what_tools_leave_inside_a_class_is_no_image(folder):
    source = folder / "train" / "cat" / "000.png"
    for copy in (".ipynb_checkpoints/000-checkpoint.png", "__MACOSX/000.png", "._000.png", "deeper/000.png"):
        (source.parent / copy).parent.mkdir(exist_ok=True)
        (source.parent / copy).write_bytes(source.read_bytes())
    splits = ImageFolder(folder, folder / "cache", holdout=0.25).load().splits
    assert len(splits["train"]) + len(splits["val"]) == 13  # with the one of an ordinary folder


def test_images_that_are_not_square_are_refused_before_they_are_decoded(tmp_path):
    for split in ("train", "test"):
        for name in NAMES:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (10, 8)).save(tmp_path / split / name / f"{number}.png")
    with pytest.raises(ConfigError, match=r"^the images have 8 x 10 pixels: .*, as by data.image_size=8$"):
        ImageFolder(tmp_path, tmp_path / "cache", holdout=0.5).load()
    assert list((tmp_path / "cache").iterdir()) == []
    assert ImageFolder(tmp_path, tmp_path / "cache", image_size=8, holdout=0.5).load().shape == (3, 8, 8)


def test_a_folder_that_is_no_class(folder):
    for name in (".ipynb_checkpoints", "__pycache__"):
        (folder / "train" / name).mkdir()
    assert ImageFolder(folder, folder / "cache", holdout=0.25).load().classes == NAMES
    (folder / "train" / "fox").mkdir()
    with pytest.raises(ConfigError, match="^the class 'fox' has no training image: add some to .*fox, or delete it"):
        ImageFolder(folder, folder / "cache", holdout=0.25).load()


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"data.path=.*nowhere does not exist"):
        ImageFolder(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"there is no folder .*train: expected data.path="):
        ImageFolder(tmp_path / "empty", tmp_path).load()
    write_folder(folder, {"test": draw(4, classes=4, seed=1)}, [*NAMES, "fox"])
    with pytest.raises(ConfigError, match="the class 'fox' of the test split has no training image"):
        ImageFolder(folder, folder / "cache", holdout=0.25).load()
    (folder / "val").mkdir()
    with pytest.raises(ConfigError, match=r"val holds no image: expected a folder of images for each class"):
        ImageFolder(folder, folder / "cache", holdout=0.25).load()


def test_images_are_decoded_once_and_again_where_a_file_changed(folder, monkeypatch):
    cache = folder / "cache"
    decoded = []
    decode = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, *source: decoded.append(source) or decode(self, *source))
    first = ImageFolder(folder, cache, holdout=0.25).load()
    assert len(decoded) == 1 + 12 + 6  # the first one tells the size
    again = ImageFolder(folder, cache, holdout=0.25).load()
    assert len(decoded) == 19
    assert first.summary.digest == again.summary.digest
    assert np.array_equal(first.summary.counts, again.summary.counts)
    in_memory = {name: LabelledImages(np.array(split.images), split.labels) for name, split in first.splits.items()}
    assert ImageSet(in_memory, NAMES).summary.digest == first.summary.digest
    path = folder / "train" / "dog" / "001.png"
    Image.fromarray(np.full((8, 8, 3), 9, dtype=np.uint8)).save(path)
    assert ImageFolder(folder, cache, holdout=0.25).load().summary.digest != first.summary.digest
    assert len(list(cache.glob("[!.]*"))) == 2


def test_all_images_that_cannot_be_read_are_named_at_once(folder):
    for number in range(3):
        (folder / "train" / "dog" / f"broken_{number}.png").write_bytes(b"nothing")
    with pytest.raises(ConfigError) as caught:
        ImageFolder(folder, folder / "cache", holdout=0.25).load()
    assert str(caught.value).count("is no image that can be read: replace or delete it") == 3
    assert "\n" not in str(caught.value)
    for number in range(12):
        (folder / "test" / "cat" / f"broken_{number}.png").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="perhaps there are more$") as caught:
        ImageFolder(folder, folder / "cache", holdout=0.25).load()
    assert str(caught.value).count("is no image") == 10


def test_a_link_to_nowhere_is_named_and_any_name_will_do(folder):
    os.rename(folder / "train" / "dog" / "001.png", os.fsencode(folder / "train" / "dog") + b"/\xff.png")
    assert len(ImageFolder(folder, folder / "cache", holdout=0.25).load().splits["test"]) == 6
    (folder / "train" / "dog" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(ConfigError, match=r"gone.png cannot be read \(No such file or directory\): replace or delete"):
        ImageFolder(folder, folder / "cache").load()


def test_as_a_datamodule_with_processes_that_know_the_file_alone(folder):
    data = FolderImages(str(folder), holdout=0.25, cache_dir=folder / "cache", batch_size=3)
    data.prepare_data()
    data.setup()
    loader = DataLoader(data.dataset("test"), 2, num_workers=1, multiprocessing_context="spawn")
    there = torch.cat([batch["images"] for batch in loader])
    images = data.images.splits["test"].images / 255
    expected = (images - data.mean[:, None, None]) / data.std[:, None, None]
    torch.testing.assert_close(there, torch.from_numpy(expected).float())
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == 9


def test_a_configuration_that_is_older_than_the_cache(folder, monkeypatch):
    monkeypatch.setenv("EVOMOE_CACHE", str(folder / "elsewhere"))
    FolderImages(str(folder), holdout=0.25, batch_size=3).prepare_data()
    assert len(list((folder / "elsewhere").iterdir())) == 1


def test_a_mapped_split_travels_as_its_path(folder):
    split = ImageFolder(folder, folder / "cache", holdout=0.25).load().splits["test"]
    assert isinstance(split.images, np.memmap)
    content = pickle.dumps(split)
    assert len(content) < split.images.nbytes
    there = pickle.loads(content)
    assert isinstance(there.images, np.memmap)
    assert np.array_equal(there.images, split.images)
    assert np.array_equal(there.labels, split.labels)
    part = pickle.loads(pickle.dumps(LabelledImages(split.images[1:3], split.labels[1:3])))
    assert np.array_equal(part.images, split.images[1:3])


def test_images_that_do_not_fit_on_the_disk_are_refused(folder, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    message = r"the decoded images need 0.0 GB in paths.cache_dir=.*cache, where 0.0 GB are free: choose another folder"
    with pytest.raises(ConfigError, match=message):
        ImageFolder(folder, folder / "cache", holdout=0.25).load()
    assert not list((folder / "cache").iterdir())


@pytest.mark.parametrize("name", ["meta.json", "val.npy", "test_labels.npy"])
def test_a_damaged_cache_is_named(folder, name):
    ImageFolder(folder, folder / "cache", holdout=0.25).load()
    (store,) = (folder / "cache").iterdir()
    (store / name).write_bytes((store / name).read_bytes()[:100])
    with pytest.raises(ConfigError, match=re.escape(f"the data cache {store} is damaged (")) as caught:
        ImageFolder(folder, folder / "cache", holdout=0.25).load()
    assert "\n" not in str(caught.value)


def test_images_of_several_sizes_need_one(folder):
    path = folder / "train" / "cat" / "wide.png"
    Image.new("RGB", (20, 10)).save(path)
    with pytest.raises(ConfigError, match=r"wide.png has 10 x 20 pixels and .*000.png 8 x 8: set data.image_size"):
        ImageFolder(folder, folder / "cache", holdout=0.25).load()
    assert ImageFolder(folder, folder / "cache", image_size=6, holdout=0.25).load().shape == (3, 6, 6)


def test_resizing_keeps_the_middle():
    """Of three equal squares side by side only the middle one is left."""
    squares = Image.fromarray(np.repeat(np.array([[10, 100, 200]], np.uint8), 4, axis=0).repeat(4, axis=1))
    content = io.BytesIO()
    squares.save(content, "png")
    for size in (4, 8, 2):
        pixels = Decoder(size, 1).decode(content.getvalue(), "squares")
        assert pixels.shape == (1, size, size)
        inner = pixels[0, :, size // 4 : -(size // 4)] if size >= 4 else pixels[0]
        assert abs(inner.astype(int) - 100).max() <= 16


@pytest.mark.parametrize(
    ("options", "message"),
    [({"image_size": 0}, "data.image_size=0 must be at least 1"), ({"channels": 2}, "data.channels=2: expected 3")],
)
def test_options_out_of_range_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        ImageFolder(tmp_path, tmp_path, **options)


def write_hub(folder, named: bool):
    """Parquet files with a column of images, as most image sets of the Hub are stored."""
    datasets = pytest.importorskip("datasets")
    for seed, (split, count) in enumerate({"train": 12, "test": 6}.items()):
        drawn = draw(count, seed=seed)
        label = datasets.ClassLabel(names=NAMES) if named else datasets.Value("string")
        labels = drawn.labels.tolist() if named else [NAMES[label] for label in drawn.labels]
        pictures = [Image.fromarray(image.transpose(1, 2, 0)) for image in drawn.images]
        features = datasets.Features({"picture": datasets.Image(), "kind": label})
        table = datasets.Dataset.from_dict({"picture": pictures, "kind": labels}, features=features)
        table.to_parquet(folder / f"{split}.parquet")


@pytest.mark.parametrize("named", [True, False])
def test_a_data_set_of_the_hub(tmp_path, named, monkeypatch):
    write_hub(tmp_path, named)
    options = {"image_field": "picture", "label_field": "kind", "holdout": 0.25}
    images = HubImages(str(tmp_path), tmp_path / "cache", **options).load()
    assert images.classes == NAMES
    assert [len(split) for split in images.splits.values()] == [9, 3, 6]
    assert np.array_equal(images.splits["test"].images, draw(6, seed=1).images)
    assert images.splits["test"].labels.tolist() == [0, 1, 2] * 2


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([("cat", True), (None, True)], {}, "^row 1 of train has no label: choose another split or column$"),
        ([("cat", True), ("dog", False)], {}, "^row 1 of train has no image: leave such rows out; row 1 of"),
        ([("cat", True), ("dog", True)], {"label_field": "picture"}, "^data.label_field=picture holds Image"),
        (
            [("cat", True), ("dog", True)],
            {"test": "train"},
            "^data.test=train of .* is also trained on, as",
        ),
    ],
)
def test_rows_of_the_hub_without_an_image_or_a_label(tmp_path, rows, options, message):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("string")})
    pictures = [Image.new("RGB", (8, 8)) if present else None for _, present in rows]
    table = datasets.Dataset.from_dict({"picture": pictures, "kind": [kind for kind, _ in rows]}, features=features)
    for split in ("train", "test"):
        table.to_parquet(tmp_path / f"{split}.parquet")
    options = {"image_field": "picture", "label_field": "kind", "holdout": 0.25, "val": "test", **options}
    with pytest.raises(ConfigError, match=message):
        HubImages(str(tmp_path), tmp_path / "cache", **options).load()


def test_a_column_or_split_that_does_not_exist_is_named(tmp_path):
    write_hub(tmp_path, named=True)
    with pytest.raises(ConfigError, match="data.image_field=image is no column of .*; choose one of picture, kind"):
        HubImages(str(tmp_path), tmp_path / "cache").load()
    with pytest.raises(ConfigError, match=r"data.val=validation of .*[Uu]nknown split") as caught:
        HubImages(str(tmp_path), tmp_path / "cache", val="validation", image_field="picture", label_field="kind").load()
    assert "\n" not in str(caught.value)
