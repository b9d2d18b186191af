"""The tables of a comparison: ``table.md`` for people, ``runs.csv`` for programs."""

from __future__ import annotations

import csv
import shlex
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

from evomoe.callbacks.console.summary import markdown
from evomoe.reporting.plan import Comparison
from evomoe.reporting.results import Result, Spread, cost_to_reach

Results = Mapping[str, Mapping[int, Result]]
"""Of one budget: by label, then by seed; without the runs that failed, and the methods of which all failed."""

TITLES = {"steps": "Equal optimizer steps", "flops": "Equal training FLOPs", "seconds": "Equal seconds"}
COSTS = {"steps": "steps", "flops": "training FLOPs", "seconds": "seconds"}
NOTE = """\
Losses are those of the last weights under the final sparse rule. FLOPs are those of the rows that experts really \
computed, seconds those of the training steps alone. Active experts are the mean over training, and over the steps \
before the last validation; MaxVio is that of a batch, mean over layers and the same steps. Costs between two \
validations are interpolated."""


def write_table(comparison: Comparison, by_budget: Mapping[str, Results], command: str | None = None) -> str:
    """Write ``table.md``, and return it.

    Args:
        comparison: what was compared.
        by_budget: its results.
        command: that made it; by default the one that is running.
    """
    if command is None:
        typed = sys.orig_argv[len(sys.orig_argv) - len(sys.argv) + 1 :]  # sys.argv holds what Hydra was told instead
        # Without train=false it is the command that makes the table.
        command = shlex.join(
            ["python", Path(sys.argv[0]).name, *(word for word in typed if not word.startswith("train="))]
        )
    parts = [f"# {comparison.name}\n"]
    for budget, results in by_budget.items():
        parts.append(
            f"\n## {TITLES[budget]}\n\n{quality_table(comparison, results)}{unequal(comparison, budget, results)}"
        )
        parts.append(
            f"\nCost to the final validation loss of {comparison.reference}, over what {comparison.reference} needed"
            f" for it; a dash where no validation shows that loss:\n\n{reach_table(comparison, results)}"
        )
    parts.append(f"\n{footer(comparison, by_budget, command)}")
    text = "".join(parts)
    (comparison.output / "table.md").write_text(text, encoding="utf-8")
    return text


def quality_table(comparison: Comparison, results: Results) -> str:
    """Loss and cost of each method at the end of its runs."""
    seconds = comparison.cost("seconds")
    perplexity = partial(Result.metric, name="test/perplexity_sparse")
    has_perplexity = any(
        perplexity(result) is not None for of_method in results.values() for result in of_method.values()
    )
    columns: list[tuple[str, str, Callable[[Result], float | None]]] = [
        ("test loss", ".4f", lambda result: result.test_loss),
        *([("test perplexity", ".2f", perplexity)] if has_perplexity else []),
        ("steps", ".0f", lambda result: result.end["step"]),
        ("training TFLOPs", ".4g", lambda result: result.end["training_flops"] / 1e12),
        (f"{comparison.clock.replace('cpu', 'CPU')} s", ".1f", lambda result: result.end[seconds]),
        ("active experts", ".2f", lambda result: result.active_experts),
        ("at the end", ".2f", lambda result: result.end["active_experts"] if has_course(result) else None),
        ("MaxVio", ".2f", lambda result: result.max_violation),
        *((name, ".3f", partial(Result.metric, name=name)) for name in comparison.columns),
    ]
    names = [name for name, _, _ in columns]
    reference = results[comparison.reference]
    rows = []
    for label, of_method in _in_order(comparison, results):
        is_whole = len(of_method) == len(comparison.seeds)
        losses = Spread.of(result.loss for result in of_method.values())
        causal = all(result.causal_in_train for result in of_method.values())
        rows.append(
            [
                label if is_whole else f"{label} ({len(of_method)} of {len(comparison.seeds)} seeds)",
                words(losses, ".4f"),
                words(None if of_method is reference else difference(of_method, reference), "+.4f"),
                *(words(Spread.of(map(read, of_method.values())), form) for _, form, read in columns),
                "no" if causal else "yes",
            ]
        )
    return markdown(["method", "val loss", f"less {comparison.reference}", *names, "sees the future in training"], rows)


def unequal(comparison: Comparison, budget: str, results: Results) -> str:
    """A line on the methods with a run that spends more or less than the reference's; empty where there is none."""
    if budget not in comparison.tolerance:
        return ""  # steps are equal
    cost, tolerance = comparison.cost(budget), comparison.tolerance[budget]
    missed = []
    for label, of_method in results.items():
        shares = [
            of_method[seed].end[cost] / base.end[cost] - 1
            for seed, base in results[comparison.reference].items()
            if seed in of_method
        ]
        if any(abs(share) > tolerance for share in shares):
            missed.append(f"{label} ({', '.join(f'{share:+.1%}' for share in shares)})")
    return f"\nNot within {tolerance:.0%} of {comparison.reference}: {', '.join(missed)}.\n" if missed else ""


