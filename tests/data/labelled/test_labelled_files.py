from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from data.tiny_labels import write_table
from rich.progress import Progress

from evomoe.data import HubGlue
from evomoe.data.corpus import SPLITS
from evomoe.data.hub import HubDataset
from evomoe.data.labelled.corpus import ColumnChoice, LabelledCorpus
from evomoe.data.labelled.files import HubLabels, LabelledFiles
from evomoe.errors import ConfigError
from evomoe.tasks.sequence_scores import SequenceScores

AUTO = ColumnChoice(None, None, None)


def read(corpus: LabelledCorpus, split: str = "train") -> list[tuple[str, str | None, str]]:
    with Progress(disable=True) as progress:
        return [row[:3] for row in corpus.items(split, progress)]


def files(path: Path, columns: ColumnChoice = AUTO, **options) -> LabelledFiles:
    return LabelledFiles(str(path), str(path), str(path), columns, **options)


def identity(path: Path, columns: ColumnChoice = AUTO, **options) -> dict[str, Any]:
    return LabelledFiles(str(path), None, None, columns, **options).identity()


# Beginnings of the files as GLUE distributes them; fields that nothing reads are shortened.
GLUE = {
    "SST-2": ("sentence|label", 'it \'s a "good" film |1', ('it \'s a "good" film ', None, "1")),
    "RTE with scores of its own": (
        "sentence1|sentence2|label|score",
        "A.|B.|entailment|0.93",
        ("A.", "B.", "entailment"),
    ),
    "RTE": ("index|sentence1|sentence2|label", "0|A.|B.|entailment", ("A.", "B.", "entailment")),
    "MRPC": ("\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String", "1|70|71|A.|B.", ("A.", "B.", "1")),
    "STS-B": (
        "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score",
        "0|main|MSR|2012|1|none|none|A.|B.|5.000",
        ("A.", "B.", "5.000"),
    ),
    "QQP": ("id|qid1|qid2|question1|question2|is_duplicate", "1|2|3|A?|B?|0", ("A?", "B?", "0")),
    "QNLI": ("index|question|sentence|label", "0|A?|B.|not_entailment", ("A?", "B.", "not_entailment")),
    "MNLI": (
        "index|promptID|pairID|genre|sentence1_parse|sentence1|sentence2|label1|gold_label",
        "0|1|1n|fiction|( A )|A.|B.|entailment|neutral",
        ("A.", "B.", "neutral"),
    ),
}


@pytest.mark.parametrize("task", GLUE)
def test_the_columns_of_glue_are_found(tmp_path: Path, task: str) -> None:
    header, line, expected = GLUE[task]
    assert read(files(write_table(tmp_path / "train.tsv", header, line))) == [expected]


def test_a_file_without_a_header_is_given_one(tmp_path: Path) -> None:
    """As CoLA's."""
    path = write_table(tmp_path / "train.tsv", "gj04|1||One more.", "gj04|0|*|One more more.")
    corpus = files(path, header=["source", "label", "mark", "sentence"])
    assert read(corpus) == [("One more.", None, "1"), ("One more more.", None, "0")]


def test_columns_that_are_named_win(tmp_path: Path) -> None:
    path = write_table(tmp_path / "train.tsv", "sentence|label|b|c", "one|two|three|four")
    assert read(files(path, ColumnChoice("b", "sentence", "c"))) == [("three", "one", "four")]
    assert read(files(path, ColumnChoice("b", None, None))) == [("three", None, "two")]
    assert read(files(path, ColumnChoice(None, None, "c"))) == [("one", None, "four")]


def test_json_lines_packed_or_not(tmp_path: Path) -> None:
    rows = [{"sentence": "Good.\nYes.", "label": 1, "more": None}, {"label": 0, "sentence": "Bad.\tNo."}]
    text = "".join(json.dumps(row) + "\n\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(text)
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    expected = [("Good.\nYes.", None, "1"), ("Bad.\tNo.", None, "0")]
    assert read(files(tmp_path / "train.jsonl")) == read(files(tmp_path / "train.jsonl.gz")) == expected


def test_half_a_pair_of_surrogates_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"sentence": "cut \\ud83d", "label": "\\ude00"}\n')
    assert read(files(tmp_path / "train.jsonl")) == [("cut \ufffd", None, "\ufffd")]


