from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from helpers.programs import PLAIN, compose

from evomoe.data.labelled.batches import join
from evomoe.errors import ConfigError, EvomoeWarning
from evomoe.prediction import predict
from evomoe.restoring import restore

SHORT = ["trainer.max_steps=4", "trainer.val_check_interval=4"]


@pytest.fixture(scope="module")
def ask(train, tmp_path_factory) -> Callable[..., list[str]]:
    """Asks a classifier of single sentences."""
    logs = tmp_path_factory.mktemp("labels")
    train(logs / "run", *PLAIN, *SHORT, experiment="glue_switch")

    def ask(*overrides: str) -> list[str]:
        return predict(compose(f"log_dir={logs}", *overrides, config="generate"))

    ask.restored = restore("last", str(logs))
    return ask


def shares(ask, sentence: str) -> tuple[str, float]:
    """The likeliest class of one sentence alone, and its probability."""
    tokenizer = ask.restored.tokenizer
    ids = join(tokenizer.encode(sentence), None, tokenizer.end_of_text_id, 32)
    with torch.no_grad():
        share, index = ask.restored.task(torch.tensor([ids])).softmax(dim=1)[0].max(dim=0)
    return ask.restored.data_state["classes"][int(index)], float(share)


def test_a_file_is_answered_line_by_line(ask, tmp_path, capsys):
    """As the unlabelled tests of GLUE are."""
    sentences = ["Return the value.", "", "The", "If it is, print the whole of it", " ", "again " * 40]
    (tmp_path / "in.txt").write_text("\n".join(sentences) + "\n")
    expected = [shares(ask, sentence) if sentence.strip() else None for sentence in sentences]
    for size in (1, 3):
        with pytest.warns(
            EvomoeWarning, match="^1 of 4 texts have more than the 32 tokens .* cut; the first is number 6"
        ):
            answers = ask(f"prompt_file={tmp_path / 'in.txt'}", f"batch_size={size}")
        lines = capsys.readouterr().out.split("\n")[:-1]
        assert answers == [found[0] if found else "" for found in expected]
        assert len(lines) == len(sentences)
        for line, found in zip(lines, expected, strict=True):
            if found is None:
                assert line == ""
            else:
                name, probability = line.split("\t")
                assert (name, float(probability)) == (found[0], pytest.approx(found[1], abs=1e-4))


def test_a_terminal_shows_all_classes_and_experts_on_demand(ask, capsys, monkeypatch):
    ask("prompt=Return", "show_experts=true")
    tables = capsys.readouterr().out
    rows = re.findall(r'│ "(.*)" +│ [0-3]:[01]\.\d\d +│$', tables, re.MULTILINE)
    assert len(rows) == len(ask.restored.tokenizer.encode("Return")) + 2  # with its markers
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # a terminal, for rich
    ask("prompt=Return")
    shown = capsys.readouterr().out
    assert len(re.findall(r"\d\.\d%", shown)) == 2
    assert not re.search(r"\d:\d\.\d\d", shown)


def test_pairs_come_from_two_files(train, tmp_path, capsys):
    rows = [f"first {number}\tsecond {number % 7}\t{number % 5 / 2}" for number in range(80)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n")
    data = [f"data.train={tmp_path / 'pairs.tsv'}", "data.regression=true", "task.metrics=[pearson,spearman]"]
    train(tmp_path / "run", *PLAIN, *SHORT, *data, experiment="glue_switch")
    for name, texts in (("one", ["a", "", "c"]), ("two", ["d", "e", "f"])):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts) + "\n")

    def ask(*overrides: str) -> list[str]:
        return predict(compose(f"ckpt_path={tmp_path / 'run'}", *overrides, config="generate"))

    first, third = ask("prompt=[a,c]", "second=[d,f]")
    capsys.readouterr()
    answers = ask(f"prompt_file={tmp_path / 'one.txt'}", f"second_file={tmp_path / 'two.txt'}")
    assert answers == [first, "", third]
    assert capsys.readouterr().out == f"{first}\n\n{third}\n"
    (tmp_path / "two.txt").write_text("d\ne\n")
    with pytest.raises(ConfigError, match="prompt has 3 texts and second has 2: give as many of both"):
        ask(f"prompt_file={tmp_path / 'one.txt'}", f"second_file={tmp_path / 'two.txt'}")


def test_a_second_sentence_is_for_pairs(ask):
    for key in ("second", "second_file"):
        with pytest.raises(ConfigError, match=f"{key} is for pairs, and .* classifies single sentences: leave it out"):
            ask("prompt=a", f"{key}=b")
