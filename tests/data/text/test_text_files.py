from __future__ import annotations

import gzip
import json
import tracemalloc
from itertools import chain
from pathlib import Path

import pytest
from rich.progress import Progress

from evomoe.data.corpus import SPLITS, text_key
from evomoe.data.text.corpus import Piece
from evomoe.data.text.files import TextFileCorpus
from evomoe.data.text.store import TokenStore
from evomoe.errors import ConfigError


def read(corpus: TextFileCorpus, split: str) -> list[Piece]:
    with Progress(disable=True) as progress:
        return list(corpus.pieces(split, progress))


def documents(pieces: list[Piece]) -> list[str]:
    found, current = [], ""
    for piece in pieces:
        current += piece.text
        if piece.ends_document:
            found.append(current)
            current = ""
    assert current == ""
    return found


def write(path: Path, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def rows(*texts: str, field: str = "text") -> str:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts)


class TestFormats:
    @pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.gz"])
    def test_a_text_file_is_one_document_to_the_last_byte(self, tmp_path: Path, name: str) -> None:
        text = "First line\r\n\n" + "Zweite Zeile, ä\n" * 1000 + "no line end"
        path = write(tmp_path / name, text)
        pieces = read(TextFileCorpus(path, path, path), "train")
        assert documents(pieces) == [text]
        assert len(pieces) > 3

    @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
    def test_a_row_is_one_document(self, tmp_path: Path, name: str) -> None:
        path = write(tmp_path / name, rows("one\ntwo", "", "  ", "drei ä", field="body") + "\n")
        corpus = TextFileCorpus(path, path, path, text_field="body")
        assert read(corpus, "val") == [("one\ntwo", True), ("drei ä", True)]

    def test_lists_and_patterns(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("b.txt", "a.txt", "c[1].txt"):
            write(tmp_path / name, f"{name}\n")
        last = write(tmp_path / "z.jsonl", rows("row"))
        monkeypatch.chdir(tmp_path)
        corpus = TextFileCorpus([last, "*.txt"], "c[1].txt", "a.txt")
        assert documents(read(corpus, "train")) == ["row", "a.txt\n", "b.txt\n", "c[1].txt\n"]
        assert documents(read(corpus, "val")) == ["c[1].txt\n"]

    @pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
    def test_a_text_without_line_ends_is_read_in_bounded_memory_and_held_out(self, tmp_path: Path, name: str) -> None:
        text = " ".join(f"wörd{number}" for number in range(400_000))
        corpus = TextFileCorpus(write(tmp_path / name, text), holdout=0.1)
        parts = {split: [piece.text for piece in read(corpus, split)] for split in SPLITS}
        assert all(parts.values())
        assert sorted("".join(chain.from_iterable(parts.values())).split()) == sorted(text.split())
        with Progress(disable=True) as progress:
            tracemalloc.start()
            try:
                assert sum(len(piece.text) for piece in corpus._read("train", progress)) == len(text)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        assert peak < len(text) / 4

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path, name: str) -> None:
        text = rows("one", "\ufefftwo") if name == "a.jsonl" else "one\n"
        path = write(tmp_path / name, f"\ufeff{text}")
        found = documents(read(TextFileCorpus(path, path, path), "train"))
        assert found == (["one", "\ufefftwo"] if name == "a.jsonl" else ["one\n"])

    def test_half_a_pair_of_surrogates_is_replaced(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", '{"text": "cut \\ud83d"}\n{"text": "\\ude00 \\ud83d\\ude00"}\n')
        other = write(tmp_path / "b.txt", "other\n")
        corpus = TextFileCorpus(path, other, other)
        assert documents(read(corpus, "train")) == ["cut \ufffd", "\ufffd \U0001f600"]
        assert TokenStore(TokenStore.build(corpus, 300, tmp_path / "cache")).sizes["train"].documents == 2


class TestHoldOut:
    def test_of_rows(self, tmp_path: Path) -> None:
        texts = [f"document {i % 150}" for i in range(200)]
        corpus = TextFileCorpus(write(tmp_path / "a.jsonl", rows(*texts)), holdout=0.1)
        parts = {split: documents(read(corpus, split)) for split in SPLITS}
        assert sorted(chain.from_iterable(parts.values())) == sorted(texts)
        assert all(parts.values())
        assert not {text_key(t) for t in parts["train"]} & {text_key(t) for t in parts["val"] + parts["test"]}

    def test_of_running_text(self, tmp_path: Path) -> None:
        text = "".join(f"line {i} of a long text\n" for i in range(40_000))
        corpus = TextFileCorpus(write(tmp_path / "a.txt", text))
        parts = {split: documents(read(corpus, split)) for split in SPLITS}
        lines = [line for part in parts.values() for document in part for line in document.splitlines(keepends=True)]
        assert sorted(lines) == sorted(text.splitlines(keepends=True))
        assert 0.02 < len("".join(parts["val"])) / len(text) < 0.08
        # Each document is uninterrupted text.
        assert all(document in text for part in parts.values() for document in part)

    def test_only_for_what_is_missing(self, tmp_path: Path) -> None:
        train = write(tmp_path / "a.jsonl", rows(*(f"document {i}" for i in range(100))))
        test = write(tmp_path / "t.txt", "the test\n")
        corpus = TextFileCorpus(train, test=test)
        assert documents(read(corpus, "test")) == ["the test\n"]
        assert len(read(corpus, "train")) + len(read(corpus, "val")) == 100


class TestIdentity:
    def test_follows_the_content_and_the_options_that_count(self, tmp_path: Path) -> None:
        one = write(tmp_path / "one.txt", "same\n")
        two = write(tmp_path / "two.txt", "same\n")
        other = write(tmp_path / "other.txt", "other\n")
        val, moved, test = (write(tmp_path / name, name[0]) for name in ("val.txt", "v.txt", "test.txt"))
        identity = TextFileCorpus(one, val, val).identity()
        assert TextFileCorpus(two, moved, val, holdout=0.1).identity() == identity
        assert TextFileCorpus(one, val, test).identity() != identity
        assert TextFileCorpus(one, val).identity() != TextFileCorpus(one, val, holdout=0.1).identity()
        assert TextFileCorpus([one, other], val).identity() != TextFileCorpus([other, one], val).identity()

    def test_a_row_file_is_not_the_text_file_of_equal_bytes(self, tmp_path: Path) -> None:
        text, table = (write(tmp_path / name, rows("a", "b")) for name in ("a.txt", "a.jsonl"))
        assert TextFileCorpus(text).identity() != TextFileCorpus(table).identity()


class TestErrors:
    @pytest.mark.parametrize("split", ["val", "test"])
    def test_a_file_that_is_also_trained_on(self, tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("a.txt", "b.txt", "c.txt"):
            write(tmp_path / name, f"{name}\n")
        write(tmp_path / "copy.txt.other", "b.txt\n")
        (tmp_path / "copy.txt.other").rename(tmp_path / "copy.gz")  # another name for the content of b.txt
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError) as caught:
            TokenStore.build(TextFileCorpus("*.txt", **{split: "copy.gz"}), 300, tmp_path / "cache")
        assert str(caught.value) == (
            f"data.{split}: copy.gz is also trained on, as b.txt of data.train; leave it out of one of them"
        )
        assert not (tmp_path / "cache").exists()

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"^data.val: .* is a folder; for its files write data.val='.*/\*.txt'$"):
            TextFileCorpus(write(tmp_path / "a.txt", "a"), val=str(tmp_path))
        with pytest.raises(ConfigError, match=r"^data.val=.*nowhere\*.txt is no file and matches none"):
            TextFileCorpus(write(tmp_path / "a.txt", "a"), val=str(tmp_path / "nowhere*.txt"))

    def test_a_folder_is_answered_with_the_files_that_it_holds(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt.gz").touch()
        with pytest.raises(ConfigError, match=r"is a folder; for its files write data.train='.*/\*.txt.gz'$"):
            TextFileCorpus(str(tmp_path))

    def test_other_kind_of_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"a.parquet is not a file ending in .txt, .txt.gz, .gz, .jsonl"):
            TextFileCorpus(write(tmp_path / "a.parquet", "a"))

    @pytest.mark.parametrize("name", ["a.tar.gz", "a.csv.gz", "a.parquet.gz"])
    def test_a_packed_file_of_another_kind(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(gzip.compress(b"x"))
        with pytest.raises(ConfigError, match=rf"^data.train: .*{name} is no plain text inside; turn it into .txt or"):
            TextFileCorpus(str(tmp_path / name))

    def test_empty_list(self) -> None:
        with pytest.raises(ConfigError, match=r"data.train is an empty list"):
            TextFileCorpus([])

    @pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
    def test_wrong_encoding(self, tmp_path: Path, name: str) -> None:
        path = write(tmp_path / name, b"fine\n" * 2000 + b"caf\xe9 au lait\n" + b"fine\n")
        with pytest.raises(ConfigError, match=rf"{name}, line 2001: not UTF-8 \(invalid continuation byte\)"):
            read(TextFileCorpus(path), "train")

    def test_a_character_that_is_cut_off_at_the_end(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.txt", b"fine\n" + b"word " * 40_000 + b"caf\xc3")
        with pytest.raises(ConfigError, match=r"a.txt, line 2: not UTF-8 \(unexpected end of data\)"):
            read(TextFileCorpus(path), "train")

    def test_damaged_gzip(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt.gz"
        path.write_bytes(gzip.compress(b"line\n" * 5000)[:-20])
        with pytest.raises(ConfigError, match=r"a.txt.gz, after line \d+: cannot be read"):
            read(TextFileCorpus(str(path)), "train")

    def test_not_compressed_at_all(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt.gz"
        path.write_text("plain")
        with pytest.raises(ConfigError, match=r"a.txt.gz, after line 0: cannot be read \(Not a gzipped file"):
            read(TextFileCorpus(str(path)), "train")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (
                '{"title": "x", "body": "y"}',
                r"line 2: no text in field 'text' \(found: title, body\); set data.text_field",
            ),
            ('{"text": 3}', r"line 2: no text in field 'text'"),
            ("[1]", r"line 2: no text in field 'text' \(found: list\)"),
            ('{"text": "x"', r"line 2: not JSON"),
            ("[" * 100_000, r"line 2: not JSON \(maximum recursion depth exceeded"),
            ('{"text": ' + "1" * 5_000 + "}", r"line 2: not JSON \(Exceeds the limit"),
        ],
    )
    def test_bad_rows(self, tmp_path: Path, line: str, message: str) -> None:
        path = write(tmp_path / "a.jsonl", rows("good") + line + "\n")
        with pytest.raises(ConfigError, match=message) as caught:
            read(TextFileCorpus(path), "train")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        (
            "A short text.\n" * 130,
            [],
            "the training text is too short to hold out a validation split: give more text, or data.val=FILE "
            "data.test=FILE",
        ),
        (
            "A short text.\n" * 130,
            ["val"],
            "the training text is too short to hold out a test split: give more text, or data.test=FILE",
        ),
        ("", [], "data.train holds no text; give files with text"),
        (" \n\n", ["val", "test"], "data.train holds no text; give files with text"),
    ],
    ids=["short", "short with val", "empty", "blank"],
)
def test_a_short_text_is_told_from_an_empty_one(tmp_path: Path, text: str, given: list[str], message: str) -> None:
    path, other = write(tmp_path / "a.txt", text), write(tmp_path / "b.txt", "Another text.\n")
    with pytest.raises(ConfigError) as caught:
        TokenStore.build(TextFileCorpus(path, **dict.fromkeys(given, other)), 300, tmp_path / "cache")
    assert str(caught.value) == message
