"""Shows what the model translates: samples beside the curves, and all of the test in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from evomoe.callbacks.tensorboard import find_tensorboard
from evomoe.errors import ConfigError

FILE = "translations.txt"


class TranslationSamples(L.Callback):
    """Writes what :class:`evomoe.tasks.Translation` translates: samples to TensorBoard's text page, the test to a file.

    ``translations.txt`` in the run's folder begins with the scores' signatures and has, for each sentence, lines that
    begin with ``S`` for the source, ``R`` for the reference and ``H`` for the hypothesis; one with ``H_sparse`` where
    the final sparse rule leads to another.

    Args:
        count: sentences to show after a validation, the same every time: those of the sample that come first in the
            split.
    """

    def __init__(self, count: int = 8) -> None:
        if count < 1:
            raise ConfigError(f"callbacks.translations.count={count}: expected at least 1")
        self.count = count

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log some of what the task has translated."""
        tensorboard = find_tensorboard(trainer)
        if tensorboard is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        task: Any = pl_module
        # As they come they are sorted by length.
        shown = sorted(task.translations, key=lambda found: found.index)[: self.count]
        if shown:
            rows = ["| source | reference | hypothesis |", "|---|---|---|"]
            for sentence in shown:
                texts = (sentence.source, sentence.reference, sentence.hypothesis)
                rows.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |")
            tensorboard.experiment.add_text("translations", "\n".join(rows), trainer.global_step)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        task: Any = pl_module
        translations = task.scores.gather()  # by all processes together
        if not translations or not trainer.is_global_zero:
            return
        lines = [f"# BLEU {task.scores.bleu_signature}", f"# chrF {task.scores.chrf_signature}"]
        for sentence in translations:
            lines += ["", f"S {sentence.source}", f"R {sentence.reference}", f"H {sentence.hypothesis}"]
            if sentence.sparse_hypothesis != sentence.hypothesis:
                lines.append(f"H_sparse {sentence.sparse_hypothesis}")
        path = Path(trainer.default_root_dir) / FILE
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        rank_zero_info(f"All {len(translations):,} translations of the test: {path}")
