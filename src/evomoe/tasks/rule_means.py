"""Means over an evaluation under the two routing rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics import SumMetric


class Sums(nn.Module):
    """Holds metrics whose sums keep their precision where the weights become half: they would soon stand still."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def move(state: Tensor) -> Tensor:
            moved = fn(state)
            return moved if moved.dtype == state.dtype else state.to(moved.device)

        return super()._apply(move, recurse)


class RuleMeans(Sums):
    """Means per token under the training rule, and, with the suffix ``_sparse``, under the final sparse rule.

    Sums, not means of means: batches differ in their number of tokens, and a mean metric would leave out a batch whose
    loss is NaN and report the rest as the whole.

    Args:
        names: of what is summed over the tokens of a batch.
    """

    sums: Mapping[str, SumMetric]

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.count = SumMetric(nan_strategy="disable")
        keys = [f"{name}{suffix}" for name in names for suffix in ("", "_sparse")]
        self.sums = nn.ModuleDict({key: SumMetric(nan_strategy="disable") for key in keys})  # type: ignore[assignment]

    def reset(self) -> None:
        """Begin anew; when an evaluation starts, as sums made in inference mode could not be added to outside it."""
        for metric in (self.count, *self.sums.values()):
            metric.reset()

    def update(self, count: Tensor | int, sums: Mapping[str, Tensor], sparse_sums: Mapping[str, Tensor]) -> None:
        """Add one batch.

        Args:
            count: its tokens.
            sums: over them, by name, under the training rule.
            sparse_sums: the same under the final sparse rule.
        """
        self.count.update(count)
        for name in self.names:
            self.sums[name].update(sums[name])
            self.sums[f"{name}_sparse"].update(sparse_sums[name])

    def compute(self) -> dict[str, Tensor]:
        """The means over all processes, by name."""
        count = self.count.compute()
        return {name: metric.compute() / count for name, metric in self.sums.items()}


def perplexities(means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the mean losses under both rules, as :meth:`RuleMeans.compute` returns them."""
    return {f"perplexity{suffix}": means[f"loss{suffix}"].exp() for suffix in ("", "_sparse")}
