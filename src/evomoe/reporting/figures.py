"""The figures of a comparison, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evomoe.reporting.plan import Comparison
from evomoe.reporting.results import EVALUATION, Result
from evomoe.reporting.table import Results

GRID = 200
MOST_LOAD = 4  # times the mean, the end of the colours
AXES = {"steps": "optimizer step", "flops": "training TFLOPs", "seconds": "{clock} seconds of training steps"}
UNITS = {"steps": 1.0, "flops": 1e12, "seconds": 1.0}


def draw(comparison: Comparison, by_budget: Mapping[str, Results]) -> list[Path]:
    """Draw the losses of each budget, and the routing of the first one.

    Returns:
        The files.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    files = [_draw_loss(comparison, results, f"loss_{budget}.png") for budget, results in by_budget.items()]
    results = next(iter(by_budget.values()))
    routed = {
        label: of_method
        for label, of_method in results.items()
        if any(result.end["load"] for result in of_method.values())
    }
    if routed:
        files.append(_draw_curve(comparison, routed, "active_experts.png", "experts per token", _active))
        files.append(_draw_curve(comparison, routed, "max_violation.png", "MaxVio, mean over layers", _violation))
        files.append(_draw_load(comparison, routed, "load.png"))
    return files


def band(results: Mapping[int, Result], cost: str, value: Any) -> tuple[np.ndarray, np.ndarray]:
    """Curves of all seeds on one grid, within the costs that all of them have seen.

    Args:
        results: by seed.
        cost: a field of the rows, the horizontal axis.
        value: of a row, the vertical axis.

    Returns:
        The grid ``(N,)`` and the curves ``(seeds, N)``.
    """
    curves = [
        (np.array([row[cost] for row in result.rows]), np.array([value(row) for row in result.rows]))
        for result in results.values()
    ]
    grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), GRID)
    return grid, np.stack([np.interp(grid, x, y) for x, y in curves])


def _active(row: dict[str, Any]) -> float:
    return row["active_experts"]


def _violation(row: dict[str, Any]) -> float:
    return float(np.mean(list(row["load_max_violation"].values())))


def _draw_loss(comparison: Comparison, results: Results, name: str) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4), sharey=True, layout="constrained")
    for axis, (budget, title) in zip(axes, AXES.items(), strict=True):
        for label, of_method in results.items():
            _plot_band(axis, label, of_method, comparison.cost(budget), lambda row: row[EVALUATION], UNITS[budget])
        axis.set_xlabel(title.format(clock=comparison.clock))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss, sparse rule")
    axes[0].legend(fontsize="small")
    return _save(figure, comparison.output / name)


def _draw_curve(comparison: Comparison, results: Results, name: str, title: str, value: Any) -> Path:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, of_method in results.items():
        _plot_band(axis, label, of_method, "step", value, 1.0)
    axis.set_xlabel(AXES["steps"])
    axis.set_ylabel(title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return _save(figure, comparison.output / name)


def _draw_load(comparison: Comparison, results: Results, name: str) -> Path:
    """Share of each expert over the steps, for each method and layer, of its first seed."""
    import matplotlib.pyplot as plt

    first = {label: next(iter(of_method.values())) for label, of_method in results.items()}
    layers = max((list(result.end["load"]) for result in first.values()), key=len)
    size = (2.4 * len(layers) + 1.5, 1.8 * len(first) + 0.6)
    figure, axes = plt.subplots(len(first), len(layers), figsize=size, squeeze=False, layout="constrained")
    for row, (label, result) in zip(axes, first.items(), strict=True):
        for axis, layer in zip(row, layers, strict=True):
            if layer not in result.end["load"]:
                axis.set_visible(False)
                continue
            share = np.array([entry["load"][layer] for entry in result.rows]).T  # (E, rows)
            experts = share.shape[0]
            extent = (0, result.end["step"], experts - 0.5, -0.5)
            image = axis.imshow(
                share * experts, aspect="auto", vmin=0, vmax=MOST_LOAD, extent=extent, interpolation="none"
            )
            axis.set_title(f"{label}, {layer}", fontsize="small")
            axis.yaxis.get_major_locator().set_params(integer=True)
            axis.tick_params(labelsize="x-small")
    figure.colorbar(image, ax=axes, extend="max", label="load of an expert over the mean")
    figure.supxlabel(AXES["steps"], fontsize="small")
    figure.supylabel("expert", fontsize="small")
    return _save(figure, comparison.output / name)


def _plot_band(axis: Any, label: str, results: Mapping[int, Result], cost: str, value: Any, unit: float) -> None:
    """Mean of the seeds, and a band from the lowest to the highest of them."""
    grid, curves = band(results, cost, value)
    (line,) = axis.plot(grid / unit, curves.mean(axis=0), label=label)
    if len(curves) > 1:
        axis.fill_between(grid / unit, curves.min(axis=0), curves.max(axis=0), alpha=0.2, color=line.get_color())


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
