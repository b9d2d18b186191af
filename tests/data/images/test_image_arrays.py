from __future__ import annotations

import gzip
import re

import numpy as np
import pytest
from data.tiny_images import draw, write_idx, write_mnist

from evomoe.data.images.arrays import Cifar, Digits, IdxFiles
from evomoe.errors import ConfigError


def test_digits_are_those_of_scikit_learn_each_in_one_split():
    from sklearn.datasets import load_digits

    images = Digits().load()
    assert {name: len(split) for name, split in images.splits.items()} == {"train": 1258, "val": 179, "test": 360}
    assert images.shape == (1, 8, 8)
    source = load_digits()
    everything = sorted(
        (split.images[i].tobytes(), int(split.labels[i])) for split in images.splits.values() for i in range(len(split))
    )
    expected = np.rint(source.images * (255 / 16)).astype(np.uint8)
    assert everything == sorted(
        (image.tobytes(), int(label)) for image, label in zip(expected, source.target, strict=True)
    )
    shares = [np.bincount(split.labels) / len(split) for split in images.splits.values()]
    assert np.ptp(shares, axis=0).max() < 0.005
    assert images.summary.digest == Digits().load().summary.digest != Digits(holdout=0.2).load().summary.digest


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files_are_read_as_they_were_written(tmp_path, ending):
    written = write_mnist(tmp_path, ending)
    images = IdxFiles(tmp_path, holdout=0.2).load()
    assert images.classes == ["0", "1", "2"]
    assert np.array_equal(images.splits["test"].images, written["t10k"].images)
    assert np.array_equal(images.splits["test"].labels, written["t10k"].labels)
    assert [len(split) for split in images.splits.values()] == [24, 6, 9]
    for split in images.splits.values():
        assert np.array_equal(split.images[:, 0, 0, 0], split.labels)


def test_idx_files_without_an_image_are_refused(tmp_path):
    write_mnist(tmp_path, "")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 8]))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 0]))
    with pytest.raises(ConfigError, match="^the train split has no image"):
        IdxFiles(tmp_path).load()


def damage(content: bytes, how: str) -> bytes:
    return {
        "truncated": content[:-3],
        "another type": b"\0\0\x0d\x03" + content[4:],
        "labels": b"\0\0\x08\x01" + content[4:],
        "empty": b"",
        "header only": content[:7],
    }[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "has 1917 bytes of data and states 1920: get the file again"),
        ("another type", "is no IDX file of 3-dimensional bytes: expected it to begin with 0x00000803"),
        ("labels", "is no IDX file of 3-dimensional bytes"),
        ("empty", "is no IDX file"),
        ("header only", "has 0 bytes of data and states 1"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, how, message):
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes(), how))
    with pytest.raises(ConfigError, match=re.escape(f"{path} ") + message) as caught:
        IdxFiles(tmp_path).load()
    assert "\n" not in str(caught.value)


def test_a_damaged_gzip_file_is_named(tmp_path):
    write_mnist(tmp_path, ".gz")
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    for content in (b"no gzip at all", whole[:-9], whole[:20] + b"\xff\xff\xff" + whole[23:]):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=re.escape(f"{path} ")):
            IdxFiles(tmp_path).load()
    path.write_bytes(gzip.compress(gzip.decompress(whole)))
    assert len(IdxFiles(tmp_path).load().splits["test"]) == 9


def test_labels_of_another_number_are_refused_with_both_counts(tmp_path):
    write_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(29))
    with pytest.raises(ConfigError, match="train-labels-idx1-ubyte has 29 labels and .*train-images.* 30 images"):
        IdxFiles(tmp_path).load()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file .*train-images-idx3-ubyte or train-images-idx3-ubyte\.gz"):
        IdxFiles(tmp_path).load()


