from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.tiny_labels import data_module, ready, write_table
from hypothesis import given
from hypothesis import strategies as st

from evomoe.data import GlueFiles, Tokenizer
from evomoe.data.labelled.batches import Item, Padding, join
from evomoe.data.labelled.store import order_classes
from evomoe.errors import ConfigError

IDS = st.lists(st.integers(1, 50), max_size=30)


class TestJoin:
    def test_one_sentence_and_two(self) -> None:
        assert join([1, 2], None, 0, 8) == [0, 1, 2, 0]
        assert join([1, 2], [3], 0, 8) == [0, 1, 2, 0, 3, 0]

    def test_the_longer_one_is_cut_first(self) -> None:
        assert join([1, 2, 3, 4, 5], None, 0, 5) == [0, 1, 2, 3, 0]
        assert join([1, 2, 3, 4, 5], [6], 0, 7) == [0, 1, 2, 3, 0, 6, 0]
        assert join([1], [6, 7, 8, 9], 0, 6) == [0, 1, 0, 6, 7, 0]
        assert join([1, 2, 3, 4], [6, 7, 8, 9], 0, 8) == [0, 1, 2, 3, 0, 6, 7, 0]

    @given(first=IDS, second=st.none() | IDS, context=st.integers(5, 40))
    def test_nothing_is_cut_that_fits_and_nothing_is_wasted(self, first, second, context) -> None:
        joined = join(first, second, 0, context)
        whole = [0, *first, 0, *([] if second is None else [*second, 0])]
        assert len(joined) == min(len(whole), context)
        assert joined.count(0) == (2 if second is None else 3)
        assert joined[0] == joined[-1] == 0
        if len(whole) <= context:
            assert joined == whole


def test_padding_to_the_longest_of_the_batch() -> None:
    batch = Padding(9, torch.int64)([Item([1, 2, 3], 1), Item([4], 0), Item([], 0)])
    assert batch["tokens"].tolist() == [[1, 2, 3], [4, 9, 9], [9, 9, 9]]
    assert batch["valid"].tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert batch["labels"].tolist() == [1, 0, 0]
    assert Padding(9, torch.float32)([Item([], 0)])["tokens"].shape == (1, 1)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_batch_holds_the_sentences_and_their_labels(tmp_path: Path, pairs: bool) -> None:
    data = ready(tmp_path, pairs=pairs, context=64)
    end = data.tokenizer.end_of_text_id
    lines = (tmp_path / ("pairs" if pairs else "single") / "test.tsv").read_text().splitlines()[1:]
    found = []
    for batch in data.test_dataloader():
        for tokens, valid, label in zip(batch["tokens"], batch["valid"], batch["labels"], strict=True):
            ids = tokens[valid].tolist()
            assert ids[0] == ids[-1] == end
            sentences = data.tokenizer.decode(ids[1:-1]).split("<|endoftext|>")
            found.append("\t".join([*sentences, data.classes[int(label)]]))
    assert sorted(found) == sorted(lines)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_an_evaluation_out_and_each_row_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    data = ready(tmp_path, eval_batch_size=2)
    rows = []
    batches = set()
    for rank in range(world_size):
        monkeypatch.setattr("evomoe.data.labelled.module.rank_and_world_size", lambda rank=rank: (rank, world_size))
        loader = list(data.val_dataloader())
        batches.add(sum(len(batch["labels"]) for batch in loader))
        rows += [tuple(row[valid].tolist()) for b in loader for row, valid in zip(b["tokens"], b["valid"], strict=True)]
    whole = data._sequences("val")
    assert len(batches) == 1  # equally many, lest one waits for another
    assert sorted(row for row in rows if row) == sorted(tuple(whole[index].tokens) for index in range(7))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [0, 4, 6, 9])
