from __future__ import annotations

from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from evomoe.callbacks import TranslationSamples
from evomoe.errors import ConfigError
from evomoe.tasks.translation_scores import TranslatedSentence, TranslationScores

SENTENCES = [
    TranslatedSentence(1, "s | 1", "r 1", "h 1", "final 1"),
    TranslatedSentence(0, "s | 0", "r 0", "h 0", "h 0"),
]


def task() -> SimpleNamespace:
    scores = TranslationScores()
    for sentence in SENTENCES:
        scores.add(sentence)
    scores.compute()
    return SimpleNamespace(scores=scores, translations=scores.translations)


def shown(tmp_path, callback, logger=TensorBoardLogger, **state) -> list[tuple]:
    """What the callback writes to TensorBoard after a validation at step 7."""
    calls: list[tuple] = []
    logger = logger(tmp_path)
    logger._experiment = SimpleNamespace(add_text=lambda *arguments: calls.append(arguments))
    state = {"global_step": 7, "sanity_checking": False, "is_global_zero": True, **state}
    callback.on_validation_end(SimpleNamespace(loggers=[CSVLogger(tmp_path), logger], **state), task())
    return calls


def test_the_translations_that_come_first_in_the_split_are_shown_as_a_table(tmp_path):
    ((name, text, step),) = shown(tmp_path, TranslationSamples(count=1))
    assert (name, step) == ("translations", 7)
    assert text.splitlines() == ["| source | reference | hypothesis |", "|---|---|---|", "| s \\| 0 | r 0 | h 0 |"]


@pytest.mark.parametrize(
    "state",
    [{"logger": CSVLogger}, {"sanity_checking": True}, {"is_global_zero": False}],
    ids=lambda state: next(iter(state)),
)
def test_nothing_is_written_where_nobody_would_see_it(tmp_path, state):
    assert shown(tmp_path, TranslationSamples(), **state) == []


def test_the_translations_of_the_test_are_kept_in_the_order_of_the_split(tmp_path):
    TranslationSamples().on_test_end(SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path), task())
    lines = (tmp_path / "translations.txt").read_text().splitlines()
    assert lines[0].startswith("# BLEU nrefs:1|case:mixed|")
    assert lines[1].startswith("# chrF nrefs:1|case:mixed|")
    assert lines[2:] == ["", "S s | 0", "R r 0", "H h 0", "", "S s | 1", "R r 1", "H h 1", "H_sparse final 1"]


def test_no_sentence_to_show_is_refused():
    with pytest.raises(ConfigError, match="callbacks.translations.count=0: expected at least 1"):
        TranslationSamples(count=0)
