from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.programs import PLAIN, compose

from evomoe.cli import quote_text
from evomoe.errors import ConfigError, EvomoeWarning
from evomoe.models.beam_search import LengthLimit, beam_search
from evomoe.models.transformer import Transformer
from evomoe.prediction import predict
from evomoe.prediction.translations import trace_translation
from evomoe.restoring import restore
from evomoe.routing import SoftMoE, Switch

SENTENCES = ["Return the value.", "If it is, print", "The"]
LONG = "again " * 40


@pytest.fixture(scope="module")
def translate(train, tmp_path_factory) -> Callable[..., list[str]]:
    """Asks a model that translates, with a beam of 2."""
    logs = tmp_path_factory.mktemp("translations")
    few = ["trainer.max_steps=4", "trainer.val_check_interval=4"]
    values, _ = train(logs / "run", *PLAIN[:2], *few, experiment="mt_dts")
    assert {"test/bleu", "test/chrf_sparse", "test/exact_match", "val/bleu", "val/loss_sparse"} <= values.keys()

    def translate(*overrides: str) -> list[str]:
        return predict(compose(f"log_dir={logs}", "beam=2", *overrides, config="generate"))

    translate.logs = logs
    return translate


@pytest.fixture
def file(tmp_path) -> Callable[..., str]:
    """Writes a file of sentences; returns the override that gives it."""

    def file(*sentences: str) -> str:
        (tmp_path / "in.txt").write_text("\n".join(sentences) + "\n")
        return f"source_file={tmp_path / 'in.txt'}"

    return file


def test_sentences_are_translated(translate, file, capsys, monkeypatch):
    all_at_once = translate(file(*SENTENCES))
    assert capsys.readouterr().out.split("\n")[:-1] == all_at_once
    assert all_at_once == translate(file(*SENTENCES), "batch_size=1")
    assert all_at_once[1] == translate('source="If it is, print"')[0]
    capsys.readouterr()
    best = translate(file(*SENTENCES), "n_best=2")
    listed = re.findall(r"^(\d) \|\|\| (.*?) \|\|\| (-\d+\.\d{3})$", capsys.readouterr().out, re.MULTILINE | re.DOTALL)
    assert [number for number, _, _ in listed] == ["0", "0", "1", "1", "2", "2"]
    assert [text for _, text, _ in listed[::2]] == best
    assert all(float(first[2]) >= float(second[2]) for first, second in zip(listed[::2], listed[1::2], strict=True))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # a terminal, for rich
    translate("source=The", "n_best=2")
    assert len(re.findall(r"│ -\d+\.\d{3} ", capsys.readouterr().out)) == 2


def test_blank_lines_keep_their_places(translate, file, capsys):
    all_at_once = translate(file(*SENTENCES))
    capsys.readouterr()
    expected = ["", all_at_once[0], "", *all_at_once[1:]]
    assert translate(file("", SENTENCES[0], " ", *SENTENCES[1:])) == expected
    assert capsys.readouterr().out == "\n".join(expected) + "\n"
    translate(file("", SENTENCES[0], " ", *SENTENCES[1:]), "n_best=2")
    assert re.findall(r"^(\d) \|\|\|", capsys.readouterr().out, re.MULTILINE) == ["1", "1", "3", "3", "4", "4"]


def test_sentences_that_are_too_long(translate, file):
    first, last = translate('source=["Return the value.","The"]')
    sentences = file(SENTENCES[0], LONG, "The")
    message = (
        r"sentence 2 has \d+ tokens, its end included, and the model reads 32: .* too_long=truncate or too_long=drop"
    )
    with pytest.raises(ConfigError, match=message):
        translate(sentences)
    with pytest.warns(
        EvomoeWarning, match="^1 of 3 sentences have more than the 32 tokens .*: too_long=drop for number 2$"
    ):
        assert translate(sentences, "too_long=drop") == [first, "", last]
    tokenizer = restore("last", str(translate.logs)).tokenizer
    (cut,) = translate(quote_text(f"source={tokenizer.decode(tokenizer.encode(LONG)[:31])}"))
    with pytest.warns(EvomoeWarning, match="too_long=truncate for number 2$"):
        assert translate(sentences, "too_long=truncate") == [first, cut, last]
    with pytest.raises(ConfigError, match="too_long=cut is unknown: expected one of refuse, truncate, drop"):
        translate("source=a", "too_long=cut")