def test_training_continues_where_it_was(tmp_path: Path, done: int, num_workers: int) -> None:
    def batches(loader: Any) -> list[Any]:
        return [(batch["tokens"].tolist(), batch["labels"].tolist()) for _ in range(2) for batch in loader]

    whole = batches(ready(tmp_path).train_dataloader())
    loader = ready(tmp_path, num_workers=num_workers).train_dataloader()
    assert len(loader) == 6
    iterator = (batch for _ in range(2) for batch in loader)
    for _ in range(done):
        next(iterator)
    resumed = ready(tmp_path).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert batches(resumed)[: 12 - done] == whole[done:]
    assert whole[:6] != whole[6:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 5}, "data.batch_size=4 and this run has 5"),
        ({"context": 9}, "data.context=24 and this run has 9"),
        ({"context": 23, "too_long": "drop"}, "data.context=24 and this run has 23"),
        ({"seed": 6}, "data.seed=5 and this run has 6"),
    ],
)
def test_another_order_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = ready(tmp_path).train_dataloader().state_dict()
    with pytest.raises(ConfigError, match=message):
        ready(tmp_path, **change).train_dataloader().load_state_dict(state)


def test_what_is_too_long_is_counted_and_cut_or_left_out(tmp_path: Path) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve"
    paths = {
        split: str(write_table(tmp_path / f"{split}.tsv", "sentence|label", f"{long}|0", f"{split}|1"))
        for split in ("train", "val", "test")
    }

    def module(context: int = 8, **options: Any) -> GlueFiles:
        data = GlueFiles(
            **paths, context=context, batch_size=1, vocab_size=260, cache_dir=tmp_path / "cache", **options
        )
        data.prepare_data()
        data.setup()
        return data

    data = module()
    assert "1 of train longer than data.context=8: cut, 1 of val longer than data.context=8: cut" in data.describe()
    assert sorted(batch["tokens"].shape[1] for batch in data.train_dataloader())[1] == 8
    dropped = module(too_long="drop")
    assert "1 of train longer than data.context=8: left out, 1 of val longer than data.context=8: cut" in (
        dropped.describe()
    )
    assert [batch["labels"].tolist() for batch in dropped.train_dataloader()] == [[1]]
    assert len(list(dropped.test_dataloader())) == 2
    with pytest.raises(ConfigError, match="data.too_long=drop leaves no training row"):
        module(context=5, too_long="drop").train_dataloader()


def test_numbers_as_labels(tmp_path: Path) -> None:
    paths = {
        split: str(
            write_table(tmp_path / f"{split}.tsv", "sentence|label", *(f"{split} {n}|{n / 4}" for n in range(8)))
        )
        for split in ("train", "val", "test")
    }
    data = GlueFiles(**paths, context=16, batch_size=2, vocab_size=260, cache_dir=tmp_path, regression=True)
    data.prepare_data()
    data.setup()
    assert data.classes is None
    assert data.model_sizes() == {"vocab_size": data.vocab_size + 1, "num_classes": 1}
    found = {}
    for batch in data.test_dataloader():
        assert batch["labels"].dtype == torch.float32
        for tokens, valid, label in zip(batch["tokens"], batch["valid"], batch["labels"], strict=True):
            found[data.tokenizer.decode(tokens[valid][1:-1].tolist())] = label.item()
    assert found == {f"test {number}": number / 4 for number in range(8)}
    assert "rated by a number" in data.describe()


def test_classes_stand_in_order() -> None:
    assert order_classes({"10", "9", "-1"}) == ["-1", "9", "10"]
    assert order_classes({"b", "10", "a"}) == ["10", "a", "b"]
    assert order_classes({"equivalent", "not_equivalent"}) == ["equivalent", "not_equivalent"]
    assert order_classes({"1.0", "1", "0"}) == ["0", "1", "1.0"]
    assert order_classes({"2", "nan", "10", "1"}) == ["1", "10", "2", "nan"]
    assert order_classes({"b", "c", "a"}, ["c", "d", "a", "b"]) == ["c", "a", "b"]


def test_an_adopted_tokenizer_is_used_and_names_the_cache(tmp_path: Path) -> None:
    own = ready(tmp_path)
    given = Tokenizer.train(["quite other text"], 258)
    data = data_module(tmp_path)
    data.adopt_tokenizer(given)
    data.prepare_data()
    data.setup()
    assert data.tokenizer.to_json() == given.to_json() != own.tokenizer.to_json()
    assert data.fingerprint != own.fingerprint
    assert data.model_sizes()["vocab_size"] == 259
    assert np.array_equal(data.training_labels(), own.training_labels())
    with pytest.raises(ConfigError, match="the checkpoint was trained on other data"):
        data.load_state_dict(own.state_dict())


