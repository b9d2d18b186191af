"""What a run left in its folder, and what follows from several of them."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomoe.callbacks.monitoring.history import HISTORY_FILE
from evomoe.errors import ConfigError
from evomoe.reporting.plan import Run

RECIPE_FILE = "recipe.json"
RESULT_FILE = "result.json"
EVALUATION = "val_loss_sparse"
"""The loss under the rule that a user would deploy decides."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """A finished run.

    Args:
        run: its recipe.
        rows: of its history, see :class:`~evomoe.callbacks.History`.
        test: its test metrics by name.
        causal_in_train: whether its routers never look at later tokens in training.
        data: fingerprint of its data; None for data without one.
        facts: where and when it ran, see :func:`~evomoe.reporting.machine.facts`.
    """

    run: Run
    rows: list[Row]
    test: dict[str, float]
    causal_in_train: bool
    data: str | None
    facts: dict[str, Any]

    @property
    def end(self) -> Row:
        """The row of the last weights."""
        return self.rows[-1]

    @property
    def loss(self) -> float:
        """Validation loss of the last weights under the final sparse rule."""
        return self.end[EVALUATION]

    @property
    def test_loss(self) -> float | None:
        """Test loss of the last weights under the final sparse rule."""
        return self.test.get("test/loss_sparse")

    @property
    def active_experts(self) -> float | None:
        """Experts per token, mean over the training tokens; None for a model without MoE layers."""
        if self.end["active_experts"] is None:
            return None
        before = [0, *(row["tokens"] for row in self.rows)]
        weighted = sum(
            row["active_experts"] * (row["tokens"] - start) for start, row in zip(before, self.rows, strict=False)
        )
        return weighted / self.end["tokens"]

    @property
    def max_violation(self) -> float | None:
        """MaxVio of a batch, mean over the MoE layers and the batches since the last but one validation."""
        return statistics.fmean(layers) if (layers := self.end["load_max_violation"].values()) else None

    def metric(self, name: str) -> float | None:
        """A test metric such as ``test/bleu``, or what the routers said of themselves before the last validation."""
        return self.test.get(name) if name.startswith("test/") else self.end["router_metrics"].get(name)


def check_recipe(run: Run) -> None:
    """Refuse a folder that holds a run of another recipe, or of a configuration that has been edited since.

    A key that is new, or gone, is taken for one without effect on this run.

    Raises:
        ConfigError: naming the overrides, or the first value, that differ.
    """
    path = run.folder / RECIPE_FILE
    if not path.exists():
        return
    recorded = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(recorded, dict):
        what = "written by an earlier version of this program"
    elif recorded["overrides"] != list(run.overrides):
        what = _difference(recorded["overrides"], run.overrides)
    elif (key := _edited(recorded["settings"], run.settings)) is not None:
        nothing = "a group, or nothing"
        there, here = (settings.get(key, nothing) for settings in (recorded["settings"], run.settings))
        what = f"{key}={there} there, {here} in the configuration now"
    else:
        return
    raise ConfigError(
        f"{run.folder} holds a run of another recipe ({what}): choose another name= for this comparison, or another"
        " paths.runs= if it shares its runs with others, or remove the folder"
    )


def _edited(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The first key whose value differs, or that is a value on one side and a group of them on the other."""
    for key in sorted({*there, *here}):
        if key in there and key in here:
            if json.dumps(there[key]) != json.dumps(here[key]):  # 1 is a number of steps, 1.0 a share
                return key
        elif any(name.startswith(f"{key}.") for name in (here if key in there else there)):
            return key
    return None


def _difference(there: Sequence[str], here: Sequence[str]) -> str:
    gone = " ".join(text for text in there if text not in here)
    new = " ".join(text for text in here if text not in there)
    nothing = "nothing in its place"
    return f"{gone or nothing} there, {new or nothing} here" if gone or new else "the same in another order"


def write_recipe(run: Run) -> None:
    """Mark the folder as that of this run, before it begins."""
    run.folder.mkdir(parents=True, exist_ok=True)
    _write(run.folder / RECIPE_FILE, {"overrides": list(run.overrides), "settings": dict(run.settings)})


