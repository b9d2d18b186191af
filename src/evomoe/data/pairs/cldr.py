"""An embedded parallel corpus: dates, times, numbers, amounts and lists as two languages really write them.

The Unicode Common Locale Data Repository says how; Babel, which carries it, writes both sides. No download.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

import babel
from babel import Locale, UnknownLocaleError, dates, lists, numbers, units
from rich.progress import Progress

from evomoe.data.corpus import track, unit_hash
from evomoe.data.pairs.corpus import Pair, PairCorpus
from evomoe.errors import ConfigError

_CORPUS_FORMAT = 1
_HELD_OUT = 0.02  # of the pairs, for each of validation and test

# Common ones, so that a word is seen often enough to be learnt: what is new in the test are their combinations.
_TERRITORIES = (
    "AR AT AU BE BR CA CH CL CN CZ DE DK EG ES FI FR GB GR HU IE IN IT JP KE KR MX NL NO PE PL PT RO SE TR US"
)
_CURRENCIES = "AUD BRL CAD CHF CNY CZK DKK EUR GBP HUF INR JPY KRW MXN NOK PLN SEK TRY USD"
_UNITS = (
    "length-millimeter length-centimeter length-meter length-kilometer length-mile length-inch mass-gram mass-kilogram "
    "mass-ounce mass-pound volume-liter volume-milliliter volume-cubic-meter area-hectare area-square-meter "
    "speed-kilometer-per-hour speed-mile-per-hour speed-meter-per-second temperature-celsius temperature-fahrenheit "
    "duration-second duration-minute duration-hour duration-day duration-week duration-month duration-year "
    "digital-byte digital-megabyte digital-gigabyte power-watt power-kilowatt energy-kilowatt-hour pressure-bar"
)

Writer = Callable[[Locale], str]
"""Writes one thing in a language."""


class LocalePairs(PairCorpus):
    """Things drawn at random and written in two languages: a date, a time, a number, an amount, a measure, a list.

    A draw decides what is written, and both languages write it. Sources are distinct, so that no test sentence is a
    training sentence, and one that would have two translations is left out, as is what a language cannot write: of a
    third of them CLDR lacks names of countries, and so some or all lists. The hash of the source decides the split.

    Args:
        source: Language that is translated from, as a CLDR locale such as `en` or `pt_BR`.
        target: Language that is translated to.
        pairs: Draws; a few less become pairs.

    Raises:
        ConfigError: Babel does not know a language.
    """

    def __init__(self, source: str = "en", target: str = "de", pairs: int = 60_000) -> None:
        super().__init__(source, target)
        if pairs < 1:
            raise ConfigError(f"data.pairs={pairs}: expected at least 1")
        self._draws = pairs
        self._locales = _locale("source", source), _locale("target", target)
        self._splits: dict[str, list[Pair]] | None = None
        self._unwritten = 0

    def identity(self) -> dict[str, Any]:
        """Return the languages, the number of draws, and the version of Babel."""
        return {
            "corpus": "locale_pairs",
            "corpus_format": _CORPUS_FORMAT,
            "source": self.source,
            "target": self.target,
            "pairs": self._draws,
            "babel": babel.__version__,
        }

    def explain_empty(self, split: str) -> str:
        """Say that more pairs are needed."""
        return f"data.pairs={self._draws} leaves no pair for the {split} split: draw more"

    def notes(self) -> dict[str, int]:
        """Return how many draws were left out because a language cannot write them."""
        unwritten = {"draws left out that CLDR cannot write in a language": self._unwritten} if self._unwritten else {}
        return super().notes() | unwritten

    def _read(self, split: str, progress: Progress) -> Iterator[Pair]:
        if self._splits is None:
            self._splits = self._write(progress)
        return iter(self._splits[split])

    def _write(self, progress: Progress) -> dict[str, list[Pair]]:
        draw = _Draw(random.Random(0))
        translations: dict[str, str | None] = {}
        for _ in track(progress, range(self._draws), self._draws, "writing pairs"):
            writer = draw()
            try:
                source, target = (writer(locale) for locale in self._locales)
            except KeyError:  # a word that CLDR does not have in one of the languages
                self._unwritten += 1
            else:
                translations[source] = target if translations.get(source, target) == target else None
        splits: dict[str, list[Pair]] = {"train": [], "val": [], "test": []}
        for source, translation in translations.items():
            if translation is not None:
                place = int(unit_hash(source, "holdout") / _HELD_OUT)
                splits[("val", "test")[place] if place < 2 else "train"].append(Pair(source, translation))
        return splits


class _Draw:
    """Draws what to write; the same in all languages."""

    def __init__(self, source: random.Random) -> None:
        self._random = source

    def __call__(self) -> Writer:
        return self._random.choice(self._kinds)()

    @cached_property
    def _kinds(self) -> list[Callable[[], Writer]]:
        return [self._date, self._time, self._interval, self._number, self._amount, self._measure, self._list]

    def _moment(self) -> datetime:
        return datetime(1900, 1, 1) + timedelta(minutes=self._random.randrange(200 * 365 * 24 * 60))

    def _value(self) -> float:
        digits = self._random.choice([1, 2, 3, 4])
        return round(self._random.uniform(1, 10**digits), self._random.choice([0, 0, 1, 2]))

    def _date(self) -> Writer:
        day, length = self._moment().date(), self._random.choice(["full", "long", "short"])
        return lambda locale: dates.format_date(day, length, locale=locale)

    def _time(self) -> Writer:
        moment, length = self._moment(), self._random.choice(["short", "medium"])
        if self._random.random() < 0.5:
            return lambda locale: dates.format_time(moment, length, locale=locale)
        return lambda locale: dates.format_datetime(moment, "short", locale=locale)

    def _interval(self) -> Writer:
        first = self._moment().date()
        last = first + timedelta(days=self._random.randint(1, 60))
        return lambda locale: dates.format_interval(first, last, "yMMMd", locale=locale)

    def _number(self) -> Writer:
        kind = self._random.choice(["plain", "plain", "compact", "percent"])
        if kind == "percent":
            share = round(self._random.uniform(0, 2), 4)
            return lambda locale: numbers.format_percent(share, locale=locale, decimal_quantization=False)
        if kind == "compact":
            large = self._random.uniform(1000, 10 ** self._random.randint(4, 10))
            return lambda locale: _compact(large, locale)
        value = round(self._random.uniform(1, 10 ** self._random.randint(1, 9)), self._random.choice([0, 1, 2, 3]))
        return lambda locale: numbers.format_decimal(value, locale=locale)

    def _amount(self) -> Writer:
        value, currency = self._value(), self._random.choice(_CURRENCIES.split())
        kind = self._random.choice(["standard", "name"])
        return lambda locale: numbers.format_currency(value, currency, locale=locale, format_type=kind)  # type: ignore[arg-type]

    def _measure(self) -> Writer:
        value, unit = self._value(), self._random.choice(_UNITS.split())
        length = self._random.choice(["long", "short"])
        return lambda locale: units.format_unit(value, unit, length, locale=locale)  # type: ignore[arg-type]

    def _list(self) -> Writer:
        codes = self._random.sample(_TERRITORIES.split(), self._random.randint(2, 4))
        style = self._random.choice(["standard", "or"])
        return lambda locale: lists.format_list([locale.territories[code] for code in codes], style, locale=locale)  # type: ignore[arg-type]


def _compact(value: float, locale: Locale) -> str:
    """Write `1.2 million`; as short as `120万` in a language that has no longer way."""
    length: Any = "long" if "long" in locale.compact_decimal_formats else "short"
    return numbers.format_compact_decimal(value, format_type=length, fraction_digits=1, locale=locale)


def _locale(key: str, name: str) -> Locale:
    try:
        return Locale.parse(name)
    except (UnknownLocaleError, ValueError):
        raise ConfigError(
            f"data.{key}={name} is no language of CLDR: expected a locale such as en, de or pt_BR"
        ) from None