def test_the_state_is_plain_and_belongs_to_the_data(tmp_path: Path) -> None:
    data = ready(tmp_path)
    torch.save(data.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (state["classes"], state["pairs"]) == (["0", "1"], False)
    assert Tokenizer.from_checkpoint({"GlueFiles": state}).encode("red") == data.tokenizer.encode("red")
    ready(tmp_path).load_state_dict(state)
    with pytest.raises(ConfigError, match="the checkpoint was trained on other data"):
        ready(tmp_path, pairs=True).load_state_dict(state)


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["a|1", "b|0", "c|maybe"], {}, r"test.tsv, line 4: the label 'maybe' is none of the classes .* \(0, 1\)"),
        (["a|1", "b|1"], {}, r"all rows of data.train have the label '1'"),
        (["a|1", "b|high"], {"regression": True}, r"line 3: the label 'high' is no number; for classes set"),
        (["a|1", "b|nan"], {"regression": True}, r"line 3: the label 'nan' is no number"),
        ([f"a|{number / 7}" for number in range(1500)], {}, r"1,500 different labels, .* data.regression=true"),
        ([f"a|{number / 20}" for number in range(101)], {}, r"101 different labels, .* data.regression=true"),
        ([], {}, r"data.train holds no labelled sentence"),
        (["a|0", "b|1"], {"context": 4}, r"data.context=4 must be at least 5"),
        (["a|0", "b|1"], {"batch_size": 0}, r"data.batch_size=0 must be at least 1"),
        (["a|0", "b|1"], {"too_long": "cut"}, r"data.too_long=cut is unknown"),
        (["a|0", "b|1"], {"batch_size": 3}, r"has 2 rows, fewer than one batch of data.batch_size=3"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, lines, options, message) -> None:
    known = [line for line in lines if not line.endswith("maybe")]
    train = write_table(tmp_path / "train.tsv", "sentence|label", *known)
    val = write_table(tmp_path / "val.tsv", "text|label", *known)  # another header, as no split may be the training one
    path = write_table(tmp_path / "test.tsv", "text|label", *lines)
    paths = {"train": str(train), "val": str(val), "test": str(path), "cache_dir": tmp_path / "cache"}

    def load() -> None:
        data = GlueFiles(**paths, **{"context": 16, "batch_size": 2, "vocab_size": 260, **options})
        data.prepare_data()
        data.setup()
        data.train_dataloader()

    with pytest.raises(ConfigError, match=message) as caught:
        load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("val", "message"),
    [
        (["text|label", "c|2"], "val.tsv, line 2: the label '2' is none of the classes of data.train"),
        (["text|label"], "data.val holds no labelled sentence"),
        (["text|kind", "c|1"], "val.tsv has the columns text, kind: no sentence with a label"),
    ],
)
def test_what_is_wrong_with_the_validation_is_said_before_the_tokenizer_learns(
    tmp_path: Path, val: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomoe.data.labelled.store.train_tokenizer", None)
    train = write_table(tmp_path / "train.tsv", "sentence|label", "a|0", "b|1")
    path = write_table(tmp_path / "val.tsv", *val)
    data = GlueFiles(str(train), str(path), context=16, batch_size=1, vocab_size=260, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match=message):
        data.prepare_data()


def test_a_corpus_too_small_to_hold_a_test_out_says_so(tmp_path: Path) -> None:
    train = write_table(tmp_path / "train.tsv", "sentence|label", "a|0", "b|1")
    val = write_table(tmp_path / "val.tsv", "sentence|label", "c|0")
    data = GlueFiles(str(train), str(val), context=16, batch_size=1, vocab_size=260, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="too short to hold out a test split: give more text, or data.test=FILE"):
        data.prepare_data()


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    data = ready(tmp_path)
    file = tmp_path / "cache" / data.fingerprint / "val.ids.npy"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ConfigError, match="is damaged .*; delete the folder to rebuild"):
        ready(tmp_path)
