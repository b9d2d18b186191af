"""A parallel corpus of a few dozen sentences: the target is the source in capitals."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from evomoe.data import PairFiles
from evomoe.data.pairs.corpus import Pair, PairCorpus

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def sentences(split: str, count: int) -> list[str]:
    """Distinct sentences of two to eight words."""
    return [
        f"{split} {number} " + " ".join(WORDS[(number * i) % 10] for i in range(number % 7)) for number in range(count)
    ]


def write(stem: Path, sources: Sequence[str], targets: Sequence[str], compressed: bool = False) -> str:
    """Write `stem.en` and `stem.up`, and return the stem."""
    for language, texts in (("en", sources), ("up", targets)):
        content = "".join(f"{text}\n" for text in texts).encode()
        if compressed:
            Path(f"{stem}.{language}.gz").write_bytes(gzip.compress(content))
        else:
            Path(f"{stem}.{language}").write_bytes(content)
    return str(stem)


def write_corpus(folder: Path, pairs: int = 40) -> dict[str, str]:
    """Write three splits."""
    folder.mkdir(parents=True, exist_ok=True)
    stems = {}
    for split, count in (("train", pairs), ("val", 9), ("test", 5)):
        texts = sentences(split, count)
        stems[split] = write(folder / split, texts, [text.upper() for text in texts])
    return stems


def data_module(folder: Path, pairs: int = 40, **options: Any) -> PairFiles:
    """Return the datamodule over the corpus in `folder`, made if absent, with its cache beside it."""
    stems = write_corpus(folder / "text", pairs)
    defaults = {"context": 64, "batch_tokens": 128, "vocab_size": 300, "seed": 5, "cache_dir": folder / "cache"}
    return PairFiles("en", "up", **stems, **{**defaults, **options})


def ready(folder: Path, **options: Any) -> PairFiles:
    """Return the same, set up."""
    data = data_module(folder, **options)
    data.prepare_data()
    data.setup()
    return data


def read(corpus: PairCorpus, split: str) -> list[Pair]:
    """Read a split without a bar."""
    with Progress(disable=True) as progress:
        return list(corpus.items(split, progress))
