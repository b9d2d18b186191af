from __future__ import annotations

import pytest

from evomoe import writing
from evomoe.data import Tokenizer

TEXT = ["Return the length of a list.", "Return the value of a name.", "The length of the value"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXT, 400)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("Return the <mask> of a list.", "Return the length of a list."),
        ("Return <mask> <mask> of a list.", "Return the length of a list."),
        ("<mask> the length", "Return the length"),
        ("Return the  <mask>", "Return the  length"),
        ("the length<mask>", "the length."),
    ],
)
def test_a_mask_stands_for_a_whole_word_with_its_blank(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    """As the tokens of the whole text, of which those behind the masks are hidden in training."""
    parts = writing.split_at_masks(prompt)
    hidden = [token for part in parts for token in ["mask", *tokenizer.encode(part)]][1:]
    whole: list[int | str] = list(tokenizer.encode(text))
    assert [seen if seen == "mask" else token for seen, token in zip(hidden, whole, strict=True)] == hidden
    words = iter(tokenizer.decode([token]) for seen, token in zip(hidden, whole, strict=True) if seen == "mask")
    assert "".join(part + next(words, "") for part in parts) == text


def test_nothing_else_of_a_prompt_is_changed() -> None:
    assert writing.split_at_masks(" a  <mask>\n<mask> b ") == [" a ", "\n", " b "]
    assert writing.split_at_masks("no mask ") == ["no mask "]