def test_a_byte_order_mark_is_no_part_of_a_row(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('\ufeff{"sentence": "Good.", "label": 1}\n', encoding="utf-8")
    assert read(files(tmp_path / "train.jsonl")) == [("Good.", None, "1")]


def test_a_blank_last_line_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("sentence\tlabel\nGood.\t1\n\n")
    assert read(files(tmp_path / "a.tsv")) == [("Good.", None, "1")]


def test_a_packed_table_is_the_same_table(tmp_path: Path) -> None:
    path = write_table(tmp_path / "train.tsv", "sentence|label", "Good.|1")
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read(files(tmp_path / "train.tsv.gz")) == [("Good.", None, "1")]


def test_blank_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_table(tmp_path / "train.tsv", "sentence1|sentence2|label", "A|B|1", " |B|1", "A||0")
    corpus = files(path)
    assert read(corpus) == read(corpus) == [("A", "B", "1")]
    assert corpus.notes() == {"blank rows left out of train": 2}


def test_malformed_lines_are_left_out_and_counted_on_demand(tmp_path: Path) -> None:
    """As those of QQP."""
    lines = ["1|2|3|A?|B?|0", "2|3|4|A?", "3|4|5|C?|D?|1|1", "4|5|6|E?|F?|1"]
    path = write_table(tmp_path / "train.tsv", "id|qid1|qid2|question1|question2|is_duplicate", *lines)
    with pytest.raises(
        ConfigError, match=r"line 3 has 4 fields, .*, or leave such lines out with data.bad_lines=drop$"
    ):
        read(files(path))
    corpus = files(path, bad_lines="drop")
    assert read(corpus) == read(corpus) == [("A?", "B?", "0"), ("E?", "F?", "1")]
    assert corpus.notes() == {"malformed lines left out of train": 2}
    assert identity(path, bad_lines="drop") != identity(path)
    rows = ['{"sentence": "a", "label": 1}', '{"sentence"', '["b", 1]', '{"sentence": "c", "label": null}']
    (tmp_path / "train.jsonl").write_text("\n".join([*rows, '{"sentence": null, "label": 1}']))
    corpus = files(tmp_path / "train.jsonl", bad_lines="drop")
    assert read(corpus) == [("a", None, "1")]
    assert corpus.notes() == {"malformed lines left out of train": 3, "blank rows left out of train": 1}
    with pytest.raises(ConfigError, match="data.bad_lines=skip is unknown; use data.bad_lines=refuse or"):
        files(path, bad_lines="skip")


def test_missing_splits_are_held_out_and_equal_sentences_share_one(tmp_path: Path) -> None:
    lines = [f"sentence number {number % 150}|{number % 2}" for number in range(300)]
    path = write_table(tmp_path / "train.tsv", "sentence|label", *lines)
    corpus = LabelledFiles(str(path), None, None, AUTO, holdout=0.2)
    splits = [read(corpus, split) for split in SPLITS]
    assert sum(map(len, splits)) == 300
    sentences = [{row[0] for row in rows} for rows in splits]
    assert all(len(part) > 15 for part in sentences)
    assert sum(map(len, sentences)) == 150


def test_identity_follows_the_content_and_the_options(tmp_path: Path) -> None:
    path = write_table(tmp_path / "train.tsv", "sentence|label", "Good.|1")
    moved = write_table(tmp_path / "elsewhere" / "other.tsv", "sentence|label", "Good.|1")
    same = identity(path)
    assert identity(moved) == same
    assert identity(path, ColumnChoice("sentence", None, None)) != same
    assert identity(path, header=["a", "b"]) != same
    write_table(path, "sentence|label", "Good.|0")
    assert identity(path) != same


@pytest.mark.parametrize("split", ["val", "test"])
def test_rows_that_are_also_trained_on_are_refused(tmp_path: Path, split: str) -> None:
    train, copy, other = (
        str(write_table(tmp_path / f"{name}.tsv", "sentence|label", line))
        for name, line in (("train", "Good.|1"), ("copy", "Good.|1"), ("other", "Good.|0"))
    )
    given = {"val": other, "test": other, split: copy}
    with pytest.raises(ConfigError, match=rf"^data.{split}: .*copy.tsv is also trained on, as .*train.tsv of data.tr"):
        LabelledFiles(train, columns=AUTO, **given).identity()
    assert LabelledFiles(train, other, other, AUTO).identity()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"sentence\tlabel\nGood.\t1\nBad.\n", r"a.tsv, line 3 has 1 fields, and there are 2 columns"),
        (
            "a.tsv",
            b"sentence\tlabel\nGood.\t1\nBad.\t\n",
            r"a.tsv, line 3: label is empty; give every row its label, or",
        ),
        (
            "a.tsv",
            b"gj04\t1\t\tGood.\ngj04\t0\t*\tBad.\n",
            r"or data.header=\[...\] if these are no names but the first row",
        ),
        ("a.tsv", b"sentence\tlabel\nGood.\t1\t1\n", r"a.tsv, line 2 has 3 fields, .* \(sentence, label\)"),
        ("a.tsv", b"sentence\tlabel\nGood.\t1\nGr\xfc\xdfe\t1\n", r"a.tsv, line 3: not UTF-8"),
        ("a.tsv", b"index\tsentence\n0\tGood.\n", r"has the columns index, sentence: no sentence with a label .* GLUE"),
        ("a.jsonl", b'{"sentence": "a", "label": 1}\n{"sentence"\n', r"a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'["a", 1]\n', r"a.jsonl, line 1: a list; give one JSON object"),
        (
            "a.jsonl",
            b'{"sentence": "a", "label": null}\n',
            r"a.jsonl, line 1: label is empty; give every row",
        ),
        (
            "a.jsonl",
            b'{"sentence": "a", "label": [1]}\n',
            r"a.jsonl, line 1: label is \[1\], neither text nor",
        ),
        ("a.jsonl", b'{"sentence": "a", "label": 1}\n{"label": 1}\n', r"a.jsonl, line 2 has the columns label: no"),
        ("a.jsonl.gz", b"not packed", r"a.jsonl.gz, after line 0: cannot be read"),
    ],
)
def test_bad_content_is_refused_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read(files(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_missing_file_column_or_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.train=.*nowhere.tsv is no file"):
        files(tmp_path / "nowhere.tsv")
    (tmp_path / "a.csv").touch()
    with pytest.raises(ConfigError, match=r"data.train=.*a.csv is of another kind: expected a name ending in .tsv"):
        files(tmp_path / "a.csv")
    path = write_table(tmp_path / "train.tsv", "sentence|label", "Good.|1")
    with pytest.raises(ConfigError, match=r"data.sentence2=b is no column of .*; choose among sentence, label"):
        read(files(path, ColumnChoice("sentence", "b", None)))
    with pytest.raises(ConfigError, match=r"data.sentence2=b without data.sentence1"):
        ColumnChoice(None, "b", None)


class NumberedTable(list[dict[str, Any]]):
    """What is used of a table of `datasets`, of which the label is a `ClassLabel`."""

    features: ClassVar = {"sentence": None, "label": SimpleNamespace(names=["not_equivalent", "equivalent"])}
    column_names = tuple(features)

    def select_columns(self, names: list[str]) -> NumberedTable:
        return self


def test_classes_of_the_hub_keep_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of MRPC, where `equivalent` is 1: by name it would be 0, and f1 would score the other class."""
    table = NumberedTable({"sentence": f"sentence {i}", "label": int(i % 3 > 0)} for i in range(30))
    monkeypatch.setattr(HubDataset, "builder", SimpleNamespace(hash="0"))
    monkeypatch.setattr(HubDataset, "table", lambda hub, split: table)
    sizes: dict[str, Any] = {"context": 16, "batch_size": 2, "vocab_size": 260, "cache_dir": tmp_path}
    data = HubGlue("given", val="train", test="train", **sizes)
    data.prepare_data()
    data.setup()
    assert data.classes == ["not_equivalent", "equivalent"]
    assert data.training_labels().tolist() == [row["label"] for row in table]
    scores = SequenceScores(["f1"], num_classes=2)
    guess = torch.tensor([[0.0, 1.0]]).expand(30, 2)
    scores.update(guess, guess, torch.from_numpy(data.training_labels()))
    assert scores.compute()["f1"] == pytest.approx(0.8)


class TestHub:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        folder = tmp_path / "tiny"
        folder.mkdir()
        for split, count in (("train", 40), ("validation", 2)):
            rows = [{"premise": f"{split} {i}", "hypothesis": f"so {i}", "label": i % 3} for i in range(count)]
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder

    def test_rows_and_splits(self, folder: Path) -> None:
        corpus = HubLabels(str(folder), None, "train", None, "validation", AUTO, holdout=0.2)
        assert read(corpus, "test") == [("validation 0", "so 0", "0"), ("validation 1", "so 1", "1")]
        assert len(read(corpus, "train")) + len(read(corpus, "val")) == 40

    def test_numbers_of_classes_become_their_names(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        features = datasets.Features(
            {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
        )
        table = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
        corpus = HubLabels("given", None, "train", None, None, AUTO)

        class Builder:
            hash = "0"

            def download_and_prepare(self) -> None: ...

            def as_dataset(self, split: str) -> datasets.Dataset:
                return table

        corpus._hub.__dict__["builder"] = Builder()
        with Progress(disable=True) as progress:
            rows = corpus._rows("train", progress)
            assert [next(rows).label, next(rows).label] == ["yes", "no"]
            with pytest.raises(ConfigError, match="row 3 has the label -1, which is none of its classes"):
                next(rows)

    def test_null_is_blank_and_no_label(self, folder: Path) -> None:
        rows = [{"text": "a", "label": "x"}, {"text": None, "label": "y"}, {"text": "c", "label": None}]
        for split in ("train", "validation"):
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows[: 2 if split == "train" else 3])))
        corpus = HubLabels(str(folder), None, "train", None, "validation", AUTO)
        assert [*read(corpus, "train"), *read(corpus, "val")] == [("a", None, "x")]
        assert corpus.notes() == {"blank rows left out of train": 1}
        with pytest.raises(ConfigError, match="row 3: label is empty; choose a split whose rows all have a label"):
            read(corpus, "test")

    def test_what_is_missing_is_named(self, folder: Path) -> None:
        columns = ColumnChoice("premise", "hypothesis", "gold")
        with pytest.raises(ConfigError, match=r"data.label=gold is no column of data.train=train of"):
            read(HubLabels(str(folder), None, "train", None, None, columns))
        with pytest.raises(ConfigError, match=r'data.test=dev of .*: Unknown split "dev"'):
            read(HubLabels(str(folder), None, "train", None, "dev", AUTO), "test")
