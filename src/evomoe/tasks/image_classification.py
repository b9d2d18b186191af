"""Image classification: which of the classes an image shows.

Shapes: B batch, S tokens of an image, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.models.flops import Work
from evomoe.models.vit import ViT
from evomoe.routing import Routing, Words
from evomoe.tasks.evaluated_task import EvaluatedTask
from evomoe.tasks.mixing import Mixed, cut_mix, mix_up
from evomoe.tasks.moe_task import Coefficient
from evomoe.tasks.optimization import Optimization
from evomoe.tasks.rule_means import RuleMeans

TOP = 5


class ImageClassification(EvaluatedTask):
    """Trains a :class:`ViT` on batches ``{"images": (B, C, H, W), "labels": (B,), "valid": (B,) bool}``.

    The loss is the mean cross-entropy, in training against smoothed and mixed labels, in evaluations against the true
    ones alone. Evaluations log, under both rules, ``loss``, ``accuracy`` and ``accuracy_top5``, the share of the images
    whose class is among the five likeliest.

    Args:
        model: the network.
        optimization: optimizer and learning-rate schedule.
        loss_coefficients: factor of each auxiliary loss by its name, see :class:`MoETask`.
        balance_scope: ``local`` or ``global``, see :class:`MoETask`.
        label_smoothing: share of a label that is spread evenly over all classes.
        mixup: alpha of :func:`~evomoe.tasks.mixing.mix_up`; 0 for none.
        cutmix: alpha of :func:`~evomoe.tasks.mixing.cut_mix`; 0 for none. With both, each batch draws one of the two.
    """

    reads = "images"

    def __init__(
        self,
        model: ViT,
        optimization: Optimization,
        loss_coefficients: Mapping[str, float | Coefficient] | None = None,
        balance_scope: str = "local",
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__(model, optimization, loss_coefficients, balance_scope)
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"task.label_smoothing={label_smoothing}: expected a share in [0, 1), such as 0.1")
        for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
            if alpha < 0:
                raise ConfigError(f"task.{name}={alpha}: expected 0 for none, or an alpha above it, such as 0.2")
        self.label_smoothing = label_smoothing
        self.mixings = [(mix, alpha) for mix, alpha in ((mix_up, mixup), (cut_mix, cutmix)) if alpha]
        self.means = RuleMeans("loss", "accuracy", "accuracy_top5")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of images ``(B, C, H, W)``."""
        return self.model(images)[0]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """One forward pass; returns the optimized loss, and for the callbacks what was done."""
        images, labels, other_labels, share = self._mix(batch["images"], batch["labels"])
        logits, routings = self.model(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if share < 1:
            other_loss = F.cross_entropy(logits, other_labels, label_smoothing=self.label_smoothing)
            loss = share * loss + (1 - share) * other_loss
        positions = len(labels) * self.model.num_tokens
        flops = self.model.flops_per_image([routing.rows / positions for routing in routings])
        work = Work(tokens=positions, forward_flops=flops * len(labels))
        return self.training_outputs(loss, routings, work)

    def evaluation_step(self, batch: dict[str, Tensor], batch_idx: int, split: str) -> dict[str, Any]:
        """Add loss and accuracies of one batch."""
        sums, sparse_sums, final_routings = self.under_both_rules(partial(self._classify, batch))
        self.means.update(batch["valid"].sum(), sums, sparse_sums)
        words = Words(None, self.model.spread_over_tokens(batch["valid"]))
        return {"final_routings": final_routings, "words": [words] * len(final_routings)}

    def _mix(self, images: Tensor, labels: Tensor) -> Mixed:
        if not self.mixings:
            return Mixed(images, labels, labels, 1.0)
        choice = int(torch.randint(len(self.mixings), ())) if len(self.mixings) > 1 else 0
        mix, alpha = self.mixings[choice]
        return mix(images, labels, alpha)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Logits ``(B, C)`` under the final sparse rule; loaders for evaluation have a drawn order."""
        return self.model(batch["images"], valid=batch.get("valid"), final_rule=True)[0]

    def _classify(self, batch: dict[str, Tensor], final_rule: bool = False) -> tuple[dict[str, Tensor], list[Routing]]:
        """Sums over the real images, and the routings."""
        labels, valid = batch["labels"], batch["valid"]
        logits, routings = self.model(batch["images"], valid=valid, final_rule=final_rule)
        logits = logits.float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        found = logits.topk(min(TOP, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        values = {"loss": losses, "accuracy": found[:, 0], "accuracy_top5": found.any(dim=1)}
        return {name: value[valid].sum() for name, value in values.items()}, routings
