"""Corpora that need no download: the text of the Python packages that this project's dependencies install.

`docs` is technical English: the topics of Python's own help (`pydoc_data/topics.py`) and the docstrings of the
standard library and of PACKAGES. `code` is their source files. Files are read, never imported.
"""

from __future__ import annotations

import ast
import gc
import importlib.metadata
import importlib.util
import inspect
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from rich.progress import Progress

from evomoe.data.corpus import SPLITS, normalise, text_key, track, unit_hash
from evomoe.data.text.corpus import Corpus, Piece
from evomoe.errors import ConfigError

# Packages that torch, lightning, hydra-core, tensorboard, tokenizers and scipy bring along on every platform; each
# name is both that of the import and of the distribution, but for hydra.
PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "lightning",
    "torchmetrics",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "fsspec",
    "huggingface_hub",
    "tensorboard",
    "hydra",
    "omegaconf",
    "rich",
    "pygments",
)
_DISTRIBUTIONS = {"hydra": "hydra-core"}
_STANDARD_LIBRARY = "python"
_STANDARD_LIBRARY_FOLDER = Path(sysconfig.get_path("stdlib"))

# Tests hold little prose and are left out of some installations; the site folders lie inside the standard library.
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_TOPICS = "python/pydoc_data/topics.py"

_FORMAT = 1
_HELD_OUT = 0.02  # share of the files that go to val, and to test
_SHORTEST_TEXT = 40  # characters after normalising: shorter docstrings ("Return self.") teach nothing
_SHORTEST_PARAGRAPH = 40  # shorter ones (headings such as "Parameters ----------") may stand in several splits


@dataclass
class Source:
    """One file, or one help topic: `path` starts with the package's name and uses forward slashes everywhere."""

    path: str
    texts: list[str]

    @property
    def split(self) -> str:
        """Where the hash of the path sends it."""
        position = unit_hash(self.path)
        return "val" if position < _HELD_OUT else "test" if position < 2 * _HELD_OUT else "train"