def test_the_longest_length_of_the_task_may_be_changed(translate, monkeypatch):
    limits = []

    def search(*args: Any, max_length: LengthLimit, **options: Any) -> Any:
        limits.append(max_length)
        return beam_search(*args, max_length=max_length, **options)

    monkeypatch.setattr("evomoe.prediction.translations.beam_search", search)
    (free,) = translate("source=The")
    (short,) = translate("source=The", "max_length_offset=3")
    assert len(short) < len(free)
    translate("source=The", "max_length_ratio=0.5", "max_length_offset=3")
    assert limits == [LengthLimit(), LengthLimit(offset=3), LengthLimit(0.5, 3)]
    monkeypatch.setattr("evomoe.tasks.translation.LengthLimit", lambda ratio, offset: LengthLimit(2.0, 7))
    translate("source=The", "max_length_offset=3")  # of a task that has a limit of its own
    assert limits[-1] == LengthLimit(2.0, 3)
    with pytest.raises(ConfigError, match="max_length_offset=-1: expected a whole number of 0 or above"):
        translate("source=a", "max_length_offset=-1")


def test_the_experts_of_both_stacks_are_shown(translate, capsys):
    tokenizer = restore("last", str(translate.logs)).tokenizer
    (text,) = translate("source=Return", "show_experts=true", "max_length_offset=4")
    head, source, target = re.split(r" (?:source|translation) +\n", capsys.readouterr().out)
    assert text in head
    for part, name, count in ((source, "encoder_1", len(tokenizer.encode("Return")) + 1), (target, "decoder_1", None)):
        assert name in part
        rows = re.findall(r"│ [0-3]:[01]\.\d\d", part)
        assert len(rows) == count if count else 1 <= len(rows) <= 5


@pytest.mark.parametrize("encoder", [partial(Switch, capacity_factor=None), SoftMoE])
def test_traces_are_those_of_the_forward_pass(encoder):
    torch.manual_seed(0)
    model = Transformer(20, 8, 8, 2, 2, num_experts=3, router=encoder, decoder_router=Switch).eval()
    source, target = [3, 4, 5, 1], [1, 7]
    traces = trace_translation(model, source, target)
    _, routings = model(torch.tensor([source]), torch.tensor([target]))
    for trace, name, routing in zip(traces, ("encoder_1", "decoder_1"), routings, strict=True):
        assert list(trace) == [name]
        weights = torch.zeros(len(trace[name]), 3)
        for token, pairs in enumerate(trace[name]):
            for expert, weight in pairs:
                weights[token, expert] = weight
        torch.testing.assert_close(weights, routing.to_dense().detach())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], 'source is empty: expected source="a sentence", source=.* or source_file=texts.txt'),
        (["source=a", "source_file=b"], "source and source_file are both given"),
        (["source=[]"], "^source is empty"),
        (['source=[12,"x"]'], r'^source holds 12, which is no text to Hydra: put it in quotes, as in source=\["12"\]$'),
        (["prompt=a"], "prompt is for a model that continues texts or .*, and .* translates: give source"),
        (["source=a", "n_best=3"], r"n_best=3: expected 1 to beam=2"),
        (["source=a", "top_k=3"], r"top_k is for a model that continues texts, and .* translates: leave it out"),
    ],
)
def test_what_cannot_be_translated_is_refused(translate, overrides, message):
    with pytest.raises(ConfigError, match=message):
        translate(*overrides)
