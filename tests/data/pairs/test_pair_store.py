from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.tiny_pairs import ready, sentences, write
from hypothesis import given, settings
from hypothesis import strategies as st

from evomoe.data.pairs.corpus import Pair, PairCorpus, ParallelFiles
from evomoe.data.pairs.store import PairStore
from evomoe.data.tokenizer import Sample, Tokenizer
from evomoe.errors import ConfigError

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1).filter(str.strip)


class Given(PairCorpus):
    """Pairs as they are given."""

    def __init__(self, pairs: list[Pair]) -> None:
        super().__init__("a", "b")
        self.given = pairs

    def identity(self) -> dict[str, Any]:
        return {"pairs": [list(pair) for pair in self.given]}

    def _read(self, split: str, progress: Any) -> Any:
        return iter(self.given)


@settings(max_examples=25, deadline=None)
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_every_text_comes_back_whatever_its_characters(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    corpus = Given([Pair(*pair) for pair in pairs])
    store = PairStore(PairStore.build(corpus, 270, tmp_path_factory.getbasetemp() / "any"))
    found = store.pairs("test")
    decode, encode = store.tokenizer.decode, store.tokenizer.encode
    texts = [tuple(decode(side.tolist()) for side in found[number]) for number in range(len(found))]
    assert texts == pairs
    assert store.pairs("train").ids().tolist() == [token for pair in pairs for text in pair for token in encode(text)]


def test_the_tokenizer_learns_from_pairs_of_the_whole_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evomoe.data.two_sided.Sample", lambda: Sample(limit=2000))
    pairs = [Pair(f"red {number}", "rot") for number in range(500)] + [Pair("green", "gruen")] * 500
    store = PairStore(PairStore.build(Given(pairs), 300, tmp_path))
    lengths = {word: len(store.tokenizer.encode(word)) for word in ("red", "rot", "green", "gruen")}
    assert lengths == {"red": 1, "rot": 1, "green": 1, "gruen": 1}


def test_counts_and_lengths(tmp_path: Path) -> None:
    store = ready(tmp_path).store
    pairs = store.pairs("val")
    assert [store.counts[split].pairs for split in ("train", "val", "test")] == [40, 9, 5]
    lengths = [(len(source), len(target)) for source, target in (pairs[number] for number in range(9))]
    assert pairs.lengths().tolist() == [list(pair) for pair in lengths]
    assert tuple(np.sum(lengths, axis=0)) == (store.counts["val"].source_tokens, store.counts["val"].target_tokens)
    assert store.tokenizer.decode(pairs[3][0].tolist()) == sentences("val", 9)[3]


def test_pairs_travel_to_another_process_as_their_path(tmp_path: Path) -> None:
    pairs = ready(tmp_path).store.pairs("train")
    pairs[0]
    sent = pickle.dumps(pairs)
    assert len(sent) < 1000
    assert pickle.loads(sent)[7][1].tolist() == pairs[7][1].tolist()


def test_a_store_is_built_once(tmp_path: Path) -> None:
    data = ready(tmp_path)
    meta = next((tmp_path / "cache").glob("*/meta.json"))
    before = meta.stat().st_mtime_ns
    data.prepare_data()
    assert meta.stat().st_mtime_ns == before
    assert json.loads(meta.read_text())["identity"]["corpus"] == "parallel_files"


@pytest.mark.parametrize("damage", ["val.bin", "val.ends.npy", "meta.json"])
def test_a_damaged_cache_is_named(tmp_path: Path, damage: str) -> None:
    ready(tmp_path)
    (folder,) = (path for path in (tmp_path / "cache").iterdir())
    (folder / damage).write_bytes(b"{")
    with pytest.raises(ConfigError, match=r"the data cache .* is damaged \(.*\); delete the folder to rebuild"):
        PairStore(folder)


def test_nothing_is_left_of_a_build_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.val holds no pair of sentences; give files with text"):
        PairStore.build(Given([Pair(" ", "b")]), 270, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="data.vocab_size=200 is too small: byte-level BPE needs at least 257"):
        PairStore.build(Given([Pair("a", "b")]), 200, tmp_path)


def test_what_is_wrong_with_the_validation_is_said_before_the_tokenizer_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomoe.data.pairs.store.train_tokenizer", None)
    train, val = write(tmp_path / "train", ["a"], ["A"]), write(tmp_path / "val", ["b", "c"], ["B"])
    with pytest.raises(ConfigError, match=r"^data.val: .*val.en has 2 lines and .*val.up has 1;"):
        PairStore.build(ParallelFiles("en", "up", train, val), 270, tmp_path)
    val = write(tmp_path / "val", [" "], [" "])
    with pytest.raises(ConfigError, match="^data.val holds no pair of sentences; give files with text"):
        PairStore.build(ParallelFiles("en", "up", train, val), 270, tmp_path)


def test_a_given_tokenizer_encodes_and_names_the_folder(tmp_path: Path) -> None:
    corpus, other = Given([Pair("one", "two")]), Tokenizer.train(["quite other text"], 262)
    own, adopted = PairStore.build(corpus, 270, tmp_path), PairStore.build(corpus, 270, tmp_path, other)
    assert own != adopted
    store = PairStore(adopted)
    assert store.tokenizer.to_json() == other.to_json()
    assert [side.tolist() for side in store.pairs("test")[0]] == [other.encode("one"), other.encode("two")]
