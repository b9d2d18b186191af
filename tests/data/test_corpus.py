from __future__ import annotations

from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress

from evomoe.data.corpus import SPLITS, HoldOut, fingerprint, normalise, text_key, track, unit_hash
from evomoe.data.text.corpus import BLOCK_CHARACTERS, LONGEST_LINE, Piece, blocks, select
from evomoe.errors import ConfigError


def test_hashes_are_the_same_on_every_machine() -> None:
    assert fingerprint({"b": 1, "a": [2, None]}) == fingerprint({"a": [2, None], "b": 1}) == "2b837dfef2b42872"
    # BLAKE2b of 64 bits, as `b2sum -l 64` prints it, of which the first 53 count.
    assert unit_hash("torch/nn/functional.py") == (0x7E4A54DC0D500817 >> 11) / 2**53
    assert unit_hash("torch/nn/functional.py", "cap") != unit_hash("torch/nn/functional.py")


def test_unit_hash_is_even() -> None:
    values = [unit_hash(f"package/module_{i}.py") for i in range(4000)]
    assert min(values) >= 0
    assert max(values) < 1
    # Four standard deviations of a binomial count with p = 1/4.
    assert all(abs(sum(q / 4 <= v < (q + 1) / 4 for v in values) - 1000) < 4 * (4000 * 3 / 16) ** 0.5 for q in range(4))


def test_white_space_does_not_make_another_text() -> None:
    assert normalise("  One\n\ttwo ") == "One two"
    assert text_key("One two") == text_key("One\n\n  two\t") != text_key("Onetwo")


@pytest.mark.parametrize("total", [3, None])
def test_a_bar_goes_when_its_items_end_or_are_left(total: int | None) -> None:
    with Progress(disable=True) as progress:
        items = track(progress, "abc", total, "reading")
        assert next(items) == "a"
        assert next(items) == "b"
        (task,) = progress.tasks
        assert (task.description, task.completed, task.total) == ("reading", 1, total)
        items.close()  # as an error in the loop over it does
        assert progress.tasks == []
        assert "".join(track(progress, "abc", total, "reading")) == "abc"
        assert progress.tasks == []


@given(st.lists(st.text(max_size=300).map(lambda line: line + "\n"), max_size=80))
def test_blocks_are_the_lines_and_end_one_document(lines: list[str]) -> None:
    found = list(blocks(lines))
    assert "".join(piece.text for piece in found) == "".join(lines)
    assert [piece.ends_document for piece in found] == [False] * (len(found) - 1) + [True] * bool(found)
    assert all(len(piece.text) >= BLOCK_CHARACTERS for piece in found[:-1])
    assert all(len(piece.text) < BLOCK_CHARACTERS + 301 for piece in found)


