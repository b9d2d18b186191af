from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.progress import Progress

from evomoe.data.corpus import SPLITS, text_key, unit_hash
from evomoe.data.text.embedded import PACKAGES, EmbeddedCorpus
from evomoe.errors import ConfigError


def read(corpus: EmbeddedCorpus) -> dict[str, list[str]]:
    with Progress(disable=True) as progress:
        parts = {split: list(corpus.pieces(split, progress)) for split in SPLITS}
    assert all(piece.ends_document for part in parts.values() for piece in part)
    return {split: [piece.text for piece in part] for split, part in parts.items()}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package whose import would fail: the corpus must only read it."""
    folder = tmp_path / "site" / "sample_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def corpus_of(kind: str, max_bytes: int | None = None) -> EmbeddedCorpus:
    return EmbeddedCorpus(kind, max_bytes, packages=["sample_package"], standard_library=None)


def module(sentence: str) -> str:
    return f'"""{sentence}"""\n'


def path_in(split: str, number: int = 0) -> str:
    """Return the number-th file name that the hash sends to a split."""
    limits = {"val": (0, 0.02), "test": (0.02, 0.04), "train": (0.04, 1)}[split]
    names = (f"module_{i}.py" for i in range(10_000))
    fitting = [name for name in names if limits[0] <= unit_hash(f"sample_package/{name}") < limits[1]]
    return fitting[number]


LONG = "A sentence of this docstring that is certainly longer than forty characters, number"


def test_docs_are_the_docstrings_in_the_order_of_the_file(package: Path) -> None:
    (package / path_in("train")).write_text(
        f'''"""{LONG} one."""
import os

value = """{LONG} zero: a string but no docstring."""

if os:
    def function():
        """{LONG} two.

            Indented.
        """
        class Inner:
            """Return self."""
            async def method(self):
                """{LONG} three."""
else:
    try:
        pass
    except ValueError:
        def other():
            """{LONG} four."""
'''
    )
    assert read(corpus_of("docs"))["train"] == [
        f"{LONG} one.\n\n{LONG} two.\n\nIndented.\n\n{LONG} three.\n\n{LONG} four."
    ]


def test_a_file_is_sent_where_its_path_says(package: Path) -> None:
    for split in SPLITS:
        (package / path_in(split)).write_text(module(f"{LONG} {split}"))
    assert read(corpus_of("docs")) == {split: [f"{LONG} {split}"] for split in SPLITS}


def test_a_text_that_stands_twice_is_kept_once(package: Path) -> None:
    first, second = sorted([path_in("train", 0), path_in("train", 1)])
    (package / first).write_text(module(f"{LONG} one."))
    (package / second).write_text(f'"""{LONG} two."""\ndef f():\n    """{LONG}\n\n        one."""\n')
    corpus = corpus_of("docs")
    assert read(corpus)["train"] == [f"{LONG} one.", f"{LONG} two."]
    assert corpus.notes()["duplicate_texts"] == 1


@pytest.mark.parametrize("kind", ["docs", "code"])
def test_no_text_of_the_held_out_splits_is_trained_on(package: Path, kind: str) -> None:
    for number in range(300):
        functions = "\n\n".join(
            f'def f{i}():\n    """{LONG} {(number * 7 + i) % 97}.\n\n    Parameters\n    ----------\n\n'
            f'    {LONG} {(number + i * 11) % 61} again.\n    """'
            for i in range(number % 5 + 1)
        )
        (package / f"module_{number}.py").write_text(f"# {number}\n\n{functions}\n")
        (package / f"copy_{number}.py").write_text(f"#   {number}\n\n{functions}\n\n\n")
    # Where the hash happens to leave one of them empty the test would prove nothing.
    for split in ("val", "test"):
        (package / path_in(split, 1)).write_text(module(f"{LONG} only in {split}.\n\n{LONG} 3."))
    texts = read(corpus_of(kind))
    long_paragraphs = {
        split: {
            text_key(paragraph)
            for document in documents
            for paragraph in document.split("\n\n")
            if len(" ".join(paragraph.split())) >= 40
        }
        for split, documents in texts.items()
    }
    assert len(long_paragraphs["train"]) > 50
    for split in ("val", "test"):
        assert long_paragraphs[split]
        assert not long_paragraphs[split] & long_paragraphs["train"]
        assert not {text_key(text) for text in texts[split]} & {text_key(text) for text in texts["train"]}


