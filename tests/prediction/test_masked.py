from __future__ import annotations

import re

import pytest
from helpers.programs import PLAIN, compose

from evomoe.data import Tokenizer
from evomoe.errors import ConfigError
from evomoe.prediction import predict
from evomoe.prediction.masked import split_at_masks

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
    parts = split_at_masks(prompt)
    hidden = [token for part in parts for token in ["mask", *tokenizer.encode(part)]][1:]
    whole: list[int | str] = list(tokenizer.encode(text))
    assert [seen if seen == "mask" else token for seen, token in zip(hidden, whole, strict=True)] == hidden
    words = iter(tokenizer.decode([token]) for seen, token in zip(hidden, whole, strict=True) if seen == "mask")
    assert "".join(part + next(words, "") for part in parts) == text


def test_nothing_else_of_a_prompt_is_changed() -> None:
    assert split_at_masks(" a  <mask>\n<mask> b ") == [" a ", "\n", " b "]
    assert split_at_masks("no mask ") == ["no mask "]


def test_hidden_words_are_guessed(train, tmp_path, capsys):
    _, objects = train(tmp_path / "mlm" / "run", *PLAIN, "trainer.max_steps=4", experiment="mlm_switch")
    ask = (f"log_dir={tmp_path}", "candidates=3")
    prompts = ["Return the <mask> of a <mask>.", "<mask>"]
    capsys.readouterr()
    texts = predict(compose(*ask, f'prompt=["{prompts[0]}","{prompts[1]}"]', config="generate"))
    assert re.fullmatch(r"Return the.* of a.*\.", texts[0], re.DOTALL)
    assert len(texts) == 2
    assert all("<mask>" not in text for text in texts)
    shown = capsys.readouterr().out
    assert prompts[0] in shown
    assert len(re.findall(r"\d+\.\d%", shown)) == 9  # three guesses for each of three masks

    (tmp_path / "in.txt").write_text("\n\n".join(prompts) + "\n")
    assert texts == predict(compose(*ask, f"prompt_file={tmp_path / 'in.txt'}", config="generate"))
    assert capsys.readouterr().out == shown

    predict(compose(*ask, f'prompt="{prompts[0]}"', "show_experts=true", config="generate"))
    cells = re.findall(r'│ "(.*)" +│ [0-3]:[01]\.\d\d +│$', capsys.readouterr().out, re.MULTILINE)
    before, between, after = (objects.data.tokenizer.encode(part) for part in split_at_masks(prompts[0]))
    assert len(cells) == 1 + len(before) + len(between) + len(after) + 2  # a marker begins every text
    assert [place for place, cell in enumerate(cells) if cell == "<mask>"] == [
        1 + len(before),
        2 + len(before) + len(between),
    ]
    with pytest.raises(ConfigError, match="prompt 2 holds no <mask>"):
        predict(compose(*ask, 'prompt=["<mask>","Return"]', config="generate"))
