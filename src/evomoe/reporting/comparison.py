"""Holds routing methods side by side: runs what is missing, then writes tables and figures."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from evomoe.checks import check_parts, check_trainer
from evomoe.cli import check_missing, check_overrides
from evomoe.data.corpus import flatten
from evomoe.errors import ConfigError
from evomoe.instantiation import instantiate
from evomoe.reporting.figures import draw
from evomoe.reporting.hparams import write_hparams
from evomoe.reporting.plan import Comparison, Method, Run, read_comparison
from evomoe.reporting.results import check_data, check_recipe, is_finished, nearest, next_length, read_result
from evomoe.reporting.runner import LOG_FILE, Failure, Pool, Start, start_process
from evomoe.reporting.table import Results, unique, write_csv, write_table

Runs = dict[tuple[str, int], Run]
"""By label and seed."""

Configs = dict[str, DictConfig]
"""By label."""

LENGTHS = 3
"""Runs of other lengths that a method may have to meet a budget."""


def compare(config: DictConfig, root: Path, start: Start | None = None) -> dict[str, Results]:
    """Run each method with each seed, as far as that is not done, and write what came out.

    All runs of equal steps come first. From their FLOPs and seconds follow the lengths of the runs for the other
    budgets: the schedules of learning rate and phases depend on a run's length, so that a run of other length is
    another run, not a piece of this one. What it spent corrects its length, until it spends what the reference does.

    Args:
        config: ``configs/compare.yaml``.
        root: folder of ``train.py`` and ``configs``.
        start: of a training process; ``python train.py`` by default.

    Returns:
        The results by budget.

    Raises:
        ConfigError: a value cannot be, or a folder holds a run of another recipe.
        SystemExit: a run failed (status 1), or a signal came (130 or 143).
    """
    comparison = read_comparison(config)
    if not isinstance(config.train, bool):
        raise ConfigError(f"train={config.train}: expected true or false")
    configs = {method.label: _compose(comparison, method, root / "configs") for method in comparison.methods}
    methods = [replace(method, settings=_settings(configs[method.label])) for method in comparison.methods]
    comparison = replace(comparison, methods=tuple(methods))

    # Seed by seed, so that an unfinished comparison is one of fewer seeds.
    equal = {
        (method.label, seed): comparison.run_of(method, seed)
        for seed in comparison.seeds
        for method in comparison.methods
    }
    failures: list[Failure] = []
    if config.train:
        start = start or start_process(root / "train.py", config.threads)
        failures = _train(Pool(start, config.workers, config.refresh_seconds), comparison, equal, configs)
    else:
        _check_begun(comparison, equal)

    try:
        runs = _of_budgets(comparison, equal)
        by_budget = {budget: _collect(comparison, of_budget) for budget, of_budget in runs.items()}
        by_budget = {budget: results for budget, results in by_budget.items() if comparison.reference in results}
        if by_budget:
            _report(comparison, by_budget)
    finally:
        _complain(failures)
    if failures:
        sys.exit(1)
    return by_budget


def _compose(comparison: Comparison, method: Method, folder: Path) -> DictConfig:
    """The configuration of a method's first run."""
    run = comparison.run_of(method, comparison.seeds[0])
    try:
        config = check_overrides([*run.overrides, f"hydra.run.dir={run.folder}"], folder, "train")
        _check_missing(config)
    except ConfigError as error:
        raise ConfigError(f"{method.label}: {error}") from None
    return config


def _settings(config: DictConfig) -> dict[str, Any]:
    """The values that all runs of a method share, by dotted key; references to others stay references."""
    values: Any = OmegaConf.to_container(config)
    del values["paths"], values["seed"]
    return flatten(values)


def _train(pool: Pool, comparison: Comparison, equal: Runs, configs: Configs) -> list[Failure]:
    """Run all that is missing: of equal steps first, then, as far as it is known by then, of the other budgets."""
    failures = _run_missing(pool, equal.values(), configs)
    tried = set(equal.values())
    while missing := dict.fromkeys(
        run
        for of_budget in _of_budgets(comparison, equal).values()
        for run in of_budget.values()
        if not is_finished(run) and run not in tried
    ):
        failures += _run_missing(pool, missing, configs)
        tried |= missing.keys()
    return failures


