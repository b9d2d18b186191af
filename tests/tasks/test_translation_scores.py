from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.processes import on_two_processes

from evomoe.tasks.translation_scores import TranslatedSentence, TranslationScores

SENTENCES = [
    TranslatedSentence(0, "eins zwei drei vier", "one two three four", *["one two three four"] * 2),
    TranslatedSentence(1, "fünf sechs sieben acht", "five six seven eight", *["five six seven nine"] * 2),
]


def scores(sentences: list[TranslatedSentence]) -> TranslationScores:
    found = TranslationScores()
    for sentence in sentences:
        found.add(sentence)
    return found


@pytest.mark.parametrize(
    ("reference", "tokenizer", "warns"),
    [("今日は天気が良い", "13a", True), ("今日は天気が良い", "char", False), ("one 今 two", "13a", False)],
)
def test_bleu_of_a_language_without_blanks_is_warned_of(reference, tokenizer, warns):
    found = TranslationScores(tokenizer)
    found.add(TranslatedSentence(0, "a", reference, reference, reference))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found.compute()
    assert [f"task.bleu_tokenizer={tokenizer} cuts at blanks" in str(one.message) for one in caught] == [True] * warns


def test_hand_typed_bleu() -> None:
    # Of 8 words 7 are right, of 6 pairs 5, of 4 triples 3, of 2 quadruples 1; the lengths are equal.
    expected = 100 * (7 / 8 * 5 / 6 * 3 / 4 * 1 / 2) ** 0.25
    values = scores(SENTENCES).compute()
    assert values["bleu"] == pytest.approx(expected)
    assert values["exact_match"] == 0.5
    assert expected < values["chrf"] < 100
    best = {"bleu": pytest.approx(100), "chrf": 100, "exact_match": 1}
    assert scores(SENTENCES[:1]).compute() == best | {f"{name}_sparse": value for name, value in best.items()}


def test_both_rules_are_scored() -> None:
    """As if each were the only one."""
    first, second = SENTENCES
    values = scores([first, replace(second, sparse_hypothesis=second.reference)]).compute()
    for suffix, alone in (("", SENTENCES), ("_sparse", [first, replace(second, hypothesis=second.reference)])):
        for name in ("bleu", "chrf", "exact_match"):
            assert values[name + suffix] == scores(alone).compute()[name]
    assert values["exact_match"] == 0.5
    assert values["exact_match_sparse"] == 1


def test_nothing_is_scored_where_nothing_was_translated() -> None:
    found = scores(SENTENCES)
    found.reset()
    assert found.compute() == {}


def test_signatures_say_how() -> None:
    found = scores(SENTENCES)
    found.compute()
    assert found.bleu_signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert found.chrf_signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


def of_rank(rank: int) -> tuple[dict[str, float], list[int]]:
    """What a process of two computes that has translated the sentence of the other's number."""
    found = scores([SENTENCES[1 - rank]])
    return found.compute(), [sentence.index for sentence in found.gather()]


def test_all_processes_score_the_translations_of_all(tmp_path: Path) -> None:
    expected = scores(SENTENCES).compute()
    assert on_two_processes(of_rank, tmp_path) == [(expected, [0, 1])] * 2
