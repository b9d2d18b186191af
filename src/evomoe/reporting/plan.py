"""What a comparison consists of: methods, seeds, budgets, and the recipe of every run."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from evomoe.checks import split_words
from evomoe.errors import ConfigError

BUDGETS = ("steps", "flops", "seconds")
CLOCKS = {"cpu": "cpu_seconds", "wall": "seconds"}
"""Field of the history by the name of the clock that measures a budget of seconds."""

OWN_KEYS = ("experiment", "seed", "resume", "ckpt_path", "run_name", "hydra.run.dir", "paths.run_dir")
"""Overrides that the comparison itself gives to every run."""

LENGTH_KEY = "trainer.max_steps"

USUAL_REFERENCE = "gpt_switch"
"""The method to which the others are held where the user names none and it is there."""


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Args:
        label: its name in tables, figures and folders.
        experiment: a file of ``configs/experiment``.
        overrides: what distinguishes it from the plain experiment.
        settings: all values that its runs share, by dotted key, once they are known.
    """

    label: str
    experiment: str
    overrides: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        label: of its method.
        seed: of its weights and the order of its data.
        folder: where it writes.
        overrides: its whole recipe; two runs with the same one are the same run.
        settings: what the configuration makes of it, but for seed and folders, and for a length of its own.
    """

    label: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.label} seed {self.seed}" + ("" if self.folder.parent.name == self.label else f" ({self.length})")

    @property
    def length(self) -> str:
        """The override of its length, empty where the configuration decides."""
        return next((text for text in self.overrides if _key(text) == LENGTH_KEY), "")


@dataclass(frozen=True)
class Comparison:
    """Methods under equal budgets.

    Args:
        name: of the comparison.
        methods: in the order of the table.
        reference: label of the method to which the others are held.
        seeds: of which each method has a run.
        budgets: of ``steps``, ``flops`` and ``seconds``, those to report.
        overrides: common to all runs; those of a method come after them.
        tolerance: share by which FLOPs or seconds of a run may differ from the reference's for it to count as a run of
            equal FLOPs or seconds.
        clock: ``cpu`` or ``wall``, what measures seconds.
        columns: further metrics for the table: of the test, such as ``test/bleu``, or of the routers before the last
            validation, such as ``off_node``.
        runs: folder of the runs.
        output: folder of tables and figures.
    """

    name: str
    methods: tuple[Method, ...]
    reference: str
    seeds: tuple[int, ...]
    budgets: tuple[str, ...]
    overrides: tuple[str, ...]
    tolerance: dict[str, float]
    clock: str
    columns: tuple[str, ...]
    runs: Path
    output: Path

    def cost(self, budget: str) -> str:
        """Field of a history's row in which a budget is counted."""
        return {"steps": "step", "flops": "training_flops", "seconds": CLOCKS[self.clock]}[budget]

    def run_of(self, method: Method, seed: int) -> Run:
        """The run of equal steps."""
        recipe = merge([f"experiment={method.experiment}"], self.overrides, method.overrides, [f"seed={seed}"])
        folder = self.runs / method.label / f"seed_{seed}"
        return Run(method.label, seed, folder, tuple(recipe), method.settings)

    def run_of_length(self, method: Method, seed: int, steps: int) -> Run:
        """A run of another length, to spend what the reference spends in its run of equal steps."""
        length = [f"{LENGTH_KEY}={steps}", "trainer.max_epochs=null"]  # epochs must not end it earlier
        recipe = merge(self.run_of(method, seed).overrides, length)
        folder = self.runs / method.label / f"steps_{steps}" / f"seed_{seed}"
        given = {_key(text) for text in length}
        settings = {key: value for key, value in method.settings.items() if key not in given}
        return Run(method.label, seed, folder, tuple(recipe), settings)


def merge(*overrides: Iterable[str]) -> list[str]:
    """One list of overrides, in which a later one replaces an earlier one of the same key.

    ``merge(["data=code", "seed=1"], ["data=docs"])`` is ``["data=docs", "seed=1"]``: Hydra takes a group only once.
    """
    by_key = {_key(text): text for part in overrides for text in part}
    return list(by_key.values())


def _key(override: str) -> str:
    return override.partition("=")[0]


