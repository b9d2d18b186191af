"""A labelled corpus small enough to look through, as files of GLUE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evomoe.data import GlueFiles

WORDS = ("red", "green", "blue", "warm", "cold", "near", "far", "old")


def write_table(path: Path, header: str, *lines: str) -> Path:
    """A tab-separated file; ``|`` stands for a tab."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in (header, *lines)).replace("|", "\t"), encoding="utf-8")
    return path


def write_splits(folder: Path, pairs: bool = False) -> dict[str, str]:
    """Three files of which the label is whether the last word of the row is among the first half of ``WORDS``."""
    paths = {}
    for split, count in (("train", 26), ("val", 7), ("test", 5)):
        lines = []
        for number in range(count):
            words = [WORDS[(number * 3 + place + len(split)) % len(WORDS)] for place in range(1 + number % 4)]
            label = int(WORDS.index(words[-1]) < 4)
            first, second = f"{split} {number} is", " ".join(words)
            lines.append(f"{first}|{second}|{label}" if pairs else f"{first} {second}|{label}")
        header = "sentence1|sentence2|label" if pairs else "sentence|label"
        paths[split] = str(write_table(folder / f"{split}.tsv", header, *lines))
    return paths


def data_module(folder: Path, pairs: bool = False, **options: Any) -> GlueFiles:
    """The datamodule over the corpus in ``folder``, written if absent, with its cache beside it."""
    name = "pairs" if pairs else "single"
    defaults = {"context": 24, "batch_size": 4, "vocab_size": 300, "seed": 5, "cache_dir": folder / "cache"}
    return GlueFiles(**write_splits(folder / name, pairs), **{**defaults, **options})


def ready(folder: Path, **options: Any) -> GlueFiles:
    """The same, set up."""
    data = data_module(folder, **options)
    data.prepare_data()
    data.setup()
    return data