def _check_begun(comparison: Comparison, equal: Runs) -> None:
    """Refuse tables of runs of another recipe, and of none at all."""
    for run in equal.values():
        check_recipe(run)
    if not any(is_finished(run) for run in equal.values() if run.label == comparison.reference):
        raise ConfigError(
            f"train=false: no run of {comparison.reference}, to which the others are held, is finished in"
            f" {comparison.runs}: train one first, without train=false"
        )


def _run_missing(pool: Pool, runs: Iterable[Run], configs: Configs) -> list[Failure]:
    """Run what is not finished, once all of it is known to be right."""
    runs = list(runs)
    for run in runs:
        check_recipe(run)
    missing = [run for run in runs if not is_finished(run)]
    for label in {run.label: run for run in missing}:
        try:
            check_parts(configs[label])
            check_trainer(configs[label].trainer)
            _check_history(configs[label])
            instantiate(configs[label].data)  # looks for its files
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from None
    if missing:
        pool.say(f"{len(missing)} of {len(runs)} runs to do, {pool.workers} at a time")
    elif runs:
        pool.say(f"nothing to run: all {len(runs)} runs are finished")
    return pool.run(runs)


def _check_history(config: DictConfig) -> None:
    """Refuse runs that would leave nothing to compare."""
    if OmegaConf.select(config, "callbacks.history") is None:
        raise ConfigError("callbacks.history=null leaves nothing to compare: leave it as it is")
    if config.trainer.get("limit_val_batches") == 0:
        raise ConfigError("trainer.limit_val_batches=0 leaves no validation to compare: give at least 1")


def _check_missing(config: DictConfig) -> None:
    try:
        check_missing(config)
    except ConfigError as error:
        raise ConfigError(f'{error} within overrides="..."') from None


def _of_budgets(comparison: Comparison, equal: Runs) -> dict[str, Runs]:
    """The runs of each budget, as far as is known: one that is not finished is the next to try."""
    methods = {method.label: method for method in comparison.methods}
    finished = {key: run for key, run in equal.items() if is_finished(run)}  # what failed is named at the end
    pairs = [
        (methods[label], own, finished[comparison.reference, seed])
        for (label, seed), own in finished.items()
        if (comparison.reference, seed) in finished
    ]
    return {
        budget: equal
        if budget == "steps"
        else {(own.label, own.seed): _search(comparison, method, own, base, budget) for method, own, base in pairs}
        for budget in comparison.budgets
    }


def _search(comparison: Comparison, method: Method, own: Run, reference: Run, budget: str) -> Run:
    """The run that spends what the reference spends, or the next one on the way to it."""
    cost, tolerance = comparison.cost(budget), comparison.tolerance[budget]
    spent = read_result(reference)
    results = [read_result(own)]
    while len(results) <= LENGTHS and (steps := next_length(results, spent, cost, tolerance)) is not None:
        run = comparison.run_of_length(method, own.seed, steps)
        if not is_finished(run):
            return run
        check_recipe(run)
        results.append(read_result(run))
    return nearest(results, spent, cost).run


def _collect(comparison: Comparison, runs: Runs) -> Results:
    """Results of the runs that are finished."""
    finished = {key: run for key, run in runs.items() if is_finished(run)}
    results = {
        method.label: {
            seed: read_result(finished[method.label, seed])
            for seed in comparison.seeds
            if (method.label, seed) in finished
        }
        for method in comparison.methods
    }
    check_data(result for of_method in results.values() for result in of_method.values())
    return {label: of_method for label, of_method in results.items() if of_method}


def _report(comparison: Comparison, by_budget: Mapping[str, Results]) -> None:
    comparison.output.mkdir(parents=True, exist_ok=True)
    print(write_table(comparison, by_budget))
    write_csv(comparison, by_budget)
    write_hparams(comparison, by_budget)
    try:
        draw(comparison, by_budget)
    except ModuleNotFoundError:
        print('no figures, as matplotlib is not installed: pip install -e ".[report]"', file=sys.stderr)
    print(f"{len(list(unique(by_budget)))} runs; tables, figures and TensorBoard's HPARAMS are in {comparison.output}")


def _complain(failures: Sequence[Failure]) -> None:
    for failure in failures:
        print(f"error: {failure.run} failed, {failure.status}; see {failure.run.folder / LOG_FILE}", file=sys.stderr)
        print("".join(f"    {line}\n" for line in failure.tail.splitlines()), end="", file=sys.stderr)
