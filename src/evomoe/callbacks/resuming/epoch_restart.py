"""The first epoch after a resume."""

from __future__ import annotations

import lightning as L


class EpochRestart(L.Callback):
    """Begins a new epoch where a run resumes from a checkpoint of the last step of one.

    Lightning takes such a resume for one inside the old epoch: the new one begins without ``on_train_epoch_start`` and
    without being counted. Its checkpoints then look as if they had been saved between two epochs, and a run that
    resumes from one of them repeats the epoch from its start.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the epoch that comes, if the old one is over."""
        progress = trainer.fit_loop.epoch_progress.total
        if trainer.fit_loop.restarted_mid_epoch and progress.completed == progress.ready:
            trainer.fit_loop.reset_restart_stage()