class TestLongLines:
    def test_one_of_words_is_cut_before_blanks_into_blocks(self) -> None:
        line = " ".join(f"word{number}" for number in range(40_000))
        texts = [piece.text for piece in blocks([line])]
        assert "".join(texts) == line
        assert all(BLOCK_CHARACTERS <= len(text) < BLOCK_CHARACTERS + 20 for text in texts[:-1])
        assert len(texts[-1]) <= LONGEST_LINE
        assert all(text.startswith(" word") for text in texts[1:])

    def test_one_without_blanks_is_cut_where_a_block_is_full(self) -> None:
        texts = [piece.text for piece in blocks(["first\n", "x" * 3 * LONGEST_LINE + "\n", "last"])]
        assert texts[0] == "first\n" + "x" * BLOCK_CHARACTERS
        assert texts[1] == "x" * BLOCK_CHARACTERS
        assert "".join(texts) == "first\n" + "x" * 3 * LONGEST_LINE + "\nlast"

    def test_one_at_the_limit_stays_whole(self) -> None:
        line = "a " * (LONGEST_LINE // 2 - 1) + "a\n"
        assert [piece.text for piece in blocks([line, line])] == [line, line]
        assert len(list(blocks([f"a{line}"]))) > 1

    @given(st.lists(st.integers(1, 50_000), max_size=12), st.sampled_from(["", " ", "\n", "word of a line "]))
    def test_however_it_comes_in_parts_the_blocks_are_those_of_the_whole(self, sizes: list[int], repeated: str) -> None:
        text = "".join(f"{repeated * (size // 10)}{'x' * size}" for size in sizes)
        whole = text.splitlines(keepends=True)
        parts = [line[start : start + 7000] for line in whole for start in range(0, len(line), 7000)]
        assert list(blocks(parts)) == list(blocks(whole))
        assert "".join(piece.text for piece in blocks(parts)) == text


class TestHoldOut:
    def test_a_gap_ends_the_document(self, monkeypatch: pytest.MonkeyPatch) -> None:
        where = {"a": 0.9, "b": 0.9, "c": 0.0, "d": 0.9, "e": 0.3, "f": 0.9}
        monkeypatch.setattr("evomoe.data.corpus.unit_hash", lambda text, salt: where[text])
        stream = [Piece(text, ends_document=text == "f") for text in "abcdef"]
        holdout = HoldOut(["val", "test"], 0.2)
        assert list(select(holdout, "train", lambda _: iter(stream))) == [
            ("a", False),
            ("b", True),
            ("d", True),
            ("f", True),
        ]
        assert list(select(holdout, "val", lambda _: iter(stream))) == [("c", True)]
        assert list(select(holdout, "test", lambda _: iter(stream))) == [("e", True)]

    @given(st.lists(st.tuples(st.text(max_size=8), st.booleans()), max_size=60))
    def test_every_piece_goes_to_one_split_and_equal_ones_together(self, items: list[tuple[str, bool]]) -> None:
        stream = [*(Piece(*item) for item in items), Piece("the end", ends_document=True)]
        holdout = HoldOut(["val", "test"], 0.25)
        parts = {
            split: [piece.text for piece in select(holdout, split, lambda _: iter(stream))]
            for split in ("train", "val", "test")
        }
        assert sorted(chain.from_iterable(parts.values())) == sorted(piece.text for piece in stream)
        keys = [{text_key(text) for text in part} for part in parts.values()]
        assert sum(map(len, keys)) == len(set().union(*keys))

    @given(st.lists(st.tuples(st.text(max_size=8), st.booleans()), max_size=60))
    def test_documents_never_merge(self, items: list[tuple[str, bool]]) -> None:
        """Kept pieces of two documents always have a document end between them."""
        stream = [Piece(f"{number} {text}", ends) for number, (text, ends) in enumerate(items)]
        document, documents = 0, {}
        for piece in stream:
            documents[piece.text] = document
            document += piece.ends_document
        kept = list(select(HoldOut(["val"], 0.25), "train", lambda _: iter(stream)))
        for before, after in pairwise(kept):
            assert before.ends_document or documents[before.text] == documents[after.text]

    def test_the_fraction_is_about_that(self) -> None:
        stream = [Piece(f"row {i}", ends_document=True) for i in range(4000)]
        held = len(list(select(HoldOut(["test"], 0.05), "test", lambda _: iter(stream))))
        assert abs(held - 200) < 4 * (4000 * 0.05 * 0.95) ** 0.5

    def test_a_split_that_is_given_is_read_whole(self) -> None:
        holdout = HoldOut(["test"], 0.25)
        items = {"train": [f"row {i}" for i in range(100)], "val": ["row 1", "row 2"]}
        read = {split: list(holdout.read(split, lambda name: iter(items[name]), str)) for split in SPLITS}
        assert read["val"] == items["val"]
        assert sorted(read["train"] + read["test"]) == sorted(items["train"])
        assert read["train"]
        assert read["test"]

    @pytest.mark.parametrize("fraction", [0, -0.1, 0.3])
    def test_refuses_other_fractions(self, fraction: float) -> None:
        with pytest.raises(ConfigError, match=rf"data.holdout={fraction} must be above 0 and at most 0.25"):
            HoldOut(["val"], fraction)
