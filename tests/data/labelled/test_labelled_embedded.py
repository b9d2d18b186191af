from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from rich.progress import Progress

from evomoe.data.corpus import SPLITS, text_key
from evomoe.data.labelled.corpus import Row
from evomoe.data.labelled.embedded import DocstringOrigin
from evomoe.data.text.embedded import EmbeddedCorpus
from evomoe.errors import ConfigError

FILLER = "which is long enough to be worth a row of the corpus, and says what it has to say."


def read(corpus: DocstringOrigin) -> dict[str, list[Row]]:
    with Progress(disable=True) as progress:
        return {split: list(corpus.items(split, progress)) for split in SPLITS}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages; the second has half as many files, and some paragraphs of the first."""
    for package, taste, count in (("apples", "sour", 1200), ("pears", "sweet", 600)):
        folder = tmp_path / package
        folder.mkdir()
        (folder / "__init__.py").touch()
        for number in range(count):
            own = f"Paragraph {number} of {package} is {taste}, {FILLER}"
            both = f"Paragraph {number % 200} is said several times, {FILLER}"
            code = f">>> import {package}  # {FILLER}"
            (folder / f"file_{number}.py").write_text(f'"""{own}\n\n{both}\n\n{code}\n"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_classes_are_balanced_and_no_text_stands_twice(packages: Path) -> None:
    splits = read(DocstringOrigin(["apples", "pears"]))
    keys = [text_key(row.first.lower()) for rows in splits.values() for row in rows]
    assert len(keys) == len(set(keys))
    for rows in splits.values():
        counts = Counter(row.label for row in rows)
        assert counts["apples"] == counts["pears"] > 2


def test_nothing_that_is_held_out_is_read_in_pretraining(packages: Path) -> None:
    """Neither a file that `docs` trains on, nor a paragraph that stands in one."""
    corpus = EmbeddedCorpus("docs", packages=["apples", "pears"], standard_library=None)
    with Progress(disable=True) as progress:
        pretrained = "\n\n".join(piece.text for piece in corpus.pieces("train", progress)).split("\n\n")
        trained_files = {source.path for source in corpus.splits(progress)["train"]}
    names = re.compile(r"\bapples|\bpears")
    read_before = {text_key(names.sub("", paragraph)) for paragraph in pretrained}
    splits = read(DocstringOrigin(["apples", "pears"]))
    assert {row.place for row in splits["train"]} <= trained_files
    for split in ("val", "test"):
        assert not {row.place for row in splits[split]} & trained_files
        assert not {text_key(row.first) for row in splits[split]} & read_before


def test_no_name_of_a_package_stands_in_the_text(packages: Path) -> None:
    (packages / "apples" / "file_0.py").write_text(
        f'"""Takes an :class:`Apples.core.Tree` or pears_like from np.linalg.norm, {FILLER}\n"""\n'
    )
    corpus = DocstringOrigin(["apples", "pears"])
    with Progress(disable=True) as progress:
        found = [row for rows in corpus._collect(progress).values() for row in rows]
    assert not [row for row in found if re.search("apple|pear|np", row.first, re.IGNORECASE)]
    (changed,) = (row for row in found if row.place == "apples/file_0.py")
    assert changed.first == f"Takes an :class:`` or from , {FILLER}"
    assert changed.label == "apples"


def test_a_limit_holds_for_each_class_of_the_training_split(packages: Path) -> None:
    whole, limited = (read(DocstringOrigin(["apples", "pears"], per_class)) for per_class in (None, 5))
    assert Counter(row.label for row in limited["train"]) == {"apples": 5, "pears": 5}
    assert set(limited["train"]) < set(whole["train"])
    assert limited["val"] == whole["val"]


def test_what_cannot_be_is_refused(packages: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.packages=\[apples\]: expected two or more packages"):
        DocstringOrigin(["apples"])
    with pytest.raises(ConfigError, match=r"data.packages=\[apples,pears,pears\]: expected .*, each of them once"):
        DocstringOrigin(["apples", "pears", "pears"])
    with pytest.raises(ConfigError, match=r"data.packages names none.such, which is not installed here"):
        DocstringOrigin(["apples", "none.such"])
    with pytest.raises(ConfigError, match=r"data.packages names oranges, which is not installed here"):
        DocstringOrigin(["apples", "oranges"])
    with pytest.raises(ConfigError, match=r"data.per_class=0: expected at least 1"):
        DocstringOrigin(["apples", "pears"], 0)
    message = DocstringOrigin(["apples", "pears"]).explain_empty("val")
    assert message.startswith("one of data.packages=[apples,pears] has no paragraph for val, as few of its files are")
