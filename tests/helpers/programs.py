"""The entry points as a user starts them, on a text of a few kB and a model of a few thousand weights.

A Python that has to import torch and Lightning first takes seconds before it does anything. :func:`launch` therefore
forks each program from one process that has imported them already. What it forks is a process of its own all the same,
which runs the entry point's file as ``__main__``, with its own streams, signals and exit status.
"""

from __future__ import annotations

import argparse
import collections
import difflib
import functools
import inspect
import logging
import multiprocessing
import os
import runpy
import signal
import sys
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from evomoe import run
from evomoe.checkpointing import newest_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
PLAIN = ["callbacks=minimal", "logger=none", "test=false"]
HARD = ["model.dropout=0.1", "model.attention_dropout=0.1", "trainer.accumulate_grad_batches=2"]
PATIENCE = 120.0  # seconds that a program may take on a busy machine


def write_corpus(path: Path) -> Path:
    """About 100 kB of English: docstrings of the standard library; and its lines as pairs of sentences beside it.

    The files of the pairs are ``pairs.en``, and ``pairs.up`` with the same in capitals. In ``labels.tsv`` the lines are
    labelled by whether they are short.
    """
    modules = (argparse, collections, difflib, functools, inspect, logging, textwrap)
    texts = [inspect.getdoc(value) or "" for module in modules for value in (module, *vars(module).values())]
    path.write_text("\n\n".join(texts), encoding="utf-8")
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    for language, written in (("en", lines), ("up", map(str.upper, lines))):
        path.with_name(f"pairs.{language}").write_text("\n".join(written) + "\n", encoding="utf-8")
    rows = [
        "sentence\tlabel",
        *(f"{line}\t{'short' if len(line) < 40 else 'long'}" for line in lines if "\t" not in line),
    ]
    path.with_name("labels.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


TINY_MODELS = {
    "gpt": "gpt_tiny",
    "mlm": "roberta_tiny",
    "mt": "transformer_tiny",
    "vit": "vit_tiny",
    "glue": "roberta_tiny",
}
"""The smallest model of each kind of experiment, by the beginning of its name."""


def tiny_model(experiment: str) -> str:
    """The override that gives an experiment the smallest model of its kind."""
    return f"model={TINY_MODELS[experiment.partition('_')[0]]}"


def tiny_data(corpus: Path, experiment: str) -> list[str]:
    """Overrides for small data of the kind that an experiment wants."""
    if experiment.startswith("vit"):
        return ["data=digits", "data.batch_size=16", "data.num_workers=0", "data.augmentation={crop:1,policy:null}"]
    text = ["data.context=32", "data.vocab_size=300"]
    if experiment.startswith("mt"):
        pairs = ["data=pair_files", "data.source=en", "data.target=up", f"data.train={corpus.with_name('pairs')}"]
        return [*text, *pairs, "data.batch_tokens=128", "data.eval_batch_tokens=1024", "task.val_sentences=4"]
    if experiment.startswith("glue"):
        return [*text, "data=glue_files", f"data.train={corpus.with_name('labels.tsv')}", "data.batch_size=4"]
    return [*text, "data=text_files", f"data.train={corpus}", "data.batch_size=4"]


def tiny_overrides(corpus: Path, cache_dir: Path, experiment: str = "gpt_dts") -> list[str]:
    """Overrides that make a run of an experiment take a second or two, once its corpus is encoded."""
    return [
        *tiny_data(corpus, experiment),
        "data.holdout=0.2",
        tiny_model(experiment),
        f"paths.cache_dir={cache_dir}",
        "trainer.accelerator=cpu",
        "trainer.max_steps=20",
        "trainer.val_check_interval=10",
        "trainer.limit_val_batches=2",
        "trainer.limit_test_batches=2",
        "trainer.log_every_n_steps=1",
        "callbacks.checkpoint.every_n_steps=10",
    ]


def compose(*overrides: str, config: str = "train", run_dir: Path | None = None) -> DictConfig:
    """The configuration of a command line, without the program; ``run_dir`` stands in for the folder Hydra makes."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        if run_dir is not None:
            overrides = (*overrides, f"paths.run_dir={run_dir}")
        return hydra.compose(config, overrides=list(overrides))


def train(folder: Path, *overrides: str) -> tuple[dict[str, float], SimpleNamespace]:
    """Train in ``folder`` and in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values, objects = run.train(compose(*overrides, run_dir=folder))
    return values, SimpleNamespace(**objects)


@dataclass(frozen=True)
class Done:
    """What an ended program left: its exit status (minus the signal that killed it) and its streams."""

    status: int | None
    stdout: str
    stderr: str


@dataclass
class Program:
    """A program under way."""

    process: Any
    folder: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def read(self, stream: str = "stdout") -> str:
        """What it has written so far."""
        return (self.folder / stream).read_text(encoding="utf-8")

    def wait(self) -> Done:
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"the program did not end:\n{self.read()}\n{self.read('stderr')}")
        return Done(self.process.exitcode, self.read(), self.read("stderr"))


def launch(script: str, *arguments: str, folder: Path) -> Program:
    """Start an entry point in ``folder``, which receives what it writes to its streams in files."""
    for stream in ("stdout", "stderr"):
        (folder / stream).touch()
    process = _warm_python().Process(target=_become, args=(script, arguments, folder))
    process.start()
    return Program(process, folder)


def call(script: str, *arguments: str, folder: Path) -> Done:
    """Run an entry point to its end."""
    return launch(script, *arguments, folder=folder).wait()


@functools.cache
def _warm_python() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evomoe.run", "torch.utils.tensorboard"])
    return context


def _become(script: str, arguments: tuple[str, ...], folder: Path) -> None:
    os.chdir(folder)
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = [str(ROOT / script), *arguments]
    torch.set_num_threads(1)
    # A shell's background job starts with Ctrl-C ignored, and passes that on to the tests and from them to here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_path(sys.argv[0], run_name="__main__")


class KeepWeights(L.Callback):
    """Keeps the last weights of every process, as ``rank_<n>.pt`` in the run's folder."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(pl_module.state_dict(), Path(trainer.default_root_dir) / f"rank_{trainer.global_rank}.pt")


class KeepLosses(L.Callback):
    """Keeps the optimized loss of every batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append(outputs["loss"].item())


def read_csv(folder: Path) -> list[dict[str, str]]:
    """Rows of what a run logged with ``logger=csv``."""
    header, *lines = (folder / "csv" / "metrics.csv").read_text().splitlines()
    return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]


def load(run_dir: Path) -> dict[str, Any]:
    """The last whole checkpoint of a run, read as anyone would who does not trust it."""
    path = newest_checkpoint(run_dir)
    assert path is not None
    return torch.load(path, weights_only=True)


def timeless(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without what differs between equal runs: the folder that its configuration names, and times."""
    del checkpoint["evomoe"]
    history = checkpoint["callbacks"]["History"]
    for costs in (history["spent"], *history["rows"]):
        del costs["seconds"], costs["cpu_seconds"]
    return checkpoint


def equal(first: Any, second: Any) -> bool:
    """Whether two nests of containers hold the same plain values and, bit for bit, the same tensors."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and first.keys() == second.keys()
            and all(equal(first[k], second[k]) for k in first)
        )
    if isinstance(first, list | tuple):
        return type(first) is type(second) and len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)