def cifar_rows(count: int, label_bytes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    split = draw(count, size=32, seed=seed)
    labels = np.stack([split.labels] if label_bytes == 1 else [split.labels * 0 + 9, split.labels], axis=1)
    return split.images, np.concatenate([labels.astype(np.uint8), split.images.reshape(count, -1)], axis=1)


@pytest.mark.parametrize("label_bytes", [1, 2])
def test_cifar_is_read_from_its_binary_version(tmp_path, label_bytes):
    """Of CIFAR-100 the fine labels, which stand behind the coarse ones."""
    train = [f"data_batch_{number}.bin" for number in range(1, 6)] if label_bytes == 1 else ["train.bin"]
    test = "test_batch.bin" if label_bytes == 1 else "test.bin"
    written = {name: cifar_rows(12, label_bytes, seed) for seed, name in enumerate([*train, test])}
    for name, (_, rows) in written.items():
        rows.tofile(tmp_path / name)
    images = Cifar(tmp_path, holdout=0.25).load()
    assert images.classes == ["0", "1", "2"]
    assert images.shape == (3, 32, 32)
    assert np.array_equal(images.splits["test"].images, written[test][0])
    assert len(images.splits["train"]) + len(images.splits["val"]) == 12 * len(train)
    for split in images.splits.values():
        assert np.array_equal(split.images[:, 0, 0, 0], split.labels)


def test_a_file_that_is_no_cifar_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data_batch_1.bin cannot be read \(No such file or directory\): expected"):
        Cifar(tmp_path).load()
    (tmp_path / "train.bin").write_bytes(bytes(3000))
    with pytest.raises(ConfigError, match="train.bin has 3000 bytes, no multiple of the 3074 of an image"):
        Cifar(tmp_path).load()


@pytest.mark.parametrize("grey", [False, True])
def test_images_in_an_npz_file(tmp_path, grey):
    arrays = {}
    for seed, split in enumerate(("train", "test")):
        drawn = draw(12, channels=1 if grey else 3, seed=seed)
        arrays[f"x_{split}"] = drawn.images[:, 0] if grey else drawn.images.transpose(0, 2, 3, 1)
        arrays[f"y_{split}"] = drawn.labels[:, None]
    np.savez(tmp_path / "set.npz", **arrays)
    images = Cifar(tmp_path / "set.npz", holdout=0.25).load()
    assert images.shape == (1 if grey else 3, 8, 8)
    assert np.array_equal(images.splits["test"].images, draw(12, channels=1 if grey else 3, seed=1).images)
    assert images.splits["test"].labels.tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y_train": None}, r"cannot be read \(y_train is not a file in the archive\): expected the arrays x_train"),
        ({"y_test": np.zeros(3, int)}, "has 3 labels y_test and 6 images x_test: give as many"),
        ({"x_train": np.zeros((6, 8, 8))}, r"has x_train of float64 \(6, 8, 8\) and y_train of int64: expected uint8"),
        ({"y_train": np.zeros(6)}, "y_train of float64"),
    ],
)
def test_an_npz_file_of_something_else_is_refused(tmp_path, changed, message):
    drawn = draw(6)
    arrays = {"x_train": drawn.images, "y_train": drawn.labels, "x_test": drawn.images, "y_test": drawn.labels}
    arrays |= changed
    np.savez(tmp_path / "set.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ConfigError, match=message) as caught:
        Cifar(tmp_path / "set.npz").load()
    assert "\n" not in str(caught.value)


def test_a_damaged_npz_file_is_named(tmp_path):
    path, drawn = tmp_path / "set.npz", draw(12)
    np.savez_compressed(path, x_train=drawn.images, y_train=drawn.labels, x_test=drawn.images, y_test=drawn.labels)
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        content = bytearray(whole)
        for place in generator.integers(0, len(whole), 8):
            content[place] = int(generator.integers(256))
        path.write_bytes(content)
        try:
            Cifar(path, holdout=0.25).load()
        except ConfigError:
            refused += 1
    assert refused > 100
    for content in (b"", np.lib.format.magic(1, 0)):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"set.npz cannot be read"):
            Cifar(path).load()
    np.save(tmp_path / "array.npy", drawn.images)
    (tmp_path / "array.npy").rename(path)
    with pytest.raises(ConfigError, match=r"set.npz cannot be read"):
        Cifar(path).load()


def test_no_code_is_unpickled_from_an_npz_file(tmp_path):
    np.savez(tmp_path / "set.npz", x_train=np.array([print], dtype=object))
    with pytest.raises(ConfigError, match="Object arrays cannot be loaded"):
        Cifar(tmp_path / "set.npz").load()
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    with pytest.raises(ConfigError, match=r"broken.npz cannot be read"):
        Cifar(tmp_path / "broken.npz").load()
