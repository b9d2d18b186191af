from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomoe.data.tokenizer import END_OF_TEXT, SMALLEST_VOCABULARY, Sample, Tokenizer
from evomoe.errors import ConfigError

TEXTS = ["the cat sat on the mat, the cat!\n", "  def f(x):\n\treturn x ** 2\n", "Füße, naïveté, 日本語 and 🙂\n"] * 3
TOKENIZER = Tokenizer.train(TEXTS, vocab_size=300)


@given(st.text())
def test_decoding_gives_the_text_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.text(max_size=20)))
def test_encoding_many_is_encoding_each(texts: list[str]) -> None:
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


def test_the_marker_in_a_text_is_text() -> None:
    ids = TOKENIZER.encode(f"a{END_OF_TEXT}b")
    assert TOKENIZER.end_of_text_id not in ids
    assert TOKENIZER.decode(ids) == f"a{END_OF_TEXT}b"
    assert TOKENIZER.decode([TOKENIZER.end_of_text_id]) == END_OF_TEXT
    assert Tokenizer.from_json(TOKENIZER.to_json()).encode(END_OF_TEXT) == TOKENIZER.encode(END_OF_TEXT)


def test_merges_are_learned_up_to_the_size_or_the_end_of_the_text() -> None:
    assert TOKENIZER.vocab_size == 300
    assert len(TOKENIZER.encode("the cat")) == 2
    nothing_to_merge = Tokenizer.train(["a b c"], vocab_size=4096)
    # Every byte, the marker, and the two merges " b" and " c".
    assert nothing_to_merge.vocab_size == SMALLEST_VOCABULARY + 2
    assert len(nothing_to_merge.encode("xyz é")) == 6


def test_training_is_deterministic_across_processes() -> None:
    words = "".join(f"{a}{b}{c} " for a in "abcdefgh" for b in "aeiou" for c in "klmnop")  # many ties
    script = (
        "import sys\n"
        "from evomoe.data.tokenizer import Tokenizer\n"
        "sys.stdout.write(Tokenizer.train([sys.argv[1]] * 2, 500).to_json())\n"
    )
    result = subprocess.run([sys.executable, "-c", script, words], capture_output=True, text=True, check=True)
    here = Tokenizer.train([words] * 2, 500)
    assert here.vocab_size == 500
    assert result.stdout == here.to_json()


def test_travels_as_json_and_to_other_processes() -> None:
    for copy in (Tokenizer.from_json(TOKENIZER.to_json()), pickle.loads(pickle.dumps(TOKENIZER))):
        assert copy.vocab_size == TOKENIZER.vocab_size
        assert copy.end_of_text_id == TOKENIZER.end_of_text_id
        assert copy.encode(TEXTS[2]) == TOKENIZER.encode(TEXTS[2])
        assert copy.to_json() == TOKENIZER.to_json()


def test_a_cut_text_is_no_tokenizer() -> None:
    with pytest.raises(ValueError, match="no tokenizer: "):
        Tokenizer.from_json(TOKENIZER.to_json()[:500])
    with pytest.raises(ValueError, match="no tokenizer: "):
        Tokenizer.from_json(TOKENIZER.to_json().replace(END_OF_TEXT, "<end>"))


class TestSample:
    def test_is_even_and_within_the_limit(self) -> None:
        sample = Sample(limit=100)
        for number in range(1000):
            sample.add(f"{number:03d}")
        # 333 texts of 3 characters would be 100 in all; the next power of two below is every 32nd.
        assert sample.texts == [f"{number:03d}" for number in range(0, 1000, 32)]
        small = Sample(limit=100)
        for number in range(33):
            small.add(f"{number:03d}")
        assert len(small.texts) == 33

    def test_keeps_the_texts_of_an_item_together(self) -> None:
        sample = Sample(limit=100)
        for number in range(100):
            sample.add(f"{number:03d}", f"{-number:04d}")
        kept = range(0, 100, 8)
        assert sample.texts == [text for number in kept for text in (f"{number:03d}", f"{-number:04d}")]


def test_is_found_in_a_checkpoint() -> None:
    checkpoint = {"state_dict": {}, "epoch": 3, "TextFiles": {"tokenizer": TOKENIZER.to_json(), "fingerprint": "f"}}
    assert Tokenizer.from_checkpoint(checkpoint).encode("the cat") == TOKENIZER.encode("the cat")
    with pytest.raises(ConfigError, match=r"the checkpoint holds no tokenizer"):
        Tokenizer.from_checkpoint({"state_dict": {}})
