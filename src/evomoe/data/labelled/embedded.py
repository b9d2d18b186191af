"""A classification corpus that needs no download: which installed package a paragraph of documentation comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rich.progress import Progress

from evomoe.data.corpus import SPLITS, normalise, text_key, unit_hash
from evomoe.data.labelled.corpus import LabelledCorpus, Row
from evomoe.data.text.embedded import EmbeddedCorpus
from evomoe.errors import ConfigError

PACKAGES = ("networkx", "numpy", "scipy", "sympy", "torch")
"""Those of `evomoe.data.text.embedded.PACKAGES` that document the most; each has its own subject and its own habits."""

ALIASES = ("np", "nx", "sp", "sps", "plt", "fft", "linalg")
"""Names under which documentation imports them, or that stand in the path of a few of them."""

_FORMAT = 2
_VAL = 0.4  # share of the held-out paragraphs that are val; the others are the test
_SHORTEST = 60  # characters of a paragraph without the names
# Examples and markup, and sections, whose underlined titles tell a style of writing rather than a subject.
_CODE = re.compile(r"^\s*(>>>|\.\.\s|:|[-=~]{3,}\s*$)|::\s*$", re.MULTILINE)


class DocstringOrigin(LabelledCorpus):
    """Paragraphs of docstrings, labelled with the package that they document.

    All words that hold the name of one of the packages are taken out of every paragraph, as are their usual aliases
    with what follows the point: the label never stands in the text. Training reads the files that `docs` trains on, and
    val and test share out what it holds out: a model that was pretrained on `docs` has read none of it. A paragraph
    that occurs twice anywhere (white space and case aside) is kept once, for training if it stands there. In every
    split each package has as many paragraphs as the others: those of the smallest hash of their text.

    Args:
        packages: Names of installed packages, the classes.
        per_class: Most paragraphs of each package in the training split; None for as many as there are.

    Raises:
        ConfigError: There are less than two packages, or one is not installed.
    """

    def __init__(self, packages: Sequence[str] = PACKAGES, per_class: int | None = None) -> None:
        if not 2 <= len(set(packages)) == len(packages):
            raise ConfigError(f"data.packages=[{','.join(packages)}]: expected two or more packages, each of them once")
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
        """Return the options, the version of every package and that of `docs`: the rows follow from them."""
        docs = self._corpus.identity()
        return {
            "corpus": "docstring_packages",
            "corpus_format": _FORMAT,
            "docs_format": docs["corpus_format"],
            "per_class": self._per_class,
            "packages": docs["packages"],
        }

    def explain_empty(self, split: str) -> str:
        """Say that a package is too small."""
        return (
            f"one of data.packages=[{','.join(self._packages)}] has no paragraph for {split}, as few of its files are "
            "held out: choose packages with more documentation"
        )

    def _read(self, split: str, progress: Progress) -> Iterator[Row]:
        if self._splits is None:
            self._splits = self._balance(self._collect(progress))
        return iter(self._splits[split])

    def _collect(self, progress: Progress) -> dict[tuple[bool, str], list[Row]]:
        """Return the paragraphs by whether they are for training, and by package."""
        found: dict[tuple[bool, str], list[Row]] = {
            (trains, package): [] for trains in (True, False) for package in self._packages
        }
        seen: set[bytes] = set()
        sources = self._corpus.splits(progress)
        # Training first: what also stands there is not held out.
        for source in (source for split in SPLITS for source in sources[split]):
            package = source.path.partition("/")[0]
            for paragraph in (part for text in source.texts for part in text.split("\n\n")):
                if _CODE.search(paragraph):
                    continue
                text = normalise(self._names.sub("", paragraph))
                key = text_key(text.lower())
                if len(text) >= _SHORTEST and key not in seen:
                    seen.add(key)
                    found[source.split == "train", package].append(Row(text, None, package, source.path))
        return found

    def _balance(self, found: dict[tuple[bool, str], list[Row]]) -> dict[str, list[Row]]:
        def rounds(trains: bool) -> list[tuple[Row, ...]]:
            """Return one paragraph of each package at a time, until the smallest has no more."""
            ranked = (
                sorted(found[trains, package], key=lambda row: unit_hash(row.first)) for package in self._packages
            )
            return list(zip(*ranked, strict=False))

        train, held_out = rounds(True)[: self._per_class], rounds(False)
        count = round(_VAL * len(held_out))
        splits = {"train": train, "val": held_out[:count], "test": held_out[count:]}
        return {split: [row for rows in part for row in rows] for split, part in splits.items()}
