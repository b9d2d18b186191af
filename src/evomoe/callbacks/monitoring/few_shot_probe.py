"""What frozen features are worth: a linear classifier of them, learned from few images of each class.

Shapes: n images, D model width, C classes, R values of the penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import Precision
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from evomoe.errors import ConfigError

PENALTIES = tuple(2.0**power for power in range(-10, 21, 2))
"""Among which the validation images decide."""

SMALLEST_STD = 1e-5


class FewShotProbe(L.Callback):
    """Logs ``test/probe_<n>shot`` at the end of a test: accuracy of a ridge regression on the features of the model.

    The protocol of few-shot transfer in *Routers in Vision MoE* (arXiv 2401.15969) and its forerunners, on the images
    of the run itself: n training images of each class are drawn; their pooled features, standardised, are regressed on
    the classes; the penalty is the one of the highest accuracy on the validation images, the mean over the draws; what
    is logged is the mean over the draws on the test images. Features are those under the final rule. All processes
    compute the same.

    Args:
        shots: training images of each class, n.
        draws: how often they are drawn.
        seed: of the draws.
        remedy: what to do where a class has too few images, for the message.

    Raises:
        ConfigError: before training, if a class has fewer images than a draw takes.
    """

    def __init__(
        self,
        shots: Sequence[int] = (1, 5, 10),
        draws: int = 5,
        seed: int = 0,
        remedy: str = "ask for no more by callbacks.probe.shots, or for none by callbacks.probe=null",
    ) -> None:
        if not shots or min(shots) < 1:
            raise ConfigError(f"probe shots={list(shots)}: expected images of each class, such as [1,5,10]")
        if draws < 1:
            raise ConfigError(f"probe draws={draws}: expected at least 1")
        self.shots = list(shots)
        self.draws = draws
        self.seed = seed
        self.remedy = remedy

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse data with too few images."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        counts = np.bincount(data.images.splits["train"].labels, minlength=len(data.classes))
        if counts.min() < max(self.shots):
            name = data.classes[int(counts.argmin())]
            raise ConfigError(
                f"probe shots={self.shots}: the class {name!r} has {counts.min()} training images; {self.remedy}"
            )

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, regress, and log."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        labels = {split: torch.from_numpy(images.labels) for split, images in data.images.splits.items()}
        chosen = {
            (shots, draw): draw_shots(labels["train"].numpy(), shots, (self.seed, shots, draw))
            for shots in self.shots
            for draw in range(self.draws)
        }
        needed = np.unique(np.concatenate(list(chosen.values())))
        precision = trainer.precision_plugin
        train = features_of(pl_module, data, "train", needed, precision)
        held_out = {split: features_of(pl_module, data, split, precision=precision) for split in ("val", "test")}
        for shots in self.shots:
            accuracies = {split: torch.zeros(len(PENALTIES)) for split in held_out}
            for draw in range(self.draws):
                rows = np.searchsorted(needed, chosen[shots, draw])
                targets = F.one_hot(labels["train"][needed[rows]], len(data.classes)).float()
                for split, features in held_out.items():
                    predicted = predict(train[rows], targets, features, PENALTIES)  # (R, n)
                    accuracies[split] += (predicted == labels[split]).float().mean(dim=1) / self.draws
            best = int(accuracies["val"].argmax())
            # Equal on all processes already; sync_dist keeps Lightning from doubting it.
            pl_module.log(f"test/probe_{shots}shot", accuracies["test"][best], sync_dist=True)


def draw_shots(labels: np.ndarray, shots: int, seed: Sequence[int]) -> np.ndarray:
    """Indices of ``shots`` items of each class, drawn without replacement.

    Args:
        labels: ``(n,)``.
        shots: items of a class.
        seed: of the draw.
    """
    generator = np.random.default_rng(list(seed))
    draws = [generator.choice(np.flatnonzero(labels == label), shots, replace=False) for label in np.unique(labels)]
    return np.concatenate(draws)


def features_of(
    task: Any, data: Any, split: str, indices: np.ndarray | None = None, precision: Precision | None = None
) -> Tensor:
    """Pooled features ``(n, D)`` of images as they are evaluated, fp32 on the CPU.

    The images share their batches in a drawn order, as in an evaluation: files lie sorted by class, and a router whose
    places are those of the batch would drop much of a batch of one class.

    Args:
        task: of image classification.
        data: its datamodule.
        split: of the images.
        indices: which of them; None for all.
        precision: of the forward pass; None for that of the weights.
    """
    images: Any = data.dataset(split)
    indices = np.arange(len(images)) if indices is None else indices
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(Subset(images, indices[order.numpy()].tolist()), batch_size=data.eval_batch_size)
    precision = Precision() if precision is None else precision
    batches = []
    with precision.forward_context():
        for batch in loader:
            converted = precision.convert_input(batch["images"].to(task.device))
            batches.append(task.model.features(converted, final_rule=True)[0])
    return torch.cat(batches).float().cpu()[order.argsort()]


def predict(features: Tensor, targets: Tensor, queries: Tensor, penalties: Sequence[float]) -> Tensor:
    """Classes that a ridge regression of standardised features on ``targets`` gives the queries.

    It minimises ``|X W + b - Y|^2 + penalty |W|^2`` for every penalty at once, by one singular value decomposition.

    Args:
        features: ``(n, D)``.
        targets: ``(n, C)``.
        queries: ``(m, D)``.
        penalties: R of them, above 0.

    Returns:
        ``(R, m)``.
    """
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0).clamp(min=SMALLEST_STD)
    features, queries = ((states - mean) / std for states in (features, queries))
    offset = targets.mean(dim=0)  # the best b, as the columns of X have the mean 0
    left, values, right = torch.linalg.svd(features, full_matrices=False)
    projected = left.t() @ (targets - offset)  # (r, C)
    turned = queries @ right.t()  # (m, r)
    shrunk = (values / (values.square() + penalty) for penalty in penalties)
    return torch.stack([(turned @ (factor[:, None] * projected) + offset).argmax(dim=1) for factor in shrunk])
