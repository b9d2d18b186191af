from __future__ import annotations

import re

import pytest
from helpers.programs import PLAIN, compose

from evomoe import writing
from evomoe.cli import quote_text
from evomoe.data import Tokenizer
from evomoe.errors import ConfigError

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


def write(trained, *overrides: str) -> list[str]:
    return writing.write(compose(f"log_dir={trained.logs}", "max_new_tokens=8", *overrides, config="generate"))


def test_what_is_written_begins_with_the_prompt_and_is_printed_unchanged(trained, capsys):
    prompt = "def f(x): # [not markup] :smile: " + "a long line that a terminal would wrap " * 3
    (text,) = write(trained, quote_text(f"prompt={prompt}"))
    assert text.startswith(prompt)
    assert text != prompt
    assert re.sub(r"[\a\b\v\f\r]", "", text) in capsys.readouterr().out  # control codes do not reach the terminal


def test_tabs_are_printed_as_they_are_and_bells_not(capsys):
    writing._print("all:\n\tmake\a\r")
    assert capsys.readouterr().out == "all:\n\tmake\n"


def test_a_device_that_cannot_be_used_is_one_line(trained):
    with pytest.raises(ConfigError, match=r"^device=cudda cannot be used \(.*\): use device=cpu"):
        write(trained, "prompt=a", "device=cudda")


def test_several_prompts_are_continued_each_by_itself(trained):
    both = write(trained, 'prompt=["The value ","If "]', "seed=3")
    assert [both[0][:10], both[1][:3]] == ["The value ", "If "]
    assert both == write(trained, 'prompt=["The value ","If "]', "seed=3")
    assert both == [*write(trained, 'prompt="The value "', "seed=3"), *write(trained, 'prompt="If "', "seed=3")]
    assert both != write(trained, 'prompt=["The value ","If "]', "seed=4")
    greedy = [write(trained, 'prompt="If "', "temperature=0", f"seed={seed}") for seed in (3, 4)]
    assert greedy[0] == greedy[1]


def test_the_experts_of_each_token_are_shown(trained, capsys):
    write(trained, 'prompt="If "', "show_experts=true")
    rows = [line for line in capsys.readouterr().out.splitlines() if re.search(r"\d:\d\.\d\d", line)]
    assert len(rows) == len(trained.data.tokenizer.encode("If ")) + 8
    assert all(re.search(r"│ [0-3]:[01]\.\d\d +│$", row) for row in rows)  # hardened: one expert a token


def test_a_dense_model_has_no_experts_to_show(train, tmp_path):
    train(tmp_path / "dense" / "run", *PLAIN, "trainer.max_steps=1", experiment="gpt_dense")
    with pytest.raises(ConfigError, match="^show_experts=true: .* has no experts, as its model is dense$"):
        writing.write(compose(f"log_dir={tmp_path}", "prompt=a", "show_experts=true", config="generate"))


@pytest.mark.parametrize("prompt", ['""', "[]", '["a",""]', "null"])
def test_an_empty_prompt_is_refused(trained, prompt):
    with pytest.raises(ConfigError, match="^prompt is empty"):
        write(trained, f"prompt={prompt}")


def test_hidden_words_are_guessed(train, tmp_path, capsys):
    train(tmp_path / "mlm" / "run", *PLAIN, "trainer.max_steps=4", experiment="mlm_switch")
    ask = (f"log_dir={tmp_path}", "candidates=3")
    texts = writing.write(compose(*ask, 'prompt=["Return the <mask> of a <mask>.","<mask>"]', config="generate"))
    assert re.fullmatch(r"Return the.* of a.*\.", texts[0], re.DOTALL)
    assert len(texts) == 2
    assert all("<mask>" not in text for text in texts)
    shown = capsys.readouterr().out
    assert "Return the <mask> of a <mask>." in shown
    assert len(re.findall(r"\d+\.\d%", shown)) == 9  # three guesses for each of three masks
    with pytest.raises(ConfigError, match="prompt holds no <mask>"):
        writing.write(compose(*ask, 'prompt="Return"', config="generate"))


