"""Masked language modelling: guess hidden words from both sides.

Shapes: B batch, S sequence, V vocabulary, n chosen tokens.
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
from evomoe.models.roberta import RoBERTa
from evomoe.routing import Routing, Words
from evomoe.routing.hash_tables import count_ids
from evomoe.tasks.evaluated_task import EvaluatedTask
from evomoe.tasks.masking import mask_tokens
from evomoe.tasks.moe_task import Coefficient
from evomoe.tasks.optimization import Optimization
from evomoe.tasks.rule_means import RuleMeans, perplexities


class MaskedLanguageModeling(EvaluatedTask):
    """Trains a :class:`RoBERTa` on the windows of a causal language model, ``{"tokens": (B, S + 1)}``.

    A marker, the end of a text, takes the place of each window's first token: as in RoBERTa (arXiv 1907.11692), a
    classifier reads the state there. Markers are never hidden. Which tokens are is drawn anew in every step of
    training, from the random numbers that a resumed run repeats, and alike in every evaluation, on a CPU as on a GPU,
    by as many processes in batches of the same size. The loss is the mean cross-entropy of the chosen tokens.
    Evaluations log, under both rules, ``loss``, ``perplexity`` of a chosen token, and ``accuracy``; a test also
    ``unigram_accuracy``, that of guessing the most frequent token of the training split every time.

    Args:
        model: the network.
        optimization: optimizer and learning-rate schedule.
        loss_coefficients: factor of each auxiliary loss by its name, see :class:`MoETask`.
        balance_scope: ``local`` or ``global``, see :class:`MoETask`.
        share: probability of a token to be chosen.
        whole_words: choose words with all of their tokens.
    """

    word_starts: Tensor | None

    reads = "text"

    def __init__(
        self,
        model: RoBERTa,
        optimization: Optimization,
        loss_coefficients: Mapping[str, float | Coefficient] | None = None,
        balance_scope: str = "local",
        share: float = 0.15,
        whole_words: bool = False,
    ) -> None:
        super().__init__(model, optimization, loss_coefficients, balance_scope)
        if not 0 < share < 1:
            raise ConfigError(f"task.share={share}: expected a share of the tokens in (0, 1), such as 0.15")
        self.share = share
        starts = torch.ones(model.mask_id, dtype=torch.bool) if whole_words else None
        self.register_buffer("word_starts", starts, persistent=False)
        self.marker_id = -1  # of the tokenizer; known from setup on
        self.most_frequent_id: int | None = None
        self.means = RuleMeans("loss", "accuracy")
        self.unigram = RuleMeans("accuracy")

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(B, S, V)`` of tokens ``(B, S)``."""
        return self.model(tokens)[0]

    def setup(self, stage: str) -> None:
        """Take from the data the marker, where words begin, and the most frequent one."""
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.model_sizes()["vocab_size"] != data.vocab_size + 1:
            raise ConfigError(
                "data.mask_token=false: masked language modelling needs a token to hide words; set it to true"
            )
        self.marker_id = data.tokenizer.end_of_text_id
        if self.word_starts is not None:
            self.word_starts.copy_(torch.tensor(data.tokenizer.word_starts()))
        if stage == "test":
            counts = count_ids(data.training_ids(), data.vocab_size)
            counts[self.marker_id] = 0  # never asked for
            self.most_frequent_id = int(counts.argmax())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """One forward pass; returns the optimized loss, and for the callbacks what was done."""
        batch = self._begin(batch)
        inputs, chosen = self._mask(batch, None)
        sums, routings = self._guess(batch, inputs, chosen)
        sequences, length = inputs.shape
        rows = [routing.rows / inputs.numel() for routing in routings]
        count = int(chosen.sum())
        flops = self.model.flops_per_token(length, rows, scored=count / inputs.numel())
        work = Work(tokens=sequences * length, forward_flops=flops * inputs.numel())
        return self.training_outputs(sums["loss"] / max(count, 1), routings, work)

    def begin_evaluation(self) -> None:
        """Count from nothing."""
        super().begin_evaluation()
        self.unigram.reset()

    def evaluation_step(self, batch: dict[str, Tensor], batch_idx: int, split: str) -> dict[str, Any]:
        """Add loss and accuracy of one batch; a test also counts how often a constant guess is right."""
        # The same masks in every evaluation; other ones in every batch and process. A GPU would draw other ones.
        seed = batch_idx * self.trainer.world_size + self.global_rank
        batch = self._begin(batch)
        inputs, chosen = self._mask(batch, torch.Generator().manual_seed(seed))
        sums, sparse_sums, final_routings = self.under_both_rules(partial(self._guess, batch, inputs, chosen))
        count = chosen.sum()
        self.means.update(count, sums, sparse_sums)
        if split == "test" and self.most_frequent_id is not None:
            hits = (batch["tokens"][chosen] == self.most_frequent_id).sum()
            self.unigram.update(count, {"accuracy": hits}, {"accuracy": hits})
        words = Words(inputs, batch.get("valid"))
        return {"final_routings": final_routings, "words": [words] * len(final_routings)}

    def evaluation_results(self, split: str) -> dict[str, Tensor | float]:
        """The means over the chosen tokens; of a test also the accuracy of a constant guess."""
        means = self.means.compute()
        results: dict[str, Tensor | float] = {**means, **perplexities(means)}
        if split == "test":
            results["unigram_accuracy"] = self.unigram.compute()["accuracy"]
        return results

    def _begin(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch without the id after each window, ``(B, S)``, and with a marker as its first token."""
        tokens = batch["tokens"][:, :-1].clone()
        tokens[:, 0] = self.marker_id
        return {**batch, "tokens": tokens}

    def _mask(self, batch: dict[str, Tensor], generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        return mask_tokens(
            batch["tokens"],
            batch.get("valid"),
            share=self.share,
            mask_id=self.model.mask_id,
            marker_id=self.marker_id,
            word_starts=self.word_starts,
            generator=generator,
        )

    def _guess(
        self, batch: dict[str, Tensor], inputs: Tensor, chosen: Tensor, final_rule: bool = False
    ) -> tuple[dict[str, Tensor], list[Routing]]:
        """Sums over the chosen tokens, of the loss and of those that the model gets right; and the routings."""
        targets = batch["tokens"][chosen]  # (n,)
        logits, routings = self.model(inputs, valid=batch.get("valid"), at=chosen, final_rule=final_rule)  # (n, V)
        right = (logits.argmax(dim=-1) == targets).sum()
        return {"loss": F.cross_entropy(logits.float(), targets, reduction="sum"), "accuracy": right}, routings
