"""The validation of the last weights."""

from __future__ import annotations

from typing import Any

import lightning as L

from evomoe.run_length import is_last_step


class FinalValidation(L.Callback):
    """Has the last weights validated, whether or not ``val_check_interval`` meets the end of the run.

    Only a ``check_val_every_n_epoch`` that leaves out the last epoch keeps them from it.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask for a validation after the last batch."""
        if is_last_step(trainer):
            trainer.should_stop = True  # the run is over anyway, and Lightning validates before it obeys
