from __future__ import annotations

import io
import os
import re
from types import SimpleNamespace

import pytest
from helpers.programs import PLAIN, compose

from evomoe.errors import ConfigError
from evomoe.prediction import UNSET, USES, predict
from evomoe.prediction.common import by_length, print_text, read_texts

BYTE = os.fsdecode(b"\xe9")
"""How Python holds a byte of a command line that is not UTF-8."""


def ask(trained, *overrides: str) -> list[str]:
    return predict(compose(f"log_dir={trained.logs}", "max_new_tokens=8", *overrides, config="generate"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("source=a", "source is for a model that translates, and .* continues texts: give prompt"),
        ("source_file=a", "source_file is for a model that translates, and .* continues texts: give prompt"),
        ("second=b", "second is for a model that classifies sentences, and .* continues texts: leave it out"),
        ("beam=2", "beam is for a model that translates, and .* continues texts: leave it out"),
        ("too_long=drop", "too_long is for a model that translates, and .* continues texts: leave it out"),
        ("batch_size=0", "batch_size=0: expected at least 1, a whole number"),
        ("batch_size=-1", "batch_size=-1: expected at least 1"),
        ("batch_size=1.5", "batch_size=1.5: expected at least 1"),
        ("candidates=0", "candidates=0: expected at least 1"),
        ("device=cudda", r"device=cudda cannot be used \(.*\): use device=cpu"),
    ],
)
def test_what_the_model_cannot_use_is_refused(trained, override, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        ask(trained, "prompt=a", override)


def test_a_model_of_images_reads_no_text(classifier):
    message = "is of ImageClassification, which reads no text: measure it with eval.py"
    with pytest.raises(ConfigError, match=message):
        predict(compose(f"ckpt_path={classifier.folder}", "prompt=a", config="generate"))


def test_a_dense_model_has_no_experts_to_show(train, tmp_path):
    train(tmp_path / "dense" / "run", *PLAIN, "trainer.max_steps=1", experiment="gpt_dense")
    with pytest.raises(ConfigError, match="^show_experts=true: .* has no experts, as its model is dense$"):
        predict(compose(f"log_dir={tmp_path}", "prompt=a", "show_experts=true", config="generate"))


def test_what_is_unset_is_so_in_the_configuration():
    config = compose(config="generate")
    assert {key: config[key] for key in UNSET} == UNSET
    assert {key for use in USES.values() for key in use.keys} == UNSET.keys()


# -- texts ------------------------------------------------------------------------------------------------------------


def texts(**given) -> list[str]:
    return read_texts({"prompt": None, "prompt_file": None, **given}, "prompt", "a text")


@pytest.mark.parametrize("prompt", ["", [], ["a", ""], None])
def test_an_empty_prompt_is_refused(prompt):
    with pytest.raises(ConfigError, match='^prompt is empty: expected prompt="a text", .* or prompt_file=texts.txt'):
        texts(prompt=prompt)


def test_bytes_that_are_no_text_are_one_clear_line():
    message = r"^prompt 2 is not UTF-8 at character 4, '\\udce9': set the terminal to UTF-8, or write .* prompt_file"
    with pytest.raises(ConfigError, match=message):
        texts(prompt=["caf", f"caf{BYTE}"])
    assert texts(prompt="café 🙂") == ["café 🙂"]


def test_a_text_and_a_file_are_one_too_many(tmp_path):
    with pytest.raises(ConfigError, match="^prompt and prompt_file are both given: leave one of them out"):
        texts(prompt="a", prompt_file=tmp_path)


LINES = "\ufeffone\r\n\r\ntwo\u2028still two\nthree".encode()
FOUND = ["one", "", "two\u2028still two", "three"]


def test_the_lines_of_a_file(tmp_path):
    (tmp_path / "in.txt").write_bytes(LINES)
    assert texts(prompt_file=tmp_path / "in.txt") == FOUND
    (tmp_path / "in.txt").write_bytes(LINES + b"\n")
    assert texts(prompt_file=tmp_path / "in.txt") == FOUND


def test_the_lines_of_a_pipe():
    """As a shell passes ``<(...)``."""
    reading, writing = os.pipe()
    os.write(writing, LINES)
    os.close(writing)
    assert texts(prompt_file=f"/dev/fd/{reading}") == FOUND
    os.close(reading)


def test_the_lines_of_standard_input(monkeypatch):
    def stdin(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))

    for content in (LINES, LINES + b"\n"):
        stdin(content)
        assert texts(prompt_file="-") == FOUND
    stdin(b"one\nt\xe9wo\n")
    with pytest.raises(ConfigError, match=r"^prompt_file=-, line 2: not UTF-8 \(.*\); convert it"):
        texts(prompt_file="-")
    stdin(b"\n \n")
    with pytest.raises(ConfigError, match="^prompt_file=- holds no text: expected one in every line"):
        texts(prompt_file="-")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n")
    for path, message in [
        ("none.txt", "prompt_file=none.txt: there is no such file; expected a file with a text in every line, or -"),
        (tmp_path, "is a folder; expected a file with a text in every line, or - for standard input"),
        (tmp_path / "blank.txt", "blank.txt holds no text: expected one in every line"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            texts(prompt_file=path)


def test_batches_are_of_one_length():
    assert by_length({0: 5, 2: 1, 3: 5, 4: 2, 7: 1}, 2) == [[2, 7], [4, 0], [3]]


def test_tabs_are_printed_as_they_are_and_bells_not(capsys):
    print_text("all:\n\tmake\a\r")
    assert capsys.readouterr().out == "all:\n\tmake\n"
