"""What the tasks share in evaluations: both routing rules, over the whole of a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from evomoe.routing import Routing
from evomoe.tasks.moe_task import MoETask
from evomoe.tasks.rule_means import RuleMeans

Values = TypeVar("Values")


class EvaluatedTask(MoETask):
    """Base of the tasks that are validated and tested, both in the same way.

    Each batch is measured under two rules: the rule of training, without noise, and, with the suffix ``_sparse``, the
    router's final sparse rule. A task sets ``means``, and says in :meth:`evaluation_step` what one batch adds to it.
    """

    means: RuleMeans

    def begin_evaluation(self) -> None:
        """Count from nothing."""
        self.means.reset()

    def evaluation_step(self, batch: dict[str, Tensor], batch_idx: int, split: str) -> dict[str, Any]:
        """Add one batch.

        Args:
            batch: of the split.
            batch_idx: its place among the batches of this process.
            split: ``val`` or ``test``.

        Returns:
            For the callbacks ``final_routings``, what the final rule did, and ``words``, which tokens each saw.
        """
        raise NotImplementedError

    def evaluation_results(self, split: str) -> dict[str, Tensor | float]:
        """What an evaluation found, by the name under which it is logged, without the split."""
        return dict(self.means.compute())

    def under_both_rules(
        self, measure: Callable[[bool], tuple[Values, Sequence[Routing]]]
    ) -> tuple[Values, Values, Sequence[Routing]]:
        """What ``measure(final_rule)`` finds under the rule of training and under the final one.

        The second forward pass is spared where the two are the same.

        Args:
            measure: a forward pass; returns what it finds, and the routings.

        Returns:
            What it finds under each rule, and the routings of the final one.
        """
        values, routings = measure(False)
        final_values, final_routings = measure(True) if self._rules_differ() else (values, routings)
        return values, final_values, final_routings

    def on_validation_epoch_start(self) -> None:
        """Count from nothing."""
        self.begin_evaluation()

    def on_test_epoch_start(self) -> None:
        """Count from nothing."""
        self.begin_evaluation()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Add one batch; returns what :meth:`evaluation_step` does."""
        return self.evaluation_step(batch, batch_idx, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Add one batch; returns what :meth:`evaluation_step` does."""
        return self.evaluation_step(batch, batch_idx, "test")

    def on_validation_epoch_end(self) -> None:
        """Log what was found."""
        self._log_results("val")

    def on_test_epoch_end(self) -> None:
        """Log what was found."""
        self._log_results("test")

    def _rules_differ(self) -> bool:
        layers = self.model.moe_layers.values()
        return any(layer.routes and layer.router.rules_differ for layer in layers)

    def _log_results(self, split: str) -> None:
        # Equal on all processes already; sync_dist keeps Lightning from doubting it.
        results = self.evaluation_results(split)
        self.log_dict({f"{split}/{name}": value for name, value in results.items()}, sync_dist=True)