def test_sentences_are_translated(train, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "mt" / "run"
    values, _ = train(folder, *PLAIN[:2], "trainer.max_steps=4", "trainer.val_check_interval=4", experiment="mt_dts")
    assert {"test/bleu", "test/chrf", "test/exact_match", "val/bleu", "val/loss_sparse"} <= values.keys()
    ask = (f"log_dir={tmp_path}", "beam=2")

    def translate(*overrides: str) -> list[str]:
        capsys.readouterr()
        return writing.write(compose(*ask, *overrides, config="generate"))

    sentences = ["Return the value.", "If it is, print", "The"]
    (tmp_path / "in.txt").write_text("\n".join(sentences) + "\n")
    all_at_once = translate(f"source_file={tmp_path / 'in.txt'}")
    assert capsys.readouterr().out.split("\n")[:-1] == all_at_once
    assert all_at_once == translate(f"source_file={tmp_path / 'in.txt'}", "batch_size=1")
    assert all_at_once[1] == translate('source="If it is, print"')[0]
    best = translate(f"source_file={tmp_path / 'in.txt'}", "n_best=2")
    listed = re.findall(r"^(\d) \|\|\| (.*?) \|\|\| (-\d+\.\d{3})$", capsys.readouterr().out, re.MULTILINE | re.DOTALL)
    assert [number for number, _, _ in listed] == ["0", "0", "1", "1", "2", "2"]
    assert [text for _, text, _ in listed[::2]] == best
    assert all(float(first[2]) >= float(second[2]) for first, second in zip(listed[::2], listed[1::2], strict=True))
    (tmp_path / "gap.txt").write_text("\n".join(["", sentences[0], " ", *sentences[1:]]) + "\n")
    assert translate(f"source_file={tmp_path / 'gap.txt'}") == ["", all_at_once[0], "", *all_at_once[1:]]
    assert capsys.readouterr().out == "\n".join(["", all_at_once[0], "", *all_at_once[1:]]) + "\n"
    translate(f"source_file={tmp_path / 'gap.txt'}", "n_best=2")
    assert re.findall(r"^(\d) \|\|\|", capsys.readouterr().out, re.MULTILINE) == ["1", "1", "3", "3", "4", "4"]
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # a terminal, for rich
    translate("source=The", "n_best=2")
    assert len(re.findall(r"│ -\d+\.\d{3} ", capsys.readouterr().out)) == 2

    (tmp_path / "blank.txt").write_text("\n \n")
    for overrides, message in [
        ([], 'expected source="a sentence" or source_file=sentences.txt, one of the two'),
        (["source=a", "source_file=b"], "one of the two"),
        (["source=[]"], "^source is empty"),
        (["prompt=a"], "prompt is for a model that writes on, and .* translates: give source"),
        (["source_file=none.txt"], "source_file=none.txt: there is no such file"),
        ([f"source_file={tmp_path}"], "is a folder; expected a file with a sentence in every line"),
        ([f"source_file={tmp_path / 'blank.txt'}"], r"blank.txt holds no sentence: expected one in every line"),
        (
            [quote_text("source=" + "again " * 40)],
            r"sentence 1 has \d+ tokens, its end included, and the model reads 32: shorten",
        ),
        (["source=a", "n_best=3"], r"n_best=3: expected 1 to beam=2"),
    ]:
        with pytest.raises(ConfigError, match=message):
            translate(*overrides)


def test_a_model_that_does_not_translate_refuses_a_source(trained):
    with pytest.raises(ConfigError, match="source is for a model that translates, which .* is not: give prompt"):
        write(trained, "source=a")


def test_a_model_of_images_reads_no_text(classifier):
    with pytest.raises(ConfigError, match="classifies images and reads no text: measure it with eval.py"):
        writing.write(compose(f"ckpt_path={classifier.folder}", "prompt=a", config="generate"))


def test_a_model_that_reads_one_text_refuses_a_second(trained):
    with pytest.raises(
        ConfigError, match="second is for a model that classifies pairs, which .* does not: leave it out"
    ):
        write(trained, "prompt=a", "second=b")
