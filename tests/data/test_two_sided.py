from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data.tiny_labels import write_table
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress

from evomoe.data.labelled.corpus import ColumnChoice
from evomoe.data.labelled.files import LabelledFiles
from evomoe.data.tokenizer import Sample, Tokenizer
from evomoe.data.two_sided import ContextLimit, both_sides, encode, side_lengths, train_tokenizer
from evomoe.errors import ConfigError

TOKENIZER = Tokenizer.train(["one two"], 260)
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)


@given(items=st.lists(st.tuples(TEXT, TEXT), max_size=8), at_once=st.integers(1, 9))
def test_every_text_is_found_again_however_many_are_encoded_at_once(items: list[tuple[str, str]], at_once: int) -> None:
    chunks = [np.zeros(0, "<u2")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evomoe.data.two_sided._ITEMS_AT_ONCE", at_once)
        ends = encode(items, TOKENIZER, "<u2", chunks.append)
    assert len(chunks) == 1 + -(-len(items) // at_once)
    assert {chunk.dtype for chunk in chunks} == {np.dtype("<u2")}
    assert ends.shape == (len(items), 2)
    sides = [both_sides(np.concatenate(chunks), ends, index) for index in range(len(items))]
    assert [tuple(TOKENIZER.decode(side.tolist()) for side in item) for item in sides] == items
    assert side_lengths(ends).tolist() == [[len(TOKENIZER.encode(text)) for text in item] for item in items]


def test_the_tokenizer_of_labelled_rows_learns_from_a_sample_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"red {number}|rot|1" for number in range(500)] + ["green|gruen|0"] * 500
    path = str(write_table(tmp_path / "train.tsv", "sentence1|sentence2|label", *lines))
    corpus = LabelledFiles(path, path, path, ColumnChoice(None, None, None))
    with Progress(disable=True) as progress:
        whole = train_tokenizer(corpus, 300, progress)
        monkeypatch.setattr("evomoe.data.two_sided.Sample", lambda: Sample(limit=2000))
        sampled = train_tokenizer(corpus, 300, progress)
    texts = [text for line in lines for text in line.split("|")[:2]]
    assert whole.to_json() == Tokenizer.train(texts, 300).to_json() != sampled.to_json()
    assert [len(sampled.encode(word)) for word in ("red", "rot", "green", "gruen")] == [1, 1, 1, 1]


def test_training_items_that_are_too_long_are_kept_or_left_out() -> None:
    lengths = np.array([3, 9, 8, 10])
    assert ContextLimit(8, "truncate").training_items(lengths, "row").tolist() == [0, 1, 2, 3]
    assert ContextLimit(8, "drop").training_items(lengths, "row").tolist() == [0, 2]
    with pytest.raises(ConfigError, match=r"^data.too_long=drop leaves no training row: all are .* data.context=2$"):
        ContextLimit(2, "drop").training_items(lengths, "row")
    with pytest.raises(ConfigError, match=r"^data.too_long=cut is unknown; use .*=truncate or data.too_long=drop$"):
        ContextLimit(8, "cut")


def test_the_log_says_what_becomes_of_items_that_are_too_long() -> None:
    lengths = {"train": np.array([3, 9, 8, 10]), "val": np.array([9]), "test": np.array([8])}
    assert ContextLimit(8, "drop").describe(lengths) == (
        ", 2 of train longer than data.context=8: left out, 1 of val longer than data.context=8: cut"
    )
    assert ContextLimit(8, "truncate").describe(lengths).startswith(", 2 of train longer than data.context=8: cut, 1")
    assert ContextLimit(10, "truncate").describe(lengths) == ""
