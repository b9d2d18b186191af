from __future__ import annotations

import re
from datetime import datetime

import pytest
from babel.localedata import locale_identifiers
from data.tiny_pairs import read

from evomoe.data.corpus import SPLITS
from evomoe.data.pairs.cldr import LocalePairs
from evomoe.data.pairs.corpus import Pair
from evomoe.errors import ConfigError


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Pair]]:
    corpus = LocalePairs("en", "de", pairs=6000)
    return {split: read(corpus, split) for split in SPLITS}


def test_no_test_sentence_is_a_training_sentence_nor_has_two_translations(splits: dict[str, list[Pair]]) -> None:
    sources = [pair.source for part in splits.values() for pair in part]
    assert len(set(sources)) == len(sources)
    assert 4500 < len(splits["train"]) < 6000
    assert all(0.01 < len(splits[split]) / len(sources) < 0.03 for split in ("val", "test"))


def test_numbers_change_commas_and_points(splits: dict[str, list[Pair]]) -> None:
    numbers = [pair for pair in splits["train"] if re.fullmatch(r"[\d.,]+", pair.source)]
    assert len(numbers) > 200
    for pair in numbers:
        assert pair.target == pair.source.translate(str.maketrans(",.", ".,"))


def test_dates_and_times_mean_the_same(splits: dict[str, list[Pair]]) -> None:
    checked = 0
    for pair in splits["train"]:
        if re.fullmatch(r"\d+/\d+/\d\d, \d+:\d\d\u202f[AP]M", pair.source):
            english = datetime.strptime(pair.source.replace("\u202f", " "), "%m/%d/%y, %I:%M %p")
            assert pair.target == english.strftime("%d.%m.%y, %H:%M")
            checked += 1
    assert checked > 50


@pytest.mark.parametrize(
    ("kind", "source", "target"),
    [
        ("interval", r"Mar \d+\u2009\u2013\u2009\d+, \d{4}", r"\d+\.\u2013\d+\. März \d{4}"),
        ("date", r"\w+day, October \d+, \d{4}", r"\w+, \d+\. Oktober \d{4}"),
        ("amount", r"[\d,.]+ Swiss francs", r"[\d.,]+ Schweizer Franken"),
        ("measure", r"[\d,.]+ kilometers per hour", r"[\d.,]+ Kilometer pro Stunde"),
        ("list", r"(.+), and Spain", r"(.+) und Spanien"),
        ("number", r"[\d.]+%", r"[\d,]+\xa0%"),
    ],
)
def test_all_kinds_are_there_as_the_languages_write_them(
    splits: dict[str, list[Pair]], kind: str, source: str, target: str
) -> None:
    found = [pair for pair in splits["train"] if re.fullmatch(source, pair.source)]
    assert found, kind
    assert all(re.fullmatch(target, pair.target) for pair in found)


def test_the_pairs_follow_from_the_identity() -> None:
    first, again = (LocalePairs("fr", "ja", pairs=300) for _ in range(2))
    assert first.identity() == again.identity()
    assert [read(first, split) for split in SPLITS] == [read(again, split) for split in SPLITS]
    assert LocalePairs("ja", "fr", pairs=300).identity() != first.identity()


@pytest.mark.parametrize(("target", "lists"), [("rw", False), ("sa", True), ("yi", True)])
def test_what_a_language_cannot_write_is_left_out(target: str, lists: bool) -> None:
    """CLDR names no country in Kinyarwanda, some in Sanskrit, and most in Yiddish."""
    corpus = LocalePairs("en", target, pairs=4000)
    train = read(corpus, "train")
    assert len(train) > 3000
    assert any(re.search(r", (and|or) \w+$|\w (and|or) \w+$", pair.source) for pair in train) == lists
    ((what, count),) = corpus.notes().items()
    assert what == "draws left out that CLDR cannot write in a language"
    assert 10 < count < 700


def test_every_language_of_cldr_can_be_written() -> None:
    languages = [name for name in locale_identifiers() if "_" not in name and name != "en"]
    assert len(languages) > 300
    for language in languages:
        assert len(read(LocalePairs("en", language, pairs=60), "train")) > 40


def test_errors_are_one_line_with_the_value() -> None:
    with pytest.raises(ConfigError, match=r"data.target=xx_YY is no language of CLDR: expected a locale such as en"):
        LocalePairs("en", "xx_YY")
    with pytest.raises(ConfigError, match=r"data.source=de and data.target=de are one language"):
        LocalePairs("de", "de")
    with pytest.raises(ConfigError, match=r"data.pairs=0: expected at least 1"):
        LocalePairs(pairs=0)
    assert LocalePairs(pairs=3).explain_empty("val") == "data.pairs=3 leaves no pair for the val split: draw more"
