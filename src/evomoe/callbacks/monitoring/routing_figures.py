"""Pictures of a validation's routing. Needs matplotlib, which is not among the package's own requirements."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from torch import Tensor

CELLS_WITH_NUMBERS = 16
"""Rows or columns up to which each cell also shows its number."""


def draw_load(loads: Mapping[str, Tensor]) -> Figure:
    """Load of each expert, a row per layer.

    Args:
        loads: shares ``(E,)`` by layer; layers may have different E.
    """
    width = max(load.numel() for load in loads.values())
    rows = [load.tolist() + [float("nan")] * (width - load.numel()) for load in loads.values()]
    return _heat_map(rows, list(loads), "load per expert", largest=max(max(load.tolist()) for load in loads.values()))


def draw_matrix(matrix: Tensor, title: str) -> Figure:
    """Experts against experts, shares from 0 to 1.

    Args:
        matrix: ``(E, E)``.
        title: what it shows.
    """
    return _heat_map(matrix.tolist(), [str(expert) for expert in range(len(matrix))], title, largest=1.0)


def _heat_map(rows: list[list[float]], names: list[str], title: str, largest: float) -> Figure:
    height, width = len(rows), len(rows[0])
    figure = Figure(figsize=(2 + 0.4 * width, 1 + 0.4 * height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rows, vmin=0, vmax=largest, cmap="viridis", aspect="auto")
    axes.set_yticks(range(height), names)
    axes.set_xlabel("expert")
    axes.set_title(title)
    if max(height, width) <= CELLS_WITH_NUMBERS:
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                color = "black" if value > largest / 2 else "white"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image)
    return figure