def difference(results: Mapping[int, Result], reference: Mapping[int, Result]) -> Spread | None:
    """Validation loss less that of the reference, paired by seed; None without a pair."""
    return Spread.of(results[seed].loss - reference[seed].loss for seed in results if seed in reference)


def reach_table(comparison: Comparison, results: Results) -> str:
    """Steps, FLOPs and seconds to the reference's final loss, as ratios to what the reference needed for it."""
    reference = results[comparison.reference]
    rows = []
    for label, of_method in _in_order(comparison, results):
        seeds = [
            seed
            for seed in of_method
            if seed in reference and has_course(of_method[seed]) and has_course(reference[seed])
        ]
        spent = [
            [ratio_to_reach(of_method[seed], reference[seed], comparison.cost(name)) for seed in seeds]
            for name in COSTS
        ]
        reached = f"{sum(ratio is not None for ratio in spent[0])} of {len(seeds)}" if seeds else "-"
        rows.append([label, *(words(Spread.of(ratios), ".3f") for ratios in spent), reached])
    return markdown(["method", *COSTS.values(), "seeds that reached it"], rows)


def has_course(result: Result) -> bool:
    """Whether a run was validated more than once: a single row says nothing of the way to its end."""
    return len(result.rows) > 1


def ratio_to_reach(own: Result, reference: Result, cost: str) -> float | None:
    """Cost of a run to the final loss of the reference's run over that of the reference; None where it never came."""
    spent = cost_to_reach(own.rows, cost, reference.loss)
    base = cost_to_reach(reference.rows, cost, reference.loss)
    assert base is not None  # its last row is at its final loss
    return None if spent is None else spent / base


def footer(comparison: Comparison, by_budget: Mapping[str, Results], command: str) -> str:
    """Where the numbers come from, and what they mean."""
    results = unique(by_budget)
    seeds = ", ".join(map(str, comparison.seeds))
    dates = sorted({result.facts["date"] for result in results})
    lines = [
        f"`{command}`",
        f"Seeds {seeds}: mean ± sample standard deviation, differences and ratios paired by seed."
        if len(comparison.seeds) > 1
        else f"Seed {seeds}.",
        *sorted({f"{result.facts['machine']}; {result.facts['software']}." for result in results}),
        f"{dates[0] if len(dates) == 1 else f'{dates[0]} to {dates[-1]}'}.",
        NOTE,
    ]
    return "".join(f"- {line}\n" for line in lines)


def write_csv(comparison: Comparison, by_budget: Mapping[str, Results]) -> None:
    """Write ``runs.csv``, a row for each run."""
    rows = []
    for result in unique(by_budget):
        budgets = [budget for budget, results in by_budget.items() if _holds(results, result)]
        costs = {name: result.end[name] for name in ("step", "tokens", "training_flops", "seconds", "cpu_seconds")}
        rows.append(
            {
                "method": result.run.label,
                "seed": result.run.seed,
                "budgets": " ".join(budgets),
                **costs,
                "val_loss": result.end["val_loss"],
                "val_loss_sparse": result.loss,
                "test_loss_sparse": result.test_loss,
                "active_experts": result.active_experts,
                "active_experts_at_the_end": result.end["active_experts"],
                "max_violation": result.max_violation,
                **{name: result.metric(name) for name in comparison.columns},
                "causal_in_train": result.causal_in_train,
                "machine": result.facts["machine"],
                "software": result.facts["software"],
                "date": result.facts["date"],
                "folder": result.run.folder,
                "overrides": shlex.join(result.run.overrides),
            }
        )
    with (comparison.output / "runs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def unique(by_budget: Mapping[str, Results]) -> Collection[Result]:
    """Every run once, though it may stand under several budgets."""
    by_folder = {
        result.run.folder: result
        for results in by_budget.values()
        for of_method in results.values()
        for result in of_method.values()
    }
    return by_folder.values()


def _holds(results: Results, result: Result) -> bool:
    return any(other.run == result.run for other in results.get(result.run.label, {}).values())


def _in_order(comparison: Comparison, results: Results) -> list[tuple[str, Mapping[int, Result]]]:
    """The methods that have a result."""
    labels = [method.label for method in comparison.methods]
    return [(label, results[label]) for label in labels if label in results]


def words(spread: Spread | None, form: str) -> str:
    """``mean ± deviation`` in a format; the mean alone where there is one value, or the values are equal."""
    if spread is None:
        return "-"
    mean = format(spread.mean, form)
    if float(mean) == 0:
        mean = mean.replace("-", "+" if "+" in form else "")  # rounded to nothing from below
    if not spread.deviation:
        return mean
    return f"{mean} ± {format(spread.deviation, '.1g' if form.endswith('g') else form.replace('+', ''))}"