def read_comparison(config: DictConfig) -> Comparison:
    """The comparison that a configuration describes.

    Raises:
        ConfigError: naming the first value that cannot be.
    """
    values: Any = OmegaConf.to_container(config, resolve=True)
    methods = _read_methods(values["experiments"])
    labels = [method.label for method in methods]
    if values["reference"] is None:
        values["reference"] = USUAL_REFERENCE if USUAL_REFERENCE in labels else labels[0]
    if values["reference"] not in labels:
        near = (*difflib.get_close_matches(str(values["reference"]), labels, n=1), labels[0])[0]
        raise ConfigError(
            f"reference={values['reference']} is not among the methods compared: choose one of them, as in"
            f" reference={near}"
        )
    seeds = values["seeds"] if isinstance(values["seeds"], list) else [values["seeds"]]
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds={_shown(seeds)}: expected different whole numbers, as in seeds=[1,2,3]")
    budgets = values["budget"] if isinstance(values["budget"], list) else [values["budget"]]
    for budget in budgets or [None]:
        if budget not in BUDGETS:
            raise ConfigError(f"budget={budget}: expected steps, flops, seconds or a list of them")
    if values["clock"] not in CLOCKS:
        raise ConfigError(f"clock={values['clock']}: expected cpu or wall")
    for key in ("workers", "threads"):
        if type(values[key]) is not int or values[key] < 1:
            raise ConfigError(f"{key}={values[key]}: expected a whole number of at least 1")
    folders = {key: Path(values["paths"][key]) for key in ("runs", "output")}
    for key, folder in folders.items():
        _check_writable(f"paths.{key}", folder)
    return Comparison(
        name=str(values["name"]),
        methods=methods,
        reference=values["reference"],
        seeds=tuple(seeds),
        budgets=tuple(dict.fromkeys(budgets)),
        overrides=tuple(merge(_read_overrides(values["settings"]), _read_overrides(values["overrides"]))),
        tolerance=values["tolerance"],
        clock=values["clock"],
        columns=(values["columns"],) if isinstance(values["columns"], str) else tuple(values["columns"]),
        **folders,
    )


def _read_methods(entries: Any) -> tuple[Method, ...]:
    if isinstance(entries, str):
        raise ConfigError(
            f"experiments={entries} is no list: expected names in brackets, as in experiments=[gpt_dts,gpt_switch]; a"
            " method with overrides belongs into a file of configs/comparison"
        )
    if not isinstance(entries, list) or not entries:
        raise ConfigError(
            f"experiments={_shown(entries)} is empty: expected names, as in experiments=[gpt_dts,gpt_switch], or"
            " comparison=main"
        )
    methods = [_read_method(entry) for entry in entries]
    labels = [method.label for method in methods]
    for label in labels:
        if not re.fullmatch(r"\w[\w.+-]*", label) or label == "tensorboard":
            raise ConfigError(f"the label {label!r} names a folder: expected letters, digits, and any of _ . + -")
        if labels.count(label) > 1:
            raise ConfigError(f"experiments holds the label {label!r} twice: give one of the two another name")
    return tuple(methods)


def _read_method(entry: Any) -> Method:
    """A name, or ``label: {experiment: name, overrides: [...]}``."""
    if isinstance(entry, str):
        return Method(entry, entry)
    if isinstance(entry, dict) and len(entry) == 1:
        ((label, value),) = entry.items()
        if isinstance(value, dict) and "experiment" in value and value.keys() <= {"experiment", "overrides"}:
            overrides = tuple(_read_overrides(value.get("overrides", [])))
            if LENGTH_KEY in map(_key, overrides):
                raise ConfigError(
                    f"{label}: {LENGTH_KEY} must be the same for all methods; set it in overrides of the comparison"
                )
            return Method(str(label), str(value["experiment"]), overrides)
    raise ConfigError(
        f"experiments holds {_shown(entry)}: expected the name of an experiment, or"
        " label: {experiment: name, overrides: [key=value]}"
    )


def _read_overrides(given: Any) -> list[str]:
    """A list of ``key=value``, or the same as one text with spaces between them."""
    texts = split_words("overrides", given) if isinstance(given, str) else [str(text) for text in given or []]
    for text in texts:
        if not re.match(r"~[\w.@/]+$|[~+]{0,2}[\w.@/]+=", text):
            raise ConfigError(f'overrides: {text!r} is none; expected overrides="data=docs trainer.max_steps=100"')
        if _key(text).lstrip("~+") in OWN_KEYS:
            raise ConfigError(f"overrides: {text} is set by the comparison, for every run; leave it out")
    return texts


def _check_writable(key: str, folder: Path) -> None:
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{key}={folder} cannot be written: choose another folder")


def _shown(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
