from __future__ import annotations

import json
from pathlib import Path

import pytest
from data.tiny_pairs import read, sentences, write, write_corpus

from evomoe.data.corpus import SPLITS
from evomoe.data.pairs.corpus import HubPairs, Pair, ParallelFiles
from evomoe.errors import ConfigError


class TestFiles:
    @pytest.mark.parametrize("compressed", [False, True])
    def test_lines_are_paired(self, tmp_path: Path, compressed: bool) -> None:
        stem = write(tmp_path / "t", ["a b", "ç", "c\r"], ["A B", "Ç", "C"], compressed)
        corpus = ParallelFiles("en", "up", stem, stem, stem)
        assert read(corpus, "train") == [Pair("a b", "A B"), Pair("ç", "Ç"), Pair("c", "C")]
        assert read(ParallelFiles("up", "en", stem, stem, stem), "test")[0] == Pair("A B", "a b")

    def test_a_blank_side_leaves_the_pair_out_and_is_counted(self, tmp_path: Path) -> None:
        stem = write(tmp_path / "t", ["a", "", "c", " "], ["A", "B", "\t", ""])
        corpus = ParallelFiles("en", "up", stem, stem, stem)
        for _ in range(2):  # reading again does not count again
            assert read(corpus, "train") == [Pair("a", "A")]
        assert corpus.notes() == {"blank pairs left out of train": 3}

    @pytest.mark.parametrize(("sources", "targets", "counts"), [(3, 5, (3, 5)), (4, 1, (4, 1))])
    def test_line_counts_that_differ_are_refused_with_both(
        self, tmp_path: Path, sources: int, targets: int, counts: tuple[int, int]
    ) -> None:
        stem = write(tmp_path / "t", ["a"] * sources, ["b"] * targets)
        with pytest.raises(ConfigError, match=rf"data.val: .*t.en has {counts[0]} lines and .*t.up has {counts[1]};"):
            read(ParallelFiles("en", "up", stem, stem, stem), "val")

    def test_another_encoding_is_refused_with_its_line(self, tmp_path: Path) -> None:
        stem = write(tmp_path / "t", ["a", "b"], ["A", "B"])
        (tmp_path / "t.up").write_bytes("A\nÜber\n".encode("latin-1"))
        with pytest.raises(ConfigError, match=r"t.up, line 2: not UTF-8 \(invalid continuation byte\); convert it"):
            read(ParallelFiles("en", "up", stem, stem, stem), "train")

    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path) -> None:
        stem = write(tmp_path / "t", ["\ufeffa", "b"], ["\ufeffA", "B"])
        assert read(ParallelFiles("en", "up", stem, stem, stem), "train") == [Pair("a", "A"), Pair("b", "B")]

    @pytest.mark.parametrize("split", ["val", "test"])
    def test_pairs_that_are_also_trained_on_are_refused(self, tmp_path: Path, split: str) -> None:
        stem, copy = (write(tmp_path / name, ["a"], ["A"]) for name in ("t", "copy"))
        with pytest.raises(
            ConfigError, match=rf"^data.{split}: .*copy.en with .*copy.up is also trained on, as .*t.en with .*t.up of"
        ):
            ParallelFiles("en", "up", stem, **{split: copy}).identity()
        other = write(tmp_path / "copy", ["a"], ["B"])  # another translation of the same text
        assert ParallelFiles("en", "up", stem, other, other).identity()

    def test_a_missing_file_is_refused_with_what_was_looked_for(self, tmp_path: Path) -> None:
        stem = write(tmp_path / "t", ["a"], ["A"])
        with pytest.raises(ConfigError, match=r"data.train=.*t and data.target=de: there is neither .*t.de nor .*.gz"):
            ParallelFiles("en", "de", stem)
        with pytest.raises(ConfigError, match=r"data.source=en and data.target=en are one language"):
            ParallelFiles("en", "en", stem)

    def test_missing_splits_are_held_out_by_source(self, tmp_path: Path) -> None:
        texts = sentences("s", 150)
        stem = write(tmp_path / "t", texts * 2, [f"{number}" for number in range(300)])
        corpus = ParallelFiles("en", "up", stem, holdout=0.2)
        parts = [read(corpus, split) for split in SPLITS]
        assert [len(part) for part in parts] == [2 * len({pair.source for pair in part}) for part in parts]
        assert set.union(*({pair.source for pair in part} for part in parts)) == set(texts)
        assert sum(map(len, parts)) == 300
        assert all(parts)

    def test_too_few_to_hold_out(self, tmp_path: Path) -> None:
        corpus = ParallelFiles("en", "up", write(tmp_path / "t", ["a"], ["A"]), holdout=0.01)
        read(corpus, "train")
        assert "too short to hold out a validation split: give more text, or data.val=PATH" in corpus.explain_empty(
            "val"
        )

    def test_identity_follows_content_and_direction_not_place(self, tmp_path: Path) -> None:
        stems = write_corpus(tmp_path / "a")
        first = ParallelFiles("en", "up", **stems).identity()
        assert ParallelFiles("en", "up", **write_corpus(tmp_path / "b")).identity() == first
        assert ParallelFiles("up", "en", **stems).identity() != first
        assert ParallelFiles("en", "up", **write_corpus(tmp_path / "c", 41)).identity() != first


class TestHub:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        folder = tmp_path / "tiny"
        folder.mkdir()
        for split, count in (("train", 60), ("validation", 2), ("test", 3)):
            rows = [{"translation": {"en": f"{split} {i}", "de": f"{split}\n{i} de"}} for i in range(count)]
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder

    def test_the_column_translation_is_looked_into(self, folder: Path) -> None:
        corpus = HubPairs("de", "en", str(folder))
        assert [len(read(corpus, split)) for split in SPLITS] == [60, 2, 3]
        assert read(corpus, "val")[1] == Pair("validation 1 de", "validation 1")

    def test_what_is_null_is_left_out_and_counted(self, folder: Path) -> None:
        rows = [{"en": "a", "de": "b"}, {"en": "c", "de": None}, {"en": None, "de": "d"}, None]
        text = "\n".join(json.dumps({"translation": row}) for row in rows)
        (folder / "train.jsonl").write_text(text)
        corpus = HubPairs("de", "en", str(folder))
        assert read(corpus, "train") == [Pair("b", "a")]
        assert corpus.notes() == {"blank pairs left out of train": 3}

    def test_a_column_of_that_name_may_be_text(self, folder: Path) -> None:
        for split in ("train", "validation", "test"):
            row = {"original": f"{split} en", "translation": f"{split} de"}
            (folder / f"{split}.jsonl").write_text(json.dumps(row))
        corpus = HubPairs("original", "translation", str(folder))
        assert read(corpus, "test") == [Pair("test en", "test de")]

    def test_missing_splits_are_held_out(self, folder: Path) -> None:
        corpus = HubPairs("de", "en", str(folder), val=None, test=None, holdout=0.2)
        parts = [set(read(corpus, split)) for split in SPLITS]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 60
        assert all(parts)

    def test_errors_are_one_line_with_the_value(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match=r"data.target=fr is no language of .*; choose among (de, en|en, de)$"):
            read(HubPairs("en", "fr", str(folder)), "train")
        with pytest.raises(ConfigError, match=r'data.val=dev of .*: Unknown split "dev"'):
            read(HubPairs("en", "de", str(folder), val="dev"), "val")
        with pytest.raises(ConfigError, match=r"^data.name=no-such-name-anywhere, data.config=None: "):
            HubPairs("en", "de", "no-such-name-anywhere").identity()
