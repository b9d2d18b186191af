"""Classification and regression of sentences, from a pretrained encoder or from scratch.

Shapes: B batch, S sequence, C classes, N real sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.models.flops import Work
from evomoe.models.sequence_classifier import SequenceClassifier
from evomoe.routing import Routing, Words
from evomoe.tasks.evaluated_task import EvaluatedTask
from evomoe.tasks.moe_task import Coefficient
from evomoe.tasks.optimization import Optimization
from evomoe.tasks.rule_means import RuleMeans
from evomoe.tasks.sequence_scores import SequenceScores


class SequenceClassification(EvaluatedTask):
    """Trains a :class:`SequenceClassifier` on batches ``{"tokens": (B, S), "valid": (B, S) bool, "labels": (B,)}``.

    The loss is the mean cross-entropy of a sequence, or its mean squared error where the model has a single output.
    Evaluations log, under both rules, ``loss`` and the scores of ``metrics``; a test of classes also
    ``majority_accuracy``, that of guessing the most frequent class of the training split every time.

    Args:
        model: the network.
        optimization: optimizer and learning-rate schedule.
        loss_coefficients: factor of each auxiliary loss by its name, see :class:`MoETask`.
        balance_scope: ``local`` or ``global``, see :class:`MoETask`.
        metrics: ``accuracy``, ``f1``, ``matthews``; for numbers ``pearson``, ``spearman``.
        freeze_routers: leave the routers as they are, the running state of those that adapt included.
    """

    reads = "labelled sentences"

    def __init__(
        self,
        model: SequenceClassifier,
        optimization: Optimization,
        loss_coefficients: Mapping[str, float | Coefficient] | None = None,
        balance_scope: str = "local",
        metrics: Sequence[str] = ("accuracy",),
        freeze_routers: bool = False,
    ) -> None:
        super().__init__(model, optimization, loss_coefficients, balance_scope)
        self.is_regression = model.out.out_features == 1
        self.means = RuleMeans("loss")
        self.scores = SequenceScores(metrics, model.out.out_features)
        self.majority = RuleMeans("accuracy")
        self.majority_class: int | None = None
        self.freeze_routers = freeze_routers
        self.is_pretrained = False
        if freeze_routers:
            for layer in model.moe_layers.values():
                layer.router.requires_grad_(False)

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the encoder, routers included, of a pretrained task.

        Args:
            state_dict: of the task.

        Raises:
            RuntimeError: its model is another one.
        """
        prefix = "model."
        weights = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        self.model.load_encoder(weights)
        self.is_pretrained = True

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """Outputs ``(B, C)`` of sequences ``(B, S)``."""
        return self.model(tokens, valid=valid)[0]

    def setup(self, stage: str) -> None:
        """Show the text to routers that ask for it, but for those that have read another; find the largest class."""
        if self.is_regression and self.trainer.precision in ("16-true", "bf16-true"):
            mixed = self.trainer.precision.replace("true", "mixed")
            raise ConfigError(
                f"trainer.precision={self.trainer.precision} rounds the numbers to learn to three digits: use {mixed}"
            )
        if not self.is_pretrained:
            super().setup(stage)
        if stage == "test" and not self.is_regression:
            labels = torch.as_tensor(self.trainer.datamodule.training_labels())  # type: ignore[attr-defined]
            self.majority_class = int(labels.bincount().argmax())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """One forward pass; returns the optimized loss, and for the callbacks what was done."""
        outputs, routings = self.model(batch["tokens"], valid=batch["valid"])
        loss = self._losses_of(outputs.float(), batch["labels"]).mean()
        sequences, length = batch["tokens"].shape
        positions = sequences * length
        flops = self.model.forward_flops(sequences, length, [routing.rows / positions for routing in routings])
        work = Work(tokens=batch["valid"].sum(), forward_flops=flops)
        return self.training_outputs(loss, routings, work)

    def begin_evaluation(self) -> None:
        """Count from nothing."""
        super().begin_evaluation()
        self.scores.reset()
        self.majority.reset()

    def evaluation_step(self, batch: dict[str, Tensor], batch_idx: int, split: str) -> dict[str, Any]:
        """Add loss and scores of one batch; a test also counts how often a constant guess is right."""
        outputs, sparse_outputs, final_routings = self.under_both_rules(partial(self._classify, batch))
        labels = batch["labels"][batch["valid"][:, 0]]
        loss, sparse_loss = (self._losses_of(values, labels).sum() for values in (outputs, sparse_outputs))
        self.means.update(len(labels), {"loss": loss}, {"loss": sparse_loss})
        self.scores.update(outputs, sparse_outputs, labels)
        if split == "test" and self.majority_class is not None:
            hits = (labels == self.majority_class).sum()
            self.majority.update(len(labels), {"accuracy": hits}, {"accuracy": hits})
        words = Words(batch["tokens"], batch["valid"])
        return {"final_routings": final_routings, "words": [words] * len(final_routings)}

    def evaluation_results(self, split: str) -> dict[str, Tensor | float]:
        """Loss and scores; of a test of classes also the accuracy of a constant guess."""
        values = super().evaluation_results(split) | self.scores.compute()
        if split == "test" and self.majority_class is not None:
            values["majority_accuracy"] = self.majority.compute()["accuracy"]
        return values

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Logits ``(B, C)``, or numbers ``(B, 1)``, under the final sparse rule; evaluation has a drawn order."""
        return self.model(batch["tokens"], valid=batch["valid"], final_rule=True)[0]

    def _losses_of(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of each sequence, ``(N,)``."""
        if self.is_regression:
            return F.mse_loss(outputs[:, 0], labels, reduction="none")
        return F.cross_entropy(outputs, labels, reduction="none")

    def _classify(self, batch: dict[str, Tensor], final_rule: bool = False) -> tuple[Tensor, list[Routing]]:
        """Outputs ``(N, C)`` of the real sequences, and the routings."""
        outputs, routings = self.model(batch["tokens"], valid=batch["valid"], final_rule=final_rule)
        return outputs.float()[batch["valid"][:, 0]], routings

    def _adapt_routers(self) -> None:
        if self.freeze_routers:
            self._counts.clear()
        else:
            super()._adapt_routers()
