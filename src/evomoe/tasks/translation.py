"""Translation by an encoder-decoder.

Shapes: B batch, M source sequence, S target sequence, V joint vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.models.beam_search import Hypothesis, LengthLimit, beam_search
from evomoe.models.flops import Work
from evomoe.models.transformer import Transformer
from evomoe.routing import Routing, Words
from evomoe.routing.processes import alone
from evomoe.tasks.evaluated_task import EvaluatedTask
from evomoe.tasks.moe_task import Coefficient
from evomoe.tasks.optimization import Optimization
from evomoe.tasks.rule_means import RuleMeans, perplexities
from evomoe.tasks.translation_scores import TranslatedSentence, TranslationScores

NO_TARGET = -100
"""Marks padding among the targets."""


class Translation(EvaluatedTask):
    """Trains a :class:`Transformer` on batches of sentence pairs, see :class:`evomoe.data.pairs.batches.PairBatches`.

    The training loss is the mean cross-entropy of a target token with smoothed labels. Evaluations log, under both
    rules, ``loss``, without smoothing, and ``perplexity`` of a target token given the reference before it; and of
    translations by the model alone ``bleu``, ``chrf`` and ``exact_match``: of ``val_sentences`` drawn from the whole
    validation split, the same in each validation and whatever its number of batches; and of the whole test split.

    Args:
        model: the network.
        optimization: optimizer and learning-rate schedule.
        loss_coefficients: factor of each auxiliary loss by its name, see :class:`MoETask`.
        balance_scope: ``local`` or ``global``, see :class:`MoETask`.
        label_smoothing: share of the probability that the training targets spread over the vocabulary.
        beam: width of the beam search of the test.
        length_penalty: exponent of the length that divides a log-probability in a beam search.
        max_length_ratio: most tokens of a translation by those of its source, see
            :class:`~evomoe.models.beam_search.LengthLimit`; None for 0.
        max_length_offset: tokens beside them; None for 0. With neither, the context is the only limit.
        val_sentences: sentences to translate in each validation, by all processes together; 0 for none.
        val_beam: width of their beam search; 1 is greedy.
        bleu_tokenizer: how sacrebleu cuts the texts into words: ``13a``, ``intl``, ``char``, ``zh``, ``ja-mecab`` ...
    """

    reads = "sentence pairs"

    def __init__(
        self,
        model: Transformer,
        optimization: Optimization,
        loss_coefficients: Mapping[str, float | Coefficient] | None = None,
        balance_scope: str = "local",
        label_smoothing: float = 0.1,
        beam: int = 5,
        length_penalty: float = 1.0,
        max_length_ratio: float | None = None,
        max_length_offset: int | None = None,
        val_sentences: int = 64,
        val_beam: int = 1,
        bleu_tokenizer: str = "13a",
    ) -> None:
        super().__init__(model, optimization, loss_coefficients, balance_scope)
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"task.label_smoothing={label_smoothing}: expected a share in [0, 1), such as 0.1")
        for name, value, least in (("beam", beam, 1), ("val_sentences", val_sentences, 0), ("val_beam", val_beam, 1)):
            if value < least:
                raise ConfigError(f"task.{name}={value}: expected at least {least}")
        self.label_smoothing = label_smoothing
        self.beam = beam
        self.length_penalty = length_penalty
        self.max_length = LengthLimit(max_length_ratio, max_length_offset)
        self.val_sentences = val_sentences
        self.val_beam = val_beam
        self.means = RuleMeans("loss")
        self.scores = TranslationScores(bleu_tokenizer)

    @property
    def translations(self) -> list[TranslatedSentence]:
        """What this process translated in the last evaluation."""
        return self.scores.translations

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits ``(B, S, V)`` of targets ``(B, S)`` given sources ``(B, M)``."""
        return self.model(source, target)[0]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """One forward pass; returns the optimized loss, and for the callbacks what was done."""
        total, routings = self._cross_entropy(batch, smoothing=self.label_smoothing)
        count = batch["valid"].sum()
        (sequences, source), target = batch["source"].shape, batch["valid"].shape[1]
        # The encoder's layers come first, and see other tokens than the decoder's.
        half = len(routings) // 2
        active = [routing.rows / (sequences * source) for routing in routings[:half]]
        active += [routing.rows / (sequences * target) for routing in routings[half:]]
        flops = self.model.forward_flops(sequences, source, target, active)
        work = Work(tokens=count, forward_flops=flops)
        return self.training_outputs(total / count, routings, work)

    def begin_evaluation(self) -> None:
        """Count from nothing."""
        super().begin_evaluation()
        self.scores.reset()

    def evaluation_step(self, batch: dict[str, Tensor], batch_idx: int, split: str) -> dict[str, Any]:
        """Add the loss of one batch, and translate: all sentences of a test; of a validation a sample, at its start."""
        loss, sparse_loss, final_routings = self.under_both_rules(partial(self._cross_entropy, batch))
        self.means.update(batch["valid"].sum(), {"loss": loss}, {"loss": sparse_loss})
        # Here and not when the epoch begins or ends: autocast is on, and so are averaged weights. After the batch's own
        # forward pass, which is the first that callbacks listen to.
        if split == "test":
            self._translate(batch, split, self.beam)
        elif batch_idx == 0 and not self.trainer.sanity_checking:
            for sample in self.trainer.datamodule.sample(split, self.val_sentences):  # type: ignore[attr-defined]
                moved = {name: values.to(self.device) for name, values in sample.items()}
                self._translate(moved, split, self.val_beam)
        source, target = Words(batch["source"], batch["source_valid"]), Words(batch["target"][:, :-1], batch["valid"])
        half = len(final_routings) // 2
        words = [source] * half + [target] * (len(final_routings) - half)
        return {"final_routings": final_routings, "words": words}

    def evaluation_results(self, split: str) -> dict[str, Tensor | float]:
        """The means over the target tokens, and the scores of the translations."""
        means = self.means.compute()
        return {**means, **perplexities(means), **self.scores.compute()}

    def on_test_epoch_end(self) -> None:
        """Log what was found; print how the scores are computed."""
        super().on_test_epoch_end()
        rank_zero_info(f"BLEU: {self.scores.bleu_signature}; chrF: {self.scores.chrf_signature}")

    def _cross_entropy(
        self, batch: dict[str, Tensor], final_rule: bool = False, smoothing: float = 0.0
    ) -> tuple[Tensor, list[Routing]]:
        """Sum over the real target tokens, and the routings."""
        target, valid = batch["target"], batch["valid"]
        logits, routings = self.model(
            batch["source"],
            target[:, :-1],
            source_valid=batch["source_valid"],
            valid=valid,
            final_rule=final_rule,
        )
        scores = logits.flatten(0, 1).float()
        targets = target[:, 1:].masked_fill(~valid, NO_TARGET).flatten()
        total = F.cross_entropy(scores, targets, ignore_index=NO_TARGET, reduction="sum", label_smoothing=smoothing)
        return total, routings

    def _translate(self, batch: dict[str, Tensor], split: str, beam: int) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        end_id = data.tokenizer.end_of_text_id
        real = batch["index"] >= 0  # others fill up the batches of a process that has less
        rows = zip(batch["source"][real], batch["source_valid"][real], strict=True)
        sources = [source[valid].tolist() for source, valid in rows]
        if not sources:
            return

        def search(final_rule: bool) -> tuple[list[list[Hypothesis]], list[Routing]]:
            found = beam_search(
                self.model,
                sources,
                begin_id=end_id,
                end_id=end_id,
                beam=beam,
                length_penalty=self.length_penalty,
                max_length=self.max_length,
                final_rule=final_rule,
            )
            return found, []  # nobody wants the routings of so many passes

        with alone():  # the other processes write sentences of other lengths
            found, sparse_found, _ = self.under_both_rules(search)
        for index, best, sparse_best in zip(batch["index"][real].tolist(), found, sparse_found, strict=True):
            source, reference = data.texts(split, index)
            texts = (data.tokenizer.decode(hypotheses[0].tokens) for hypotheses in (best, sparse_best))
            self.scores.add(TranslatedSentence(index, source, reference, *texts))
