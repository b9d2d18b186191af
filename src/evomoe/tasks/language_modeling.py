"""Causal language modelling: predict the next token.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from evomoe.models.flops import Work
from evomoe.models.gpt import GPT
from evomoe.routing import Routing, Words
from evomoe.tasks.evaluated_task import EvaluatedTask
from evomoe.tasks.moe_task import Coefficient
from evomoe.tasks.optimization import Optimization
from evomoe.tasks.rule_means import RuleMeans, perplexities

NO_TARGET = -100


class LanguageModeling(EvaluatedTask):
    """Trains a :class:`GPT` on batches ``{"tokens": (B, S + 1)}``, and ``"valid": (B, S)`` where there is padding.

    The optimized loss is the mean cross-entropy plus, for every MoE layer, its auxiliary losses times their
    coefficients. Logged as ``train/loss`` is the cross-entropy alone; each auxiliary loss has a key of its own with its
    mean over the MoE layers. Validation and test measure two rules: ``val/loss`` routes as training does, without
    noise; ``val/loss_sparse`` by the router's final sparse rule.

    Args:
        model: the network.
        optimization: optimizer and learning-rate schedule.
        loss_coefficients: factor of each auxiliary loss by its name, see :class:`MoETask`.
        balance_scope: ``local`` or ``global``, see :class:`MoETask`.
    """

    reads = "text"

    def __init__(
        self,
        model: GPT,
        optimization: Optimization,
        loss_coefficients: Mapping[str, float | Coefficient] | None = None,
        balance_scope: str = "local",
    ) -> None:
        super().__init__(model, optimization, loss_coefficients, balance_scope)
        self.means = RuleMeans("loss")

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(B, S, V)`` of tokens ``(B, S)``."""
        return self.model(tokens)[0]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """One forward pass; returns the optimized loss, and for the callbacks the loss of the task and the routings."""
        total_loss, routings = self._cross_entropy(batch)
        count = _count(batch)
        sequences, length = batch["tokens"].shape
        positions = sequences * (length - 1)
        rows = [routing.rows / positions for routing in routings]
        forward_flops = positions * self.model.flops_per_token(length - 1, rows)
        work = Work(tokens=count, forward_flops=forward_flops)
        return self.training_outputs(total_loss / count, routings, work)

    def evaluation_step(self, batch: dict[str, Tensor], batch_idx: int, split: str) -> dict[str, Any]:
        """Add the loss of one batch."""
        loss, sparse_loss, final_routings = self.under_both_rules(partial(self._cross_entropy, batch))
        self.means.update(_count(batch), {"loss": loss}, {"loss": sparse_loss})
        words = Words(batch["tokens"][:, :-1], batch.get("valid"))
        return {"final_routings": final_routings, "words": [words] * len(final_routings)}

    def evaluation_results(self, split: str) -> dict[str, Tensor | float]:
        """The mean loss over all tokens, and perplexities; those of words and bytes as far as the data tell them."""
        means = self.means.compute()
        values: dict[str, Tensor | float] = {**means, **perplexities(means)}
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "units"):  # loaders of a user's own do not say of what text their tokens are
            units, loss = data.units(split), means["loss"]
            # Independent of the tokenizer: the same total surprise, shared among words or bytes.
            values["perplexity_word"] = (loss * units["tokens"] / units["words"]).exp()
            values["bits_per_byte"] = loss * units["tokens"] / units["bytes"] / math.log(2)
        return values

    def _cross_entropy(self, batch: dict[str, Tensor], final_rule: bool = False) -> tuple[Tensor, list[Routing]]:
        """Sum over the real tokens, and the routings."""
        tokens, valid = batch["tokens"], batch.get("valid")
        targets = tokens[:, 1:] if valid is None else tokens[:, 1:].masked_fill(~valid, NO_TARGET)  # (B, S)
        logits, routings = self.model(tokens[:, :-1], valid=valid, final_rule=final_rule)  # (B, S, V)
        scores = logits.flatten(0, 1).float()
        return F.cross_entropy(scores, targets.flatten(), ignore_index=NO_TARGET, reduction="sum"), routings


def _count(batch: dict[str, Tensor]) -> Tensor | int:
    """Real tokens to predict."""
    return batch["valid"].sum() if "valid" in batch else batch["tokens"][:, 1:].numel()
