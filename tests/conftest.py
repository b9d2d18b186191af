"""Its presence puts this folder on the import path, so that any test can import ``routing.registry``."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A text file of real English."""
    from helpers.programs import write_corpus  # here, as it imports Hydra and Lightning, which most tests do not need

    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")


@pytest.fixture(scope="session")
def tiny(corpus, tmp_path_factory) -> list[str]:
    """Overrides that make a run of a language model take seconds."""
    from helpers.programs import tiny_overrides

    return tiny_overrides(corpus, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def train(corpus, tmp_path_factory):
    """Trains an experiment in a folder, in this process, with overrides of its tiny run."""
    from helpers import programs

    cache = tmp_path_factory.mktemp("cache_of_train")

    def train(folder: Path, *overrides: str, experiment: str = "gpt_dts"):
        tiny = programs.tiny_overrides(corpus, cache, experiment)
        return programs.train(folder, f"experiment={experiment}", *tiny, *overrides)

    return train
