"""The scores of GLUE (arXiv 1804.07461) under the two routing rules.

Shapes: N sequences, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from evomoe.errors import ConfigError
from evomoe.tasks.rule_means import Sums


class Matthews(MulticlassConfusionMatrix):
    """Matthews' correlation of C classes (Gorodkin, 2004); 0 where all predictions, or all labels, are one class.

    For that case torchmetrics has a limit that depends on the labels, so that a constant guess would score.
    """

    def compute(self) -> Tensor:
        """The correlation over all processes, a 0-dim tensor."""
        counts = super().compute()  # (C, C), a row for each label
        if any((counts.sum(dim=dim) > 0).sum() < 2 for dim in (0, 1)):  # shares add up to 1 but for rounding
            return torch.zeros((), device=counts.device)
        shares = counts / counts.sum()
        labels, predictions = shares.sum(dim=1), shares.sum(dim=0)
        spread = (1 - labels @ labels) * (1 - predictions @ predictions)
        return (shares.trace() - labels @ predictions) / spread.sqrt()


CLASS_SCORES: Mapping[str, Callable[[int], Metric]] = {
    "accuracy": lambda classes: MulticlassAccuracy(classes, average="micro"),
    "f1": lambda classes: BinaryF1Score() if classes == 2 else MulticlassF1Score(classes, average="macro"),
    "matthews": Matthews,
}
"""Of predicted classes; ``f1`` is that of class 1 of two, the last in their order, and the mean over the classes of
more."""

NUMBER_SCORES: Mapping[str, Callable[[], Metric]] = {"pearson": PearsonCorrCoef, "spearman": SpearmanCorrCoef}
"""Of predicted numbers."""


class SequenceScores(Sums):
    """Scores over an evaluation under the training rule, and, with the suffix ``_sparse``, under the final one.

    Args:
        names: of ``CLASS_SCORES`` or ``NUMBER_SCORES``.
        num_classes: C; 1 for numbers.

    Raises:
        ConfigError: a name is unknown, or for the other kind of labels.
    """

    def __init__(self, names: Iterable[str], num_classes: int) -> None:
        super().__init__()
        self.names = tuple(names)
        known = NUMBER_SCORES if num_classes == 1 else CLASS_SCORES
        for name in self.names:
            if name not in known:
                kind = "numbers" if num_classes == 1 else f"{num_classes} classes"
                raise ConfigError(f"task.metrics names {name!r}, and labels are {kind}: expected {', '.join(known)}")
        self.is_regression = num_classes == 1
        self.scores = nn.ModuleDict(
            {
                f"{name}{suffix}": NUMBER_SCORES[name]() if num_classes == 1 else CLASS_SCORES[name](num_classes)
                for suffix in ("", "_sparse")
                for name in self.names
            }
        )

    def reset(self) -> None:
        """Begin anew."""
        for score in self.scores.values():
            score.reset()  # type: ignore[operator]

    def update(self, outputs: Tensor, sparse_outputs: Tensor, labels: Tensor) -> None:
        """Add one batch.

        Args:
            outputs: of the model under the training rule, ``(N, C)``.
            sparse_outputs: the same under the final sparse rule.
            labels: ``(N,)``.
        """
        if not len(labels):
            return
        for suffix, values in (("", outputs), ("_sparse", sparse_outputs)):
            predictions = values[:, 0] if self.is_regression else values.argmax(dim=1)
            for name in self.names:
                self.scores[f"{name}{suffix}"].update(predictions, labels)  # type: ignore[operator]

    def compute(self) -> dict[str, Tensor]:
        """The scores over all processes, by name."""
        return {name: score.compute() for name, score in self.scores.items()}  # type: ignore[operator]