def test_unreadable_files_are_skipped_and_counted(package: Path) -> None:
    (package / path_in("train", 0)).write_text(module(LONG))
    (package / path_in("train", 1)).write_text("def broken(:\n")
    (package / path_in("train", 2)).write_bytes(b'"""\xff\xfe is not UTF-8, and no coding is declared at all"""')
    (package / path_in("train", 3)).write_text(module(LONG + r" \ud800"))
    (package / path_in("train", 4)).symlink_to(package / "nowhere.py")
    (package / path_in("train", 5)).write_bytes(b'# coding: latin-1\n"""' + LONG.encode() + b' \xe9"""')
    corpus = corpus_of("docs")
    assert sorted(read(corpus)["train"]) == [LONG, LONG + " é"]
    assert corpus.notes()["unreadable_files"] == 4


def test_code_is_whole_files_without_the_tests(package: Path) -> None:
    (package / path_in("train")).write_text(module(LONG) + "x = 1\n")
    (package / "tests").mkdir()
    (package / "tests" / path_in("train")).write_text(module(LONG + " in a test"))
    documents = [text for part in read(corpus_of("code")).values() for text in part]
    assert documents == [module(LONG) + "x = 1\n"]


def test_help_topics_are_documents_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "lib" / "pydoc_data"
    folder.mkdir(parents=True)
    topics = {f"topic{i}": f"{LONG} {i}\n\nMore.\n" for i in range(40)}
    (folder / "topics.py").write_text(f"# generated\ntopics = {topics!r}\n")
    texts = read(EmbeddedCorpus("docs", packages=[], standard_library=tmp_path / "lib"))
    assert sorted(text for part in texts.values() for text in part) == sorted(t.strip() for t in topics.values())


def test_max_bytes_keeps_the_same_files_and_no_more_bytes(package: Path) -> None:
    for number in range(60):
        (package / f"module_{number}.py").write_text(module(f"{LONG} {number:02d}."))
    size = len(f"{LONG} 00.")
    small, large = (read(corpus_of("docs", max_bytes=limit))["train"] for limit in (20 * size, 40 * size + 1))
    assert 15 <= len(small) <= 20
    assert 30 <= len(large) <= 40
    assert set(small) < set(large)
    assert large == sorted(large, key=lambda text: f"module_{int(text[-3:-1])}.py")


def test_max_bytes_spares_the_reading_of_the_rest(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(60):
        (package / f"module_{number}.py").write_text(module(f"{LONG} {number:02d}."))
    opened: list[Path] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (opened.append(path), read_bytes(path))[1])
    read(corpus_of("docs", max_bytes=10 * len(f"{LONG} 00.")))
    assert 11 <= len(opened) <= 12  # ten, the one that was too much, and perhaps the empty __init__.py


def test_identity_names_versions_and_options(package: Path) -> None:
    corpus = EmbeddedCorpus("docs", 10, packages=["sample_package", "numpy", "no_such_package"])
    assert corpus.identity() == {
        "corpus": "docs",
        "corpus_format": 1,
        "max_bytes": 10,
        "packages": {
            "python": ".".join(map(str, sys.version_info[:3])),
            "sample_package": "unknown",
            "numpy": __import__("numpy").__version__,
            "no_such_package": "absent",
        },
    }


def test_every_package_of_the_list_is_installed_and_none_gets_imported() -> None:
    script = (
        "import sys; before = set(sys.modules)\n"
        "from evomoe.data.text.embedded import EmbeddedCorpus\n"
        "loaded = set(sys.modules)\n"
        "versions = EmbeddedCorpus('docs').identity()['packages']\n"
        "assert not {'absent', 'unknown'} & set(versions.values()), versions\n"
        "print(len(versions), sorted({name.split('.')[0] for name in set(sys.modules) - loaded} & set(versions)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"{len(PACKAGES) + 1} []"


def test_refuses_an_unknown_kind() -> None:
    with pytest.raises(ConfigError, match=r"data.corpus=prose is unknown; use data.corpus=docs or data.corpus=code"):
        EmbeddedCorpus("prose")
