"""Its presence puts this folder on the import path, so that any test can import ``routing.registry``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.register_assert_rewrite("routing.checks")  # so that its assertions show their values


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


@pytest.fixture(scope="session")
def trained(train, tmp_path_factory) -> SimpleNamespace:
    """A run of all three phases with all callbacks, left as it ended."""
    logs = tmp_path_factory.mktemp("logs")
    folder = logs / "gpt_dts" / "first"
    plan = [
        "evolution.diversify=7",
        "evolution.harden=13",
        "evolution.temperature.length=6",
        "evolution.noise.length=6",
    ]
    saves = [
        "callbacks.checkpoint.every_n_steps=5",
        "+callbacks.checkpoint.keep_last=9",
        "trainer.val_check_interval=5",
    ]
    whole = ["trainer.limit_val_batches=1.0", "trainer.limit_test_batches=1.0", "data.eval_batch_size=64"]
    values, objects = train(folder, "logger=csv", *plan, *saves, *whole)
    return SimpleNamespace(values=values, folder=folder, logs=logs, **vars(objects))


@pytest.fixture(scope="session")
def classifier(train, tmp_path_factory) -> SimpleNamespace:
    """A run on digits, with the callbacks of images."""
    folder = tmp_path_factory.mktemp("images")
    values, objects = train(folder, "trainer.limit_test_batches=1.0", "logger=none", experiment="vit_soft")
    return SimpleNamespace(values=values, folder=folder, **vars(objects))
