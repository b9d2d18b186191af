"""A classification corpus that needs no download: which installed package a paragraph of documentation comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rich.progress import Progress

from evomoe.data.corpus import SPLITS, normalise, text_key, unit_hash
from evomoe.data.embedded import EmbeddedCorpus
from evomoe.data.labelled import LabelledCorpus, Row
from evomoe.errors import ConfigError

PACKAGES = ("networkx", "numpy", "scipy", "sympy", "torch")
"""Those of `evomoe.data.embedded.PACKAGES` that document the most; each has its own subject and its own habits."""

ALIASES = ("np", "nx", "sp", "sps", "plt", "fft", "linalg")
"""Names under which documentation imports them, or that stand in the path of a few of them."""

_FORMAT = 1
_HELD_OUT = 0.15  # share of the files that go to val, and to test
_SHORTEST = 60  # characters of a paragraph without the names
# Examples and markup, and sections, whose underlined titles tell a style of writing rather than a subject.
_CODE = re.compile(r"^\s*(>>>|\.\.\s|:|[-=~]{3,}\s*$)|::\s*$", re.MULTILINE)


class DocstringOrigin(LabelledCorpus):
    """Paragraphs of docstrings, labelled with the package that they document.

    All words that hold the name of one of the packages are taken out of every paragraph, as are their usual aliases
    with what follows the point: the label never stands in the text. Splits go by file, by a stable hash of the relative
    path; a paragraph that occurs twice anywhere (white space and case aside) is kept once. In every split each package
    has as many paragraphs as the others: those of the smallest hash of their text.

    Args:
        packages: Names of installed packages, the classes.
        per_class: Most paragraphs of each package in the training split; None for as many as there are.

    Raises:
        ConfigError: There are less than two packages, or one is not installed.
    """

    def __init__(self, packages: Sequence[str] = PACKAGES, per_class: int | None = None) -> None:
        super().__init__()
        if len(set(packages)) < 2:
            raise ConfigError(f"data.packages=[{','.join(packages)}]: expected at least two packages to tell apart")
        if per_class is not None and per_class < 1:
            raise ConfigError(f"data.per_class={per_class}: expected at least 1 paragraph of each package, or null")
        self._corpus = EmbeddedCorpus("docs", packages=packages, standard_library=None)
        for package, version in self._corpus.identity()["packages"].items():
            if version == "absent":
                raise ConfigError(f"data.packages names {package}, which is not installed here")
        self._packages = tuple(packages)
        self._per_class = per_class
        self._names = re.compile(
            rf"[\w.]*(?:{'|'.join(map(re.escape, packages))})[\w.]*|\b(?:{'|'.join(ALIASES)})\.[\w.]+", re.IGNORECASE
        )
        self._splits: dict[str, list[Row]] | None = None

    def identity(self) -> dict[str, Any]:
        """Return the options and the version of every package: the rows follow from them."""
        return {
            "corpus": "docstring_packages",
            "corpus_format": _FORMAT,
            "per_class": self._per_class,
            "packages": self._corpus.identity()["packages"],
        }

    def _read(self, split: str, progress: Progress) -> Iterator[Row]:
        if self._splits is None:
            self._splits = self._balance(self._collect(progress))
        return iter(self._splits[split])

    def _collect(self, progress: Progress) -> dict[tuple[str, str], list[Row]]:
        """Return the paragraphs by split and package."""
        found: dict[tuple[str, str], list[Row]] = {(s, package): [] for s in SPLITS for package in self._packages}
        seen: set[bytes] = set()
        for source in self._corpus.sources(progress):
            package = source.path.partition("/")[0]
            for paragraph in (part for text in source.texts for part in text.split("\n\n")):
                if _CODE.search(paragraph):
                    continue
                text = normalise(self._names.sub("", paragraph))
                key = text_key(text.lower())
                if len(text) >= _SHORTEST and key not in seen:
                    seen.add(key)
                    found[_split_of(source.path), package].append(Row(text, None, package, source.path))
        return found

    def _balance(self, found: dict[tuple[str, str], list[Row]]) -> dict[str, list[Row]]:
        splits = {}
        for split in SPLITS:
            count = min(len(found[split, package]) for package in self._packages)
            if split == "train" and self._per_class is not None:
                count = min(count, self._per_class)
            ranked = (sorted(found[split, package], key=lambda row: unit_hash(row.first)) for package in self._packages)
            splits[split] = [row for rows in zip(*(rows[:count] for rows in ranked), strict=True) for row in rows]
        return splits


def _split_of(path: str) -> str:
    position = unit_hash(path, "labelled")
    return "val" if position < _HELD_OUT else "test" if position < 2 * _HELD_OUT else "train"