class EmbeddedCorpus(Corpus):
    """Docstrings (`docs`) or source files (`code`) of the installed scientific Python stack.

    Splits go by file: a stable hash of the relative path sends about 96/2/2 per cent of the files to train, val and
    test. A text that occurs several times (white space aside) is kept once, where it is met first, whatever the split.
    From val and test, paragraphs that the training split also holds are cut as well, so that what the two score was
    never trained on. One file is one document.

    Args:
        kind: `docs` or `code`.
        max_bytes: Read files, in the order of another hash of their paths, until the next would exceed this many UTF-8
            bytes; None reads all.
        packages: Names of installed packages; absent ones are left out.
        standard_library: Folder of Python's own modules; None leaves them out.

    Raises:
        ConfigError: `kind` is unknown.
    """

    remedy = "raise data.max_bytes"

    def __init__(
        self,
        kind: str,
        max_bytes: int | None = None,
        packages: Sequence[str] = PACKAGES,
        standard_library: Path | None = _STANDARD_LIBRARY_FOLDER,
    ) -> None:
        if kind not in ("docs", "code"):
            raise ConfigError(f"data.corpus={kind} is unknown; use data.corpus=docs or data.corpus=code")
        self.kind = kind
        self.max_bytes = max_bytes
        self._roots = {_STANDARD_LIBRARY: standard_library} if standard_library is not None else {}
        self._versions = {_STANDARD_LIBRARY: platform.python_version()} if standard_library is not None else {}
        for package in packages:
            specification = _find_spec(package)
            if specification is None or not specification.submodule_search_locations:
                self._versions[package] = "absent"
                continue
            self._roots[package] = Path(specification.submodule_search_locations[0])
            self._versions[package] = _version(package)
        self._unreadable = 0
        self._duplicates = 0
        self._splits: dict[str, list[Source]] | None = None

    def identity(self) -> dict[str, Any]:
        """Return the options and the version of every package: the text follows from them."""
        return {
            "corpus": self.kind,
            "corpus_format": _FORMAT,
            "max_bytes": self.max_bytes,
            "packages": dict(self._versions),
        }

    def pieces(self, split: str, progress: Progress) -> Iterator[Piece]:
        """Yield the documents of a split; the first call reads every file."""
        return (Piece("\n\n".join(source.texts), ends_document=True) for source in self.splits(progress)[split])

    def splits(self, progress: Progress) -> dict[str, list[Source]]:
        """Return the files of each split with what they contribute to it; the first call reads every file.

        Args:
            progress: Where the reading is shown.
        """
        if self._splits is None:
            self._splits = _split(self._sources(progress))
        return self._splits

    def notes(self) -> dict[str, int]:
        """Count the files that could not be read or parsed, and the texts that stood twice."""
        return {"unreadable_files": self._unreadable, "duplicate_texts": self._duplicates}

    def _sources(self, progress: Progress) -> list[Source]:
        """Read every file, and return what each has to say that is neither trivial nor said before, sorted by path."""
        with _no_garbage_collection():
            files = self._files()
            if self.max_bytes is not None:
                # In an order that favours no package, until there is enough: a small corpus is read quickly.
                files.sort(key=lambda file: unit_hash(file[0], "cap"))
            sources = self._fresh(track(progress, files, len(files), f"reading {self.kind}"))
            if self.max_bytes is not None:
                sources = _cap(sources, self.max_bytes)
            return sorted(sources, key=lambda source: source.path)

    def _files(self) -> list[tuple[str, Path]]:
        """Return all source files, sorted by their path relative to the package, which is the same on every machine."""
        files = []
        for package, root in self._roots.items():
            for file in root.rglob("*.py"):
                relative = file.relative_to(root)
                if not _SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
                    files.append((f"{package}/{relative.as_posix()}", file))
        return sorted(files)

    def _fresh(self, files: Iterable[tuple[str, Path]]) -> Iterator[Source]:
        """Yield what a file has to say that is neither trivial nor said before."""
        seen: set[bytes] = set()
        for path, file in files:
            for source in self._extract(path, file):
                fresh = []
                for text in source.texts:
                    if len(normalise(text)) < _SHORTEST_TEXT:
                        continue
                    if (key := text_key(text)) in seen:
                        self._duplicates += 1
                        continue
                    seen.add(key)
                    fresh.append(text)
                if fresh:
                    yield Source(source.path, fresh)

    def _extract(self, path: str, file: Path) -> list[Source]:
        """Return the texts of a file; none, and one more in the count of unreadable files, if it cannot be parsed."""
        try:
            source = file.read_bytes()
            if self.kind == "code":
                return [Source(path, [source.decode("utf-8")])]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escape sequences in other people's strings
                module = ast.parse(source)
            if path == _TOPICS:
                return [Source(f"{path}/{name}", [text]) for name, text in _topics(module)]
            texts = list(_docstrings(module))
            "".join(texts).encode("utf-8")  # a literal may spell a lone surrogate, which has no encoding
            return [Source(path, texts)]
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            self._unreadable += 1
            return []


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Parse in less than half the time: the collector would visit millions of tree nodes, none of them in a cycle."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _find_spec(package: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of the package that should hold it
        return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(package, package))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # on the path without having been installed


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings of a module and of all classes and functions in it, in the order of the file."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield text
    for field in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, field, ()):
            # Statements only: expressions, most of the tree, hold no docstrings.
            if isinstance(child, ast.stmt | ast.excepthandler):
                yield from _docstrings(child)


def _topics(module: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the entries of the one dictionary of `pydoc_data/topics.py`."""
    for statement in module.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for name, text in ast.literal_eval(statement.value).items():
                yield name, inspect.cleandoc(text)


def _cap(sources: Iterable[Source], max_bytes: int) -> Iterator[Source]:
    for source in sources:
        max_bytes -= sum(len(text.encode()) for text in source.texts)
        if max_bytes < 0:
            return
        yield source


def _split(sources: list[Source]) -> dict[str, list[Source]]:
    splits: dict[str, list[Source]] = {split: [] for split in SPLITS}
    trained: set[bytes] = set()
    for source in sources:
        if source.split == "train":
            splits["train"].append(source)
            trained.update(text_key(paragraph) for text in source.texts for paragraph in _paragraphs(text))
    for source in sources:
        if source.split != "train":
            paragraphs = [
                paragraph
                for text in source.texts
                for paragraph in _paragraphs(text)
                if _is_short(paragraph) or text_key(paragraph) not in trained
            ]
            if not all(map(_is_short, paragraphs)):
                splits[source.split].append(Source(source.path, paragraphs))
    return splits


def _is_short(paragraph: str) -> bool:
    return len(normalise(paragraph)) < _SHORTEST_PARAGRAPH


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
