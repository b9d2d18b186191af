from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.progress import Progress

from evomoe.data.corpus import SPLITS
from evomoe.data.text.corpus import Piece
from evomoe.data.text.hub import HubCorpus
from evomoe.errors import ConfigError


def read(corpus: HubCorpus, split: str) -> list[Piece]:
    with Progress(disable=True) as progress:
        return list(corpus.pieces(split, progress))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    folder = tmp_path / "tiny"
    folder.mkdir()
    for split, count in (("train", 60), ("validation", 2), ("test", 3)):
        lines = [json.dumps({"body": f"{split} text {i}", "label": i}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join([*lines, json.dumps({"body": "", "label": -1})]))
    return folder


def test_splits_and_column(folder: Path) -> None:
    corpus = HubCorpus(str(folder), text_field="body")
    assert [len(read(corpus, split)) for split in SPLITS] == [60, 2, 3]
    assert read(corpus, "val") == [("validation text 0", True), ("validation text 1", True)]


def test_a_part_of_a_split_can_be_named(folder: Path) -> None:
    corpus = HubCorpus(str(folder), text_field="body", train="test[:2]")
    assert read(corpus, "train") == [("test text 0", True), ("test text 1", True)]


def test_rows_as_lines_are_running_text(folder: Path) -> None:
    corpus = HubCorpus(str(folder), text_field="body", rows="lines")
    assert read(corpus, "val") == [("validation text 0\nvalidation text 1\n\n", True)]


@pytest.mark.parametrize("rows", ["documents", "lines"])
def test_rows_without_text_are_left_out_and_counted(folder: Path, rows: str) -> None:
    (folder / "test.jsonl").write_text('{"body": "one"}\n{"body": null}\n{"body": ""}\n{"body": "two"}\n')
    corpus = HubCorpus(str(folder), text_field="body", rows=rows)
    for _ in range(2):  # reading again does not count again
        text = "".join(piece.text for piece in read(corpus, "test"))
    assert (text, corpus.notes()) == {
        "documents": ("onetwo", {"blank rows left out of test": 2}),
        "lines": ("one\n\ntwo\n", {"blank rows left out of test": 1}),
    }[rows]


def test_a_column_of_numbers_is_no_text(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.test=test of .*, row 1: label is 0, not text; set data.text_field$"):
        read(HubCorpus(str(folder), text_field="label"), "test")


def test_missing_splits_are_held_out(folder: Path) -> None:
    corpus = HubCorpus(str(folder), text_field="body", val=None, test=None, holdout=0.2)
    parts = [{piece.text for piece in read(corpus, split)} for split in SPLITS]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60


def test_identity_follows_the_data(folder: Path) -> None:
    before = HubCorpus(str(folder)).identity()
    assert HubCorpus(str(folder)).identity() == before
    assert HubCorpus(str(folder), rows="lines").identity() != before
    with (folder / "train.jsonl").open("a") as file:
        file.write('\n{"body": "one more", "label": 0}')
    assert HubCorpus(str(folder)).identity()["revision"] != before["revision"]


def test_errors_are_one_line_with_the_value(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.text_field=text is no column of .*; choose one of .'body', 'label'."):
        read(HubCorpus(str(folder)), "train")
    with pytest.raises(ConfigError, match=r'data.val=dev of .*: Unknown split "dev". Should be one of'):
        read(HubCorpus(str(folder), val="dev"), "val")
    with pytest.raises(ConfigError, match=r"data.config=none_such: .*BuilderConfig 'none_such' not found"):
        HubCorpus(str(folder), "none_such").identity()
    with pytest.raises(ConfigError, match=r"data.rows=words is unknown; use data.rows=documents or data.rows=lines"):
        HubCorpus(str(folder), rows="words")
    with pytest.raises(ConfigError, match=r"^data.name=no-such-name-anywhere, data.config=None: .*$"):
        HubCorpus("no-such-name-anywhere").identity()


@pytest.mark.parametrize(
    ("val", "test", "shared"),
    [
        ("train[:10]", "test", "val"),
        ("validation", "train", "test"),
        ("validation", "test+train[39:]", "test"),
        ("all", "test", "val"),
        ("train[40:]", "train[40:]", None),  # these two may be one
        ("train[95%:]", "train[-3:]", None),
    ],
)
def test_rows_that_are_also_trained_on_are_refused(folder: Path, val: str, test: str, shared: str | None) -> None:
    corpus = HubCorpus(str(folder), text_field="body", train="train[:40]", val=val, test=test)
    for split in SPLITS:
        if split == shared:
            with pytest.raises(ConfigError, match=rf"^data.{split}=.* is also trained on, as data.train=train\[:40\]"):
                read(corpus, split)
        else:
            read(corpus, split)


def test_what_goes_wrong_inside_datasets_is_said_in_one_line(folder: Path) -> None:
    (folder / "test.jsonl").write_text(json.dumps({"other": [1]}))
    with pytest.raises(ConfigError, match=r"^data.train=train of .*tiny: ") as caught:
        read(HubCorpus(str(folder), text_field="body"), "train")
    assert "\n" not in str(caught.value)
    assert "An error occurred while generating the dataset" not in str(caught.value)
    script = folder.parent / "scripted"
    script.mkdir()
    (script / "scripted.py").write_text("import datasets\n")
    with pytest.raises(ConfigError, match=r"^data.name=.*scripted, data.config=None: Dataset scripts are no longer"):
        HubCorpus(str(script)).identity()


def test_names_the_extra_where_datasets_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'data of the Hub need the package datasets; run pip install -e "\.\[hub\]"'):
        HubCorpus("wikitext").identity()