def finish(run: Run, facts: dict[str, Any]) -> None:
    """Mark the run as finished.

    Raises:
        ConfigError: it left no history that ends with a finite validation of the last weights.
    """
    path = run.folder / HISTORY_FILE
    history = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    rows = history["rows"]
    if not rows or rows[-1][EVALUATION] is None:
        raise ConfigError(f"{path} holds no validation: the run needs callbacks.history and trainer.limit_val_batches")
    if rows[-1]["step"] != history["steps"]:
        raise ConfigError(
            f"{path} ends with a validation at step {rows[-1]['step']} of {history['steps']}: validate the last epoch"
            " too (trainer.check_val_every_n_epoch)"
        )
    if not math.isfinite(rows[-1][EVALUATION]):
        raise ConfigError(f"{path} ends with a validation loss of {rows[-1][EVALUATION]}: the run diverged")
    _write(run.folder / RESULT_FILE, facts)


def is_finished(run: Run) -> bool:
    """Whether :func:`finish` was called for it."""
    return (run.folder / RESULT_FILE).exists()


def read_result(run: Run) -> Result:
    """The result of a finished run."""
    history = json.loads((run.folder / HISTORY_FILE).read_text(encoding="utf-8"))
    facts = json.loads((run.folder / RESULT_FILE).read_text(encoding="utf-8"))
    return Result(run, history["rows"], history["test"], history["causal_in_train"], history["data"], facts)


def check_data(results: Iterable[Result]) -> None:
    """Refuse to hold runs side by side that read different data by the same settings, as these have changed meanwhile.

    Raises:
        ConfigError: naming the folders of two of them.
    """
    firsts: dict[str, Result] = {}
    for result in results:
        # A pretrained model may bring its own tokenizer.
        settings = [item for item in sorted(result.run.settings.items()) if re.match(r"data\.|init_from$", item[0])]
        first = firsts.setdefault(json.dumps(settings), result)
        if result.data != first.data:
            raise ConfigError(
                f"{first.run.folder} and {result.run.folder} hold runs on different data with the same settings: these"
                " have changed meanwhile; remove the folders of the runs on the older data, and repeat the command"
            )


def _write(path: Path, values: Any) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


@dataclass(frozen=True)
class Spread:
    """Mean and, of two values or more, sample standard deviation."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Of the values that are there; None where there is none."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def cost_to_reach(rows: Sequence[Row], cost: str, target: float) -> float | None:
    """What a run had spent when its validation loss first came down to ``target``, between two rows by a straight line.

    Args:
        rows: of its history.
        cost: a field of the rows that grows.
        target: a loss.

    Returns:
        None where it never did. A run whose first row is at the target already gets the cost of that row.
    """
    before: Row | None = None
    for row in rows:
        if row[EVALUATION] <= target:
            if before is None:
                return float(row[cost])
            share = (before[EVALUATION] - target) / (before[EVALUATION] - row[EVALUATION])
            return float(before[cost] + share * (row[cost] - before[cost]))
        before = row
    return None


def nearest(finished: Iterable[Result], reference: Result, cost: str) -> Result:
    """Of the runs of a method that differ in length, the one that spent most nearly what the reference did."""
    return min(finished, key=lambda result: abs(result.end[cost] - reference.end[cost]))


def next_length(finished: Sequence[Result], reference: Result, cost: str, tolerance: float) -> int | None:
    """Optimizer steps of the run to try next, so that a method spends what the reference does.

    What a method spends need not be proportional to its steps: a shorter run has a shorter dense phase. So only the
    first correction is proportional. Later ones follow the straight line through the two runs around the reference's
    cost, or through the two next to it, to half of the shortest or twice the longest at most.

    Args:
        finished: runs of the method and of the reference's seed, of different lengths.
        reference: the run of equal steps of the reference.
        cost: a field of the rows.
        tolerance: share by which the two may differ.

    Returns:
        None where one of them is as good, or no other length is better.
    """
    target = reference.end[cost]
    if abs(nearest(finished, reference, cost).end[cost] / target - 1) <= tolerance:
        return None
    points = sorted((result.end[cost], result.end["step"]) for result in finished)
    if len(points) == 1:
        points.insert(0, (0.0, 0))
    above = next((index for index in range(1, len(points)) if points[index][0] > target), len(points) - 1)
    (low, fewer), (high, more) = points[above - 1], points[above]
    if high == low:
        return None
    steps = round(fewer + (more - fewer) * (target - low) / (high - low))
    tried = [result.end["step"] for result in finished]
    if len(tried) > 1:
        steps = min(max(steps, min(tried) // 2), 2 * max(tried))
    steps = max(steps, 1)
    return None if steps in tried else steps
