"""Saving: at the right moments, the right files, and on a signal."""

from __future__ import annotations

import math
import signal
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

import evomoe
from evomoe import checkpointing
from evomoe.errors import ConfigError, EvomoeWarning
from evomoe.run_length import is_last_step
from evomoe.signals import StopRequest

SCORES = ("accuracy", "bleu", "chrf", "exact_match", "f1", "matthews", "pearson", "spearman")
"""Words in the names of metrics of which more is better."""


class SafeCheckpoint(Checkpoint):
    """Saves checkpoints from which a run goes on bit for bit, and saves before it obeys SIGTERM or Ctrl-C.

    Saves after every ``every_n_steps`` optimizer steps, after a validation that beat all before it, and when the fit
    ends; never inside an accumulation window, whose gradients no checkpoint holds: a fit that is asked to stop inside
    one, by a time limit or an early stopping, goes on to its end. Where a validation follows the step, the save waits
    for its end, so that the saved state has seen its result. Keeps the newest ``keep_last`` files and the best. A fit
    that stops by an error saves nothing: the newest file is the last good state.

    SIGTERM and SIGINT save at the end of the present accumulation window, on all ranks if any rank was signalled, then
    end the process with status 143 or 130 and one line that says how to go on. A validation that is due at that step
    comes first, and what has seen its result is saved again, so that no resumed run lacks it. A second signal ends the
    process at once.

    Lightning's ``ModelCheckpoint`` is not the base: it saves the best and the last into separate files, postpones
    periodic saves until its metric exists, overwrites a ``last.ckpt``, and restores paths of the saving machine.

    Needs the plugin :class:`~evomoe.checkpointing.VerifiedCheckpointIO` in the trainer, and
    :class:`~evomoe.callbacks.resuming.random_state.RandomState` before all other callbacks for dropout to resume
    exactly.

    Args:
        run_dir: folder of the run; files go to ``<run_dir>/checkpoints``.
        every_n_steps: optimizer steps between two saves.
        keep_last: number of newest checkpoints to keep; 2 or more leave a whole one if the disk damages the newest.
        monitor: logged metric that decides which checkpoint is the best.
        mode: ``"min"`` or ``"max"``: whether less or more of it is better. None for ``"max"`` of an
            accuracy, BLEU and the other scores of the tasks, and ``"min"`` of anything else.
        config: the run's configuration in plain values, stored under ``checkpoint["evomoe"]["config"]``.

    Raises:
        ConfigError: an argument is out of range, the plugin is missing, the metric is not logged, or the run folder
            already holds newer checkpoints than the step that this fit starts from.
    """

    def __init__(
        self,
        run_dir: str | Path,
        every_n_steps: int = 1000,
        keep_last: int = 2,
        monitor: str = "val/loss",
        mode: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"every_n_steps={every_n_steps} must be at least 1 optimizer step between two saves")
        if keep_last < 1:
            raise ConfigError(f"keep_last={keep_last} must be at least 1, or there is nothing to resume from")
        if mode is None:
            mode = "max" if any(score in monitor for score in SCORES) else "min"
        if mode not in ("min", "max"):
            raise ConfigError(f"mode={mode!r} must be 'min', 'max' or null")
        self.run_dir = Path(run_dir)
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self.monitor = monitor
        self.mode = mode
        self.config = config or {}
        self._stop = StopRequest()
        self._step = 0  # optimizer steps taken, as of the latest batch
        self._saved_step = 0
        self._stepped = False  # whether the latest batch ended an accumulation window
        self._save_due = False
        self._stop_postponed = False
        self._signum_of_validation = 0  # that came before a validation, to be obeyed after it
        self._best: checkpointing.Best | None = None

    @property
    def best_model_path(self) -> str:
        """Path of the best checkpoint for ``trainer.test(ckpt_path="best")``; empty before the first validation."""
        best = checkpointing.read_best(self.run_dir)
        return str(checkpointing.checkpoint_path(self.run_dir, best.step)) if best else ""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a trainer whose files would carry no checksum."""
        if not isinstance(trainer.strategy.checkpoint_io, checkpointing.VerifiedCheckpointIO):
            raise ConfigError(
                "SafeCheckpoint needs Trainer(plugins=[VerifiedCheckpointIO()]) for its files to be verified"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a used run folder, then listen to signals."""
        self._step = self._saved_step = trainer.global_step
        self._stepped = self._save_due = self._stop_postponed = False
        newer = [path for step, path in checkpointing.list_checkpoints(self.run_dir).items() if step > self._step]
        if newer and (newest := checkpointing.newest_checkpoint(self.run_dir)) in newer:
            raise ConfigError(
                f"{self.run_dir} already holds {newest.name}, beyond the step {self._step} that this run starts from;"
                " go on from it (resume=auto), or give another run_name"
            )
        if trainer.is_global_zero and self._best is not None:
            # The process may have been killed before it could be marked. In another folder than before it is not there.
            is_here = checkpointing.checkpoint_path(self.run_dir, self._best.step).exists()
            if is_here and self._is_better(self._best):
                checkpointing.write_best(self.run_dir, self._best)
        # Lightning set its own SIGTERM handler just before; it would stop inside an accumulation window.
        self._stop.listen(announce=trainer.is_global_zero)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save if it is time to, and obey a signal."""
        self._stepped = trainer.global_step != self._step
        if not self._stepped:
            self._postpone_stop(trainer)
            return
        trainer.should_stop |= self._stop_postponed
        self._step = trainer.global_step
        is_last = is_last_step(trainer)
        self._save_due |= self._step % self.every_n_steps == 0 or trainer.should_stop or is_last
        # The end of the fit obeys a signal of the last step: no later run could make up for its validation.
        signum = 0 if is_last else self._agreed_signal(trainer)
        validates = _validation_follows(trainer)
        if signum or (self._save_due and not validates):
            self._save(trainer)
        if signum and not validates:
            self._quit(trainer, signum)
        self._signum_of_validation = signum

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what is due or best."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        best = self._new_best(trainer)
        if not self._stepped:
            if best is not None:
                warnings.warn(
                    f"{self.monitor}={best.value:.6g} is the best so far, but inside an accumulation window nothing can"
                    " be saved; make val_check_interval a multiple of accumulate_grad_batches",
                    EvomoeWarning,
                    stacklevel=2,
                )
            self._postpone_stop(trainer)
            return
        if self._signum_of_validation:
            self._saved_step = -1  # what was saved has not seen this validation
        if best is not None or self._save_due or trainer.should_stop or self._signum_of_validation:
            self._save(trainer, best)
        if self._signum_of_validation:
            self._quit(trainer, self._signum_of_validation)

    def _postpone_stop(self, trainer: L.Trainer) -> None:
        """Let a stop inside an accumulation window wait for its end; Lightning lists this callback after all others."""
        self._stop_postponed |= trainer.should_stop
        trainer.should_stop = False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save if a callback has just asked to stop."""
        if trainer.should_stop:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final weights if no hook before could, give the signals back, and obey one that came too late."""
        self._save(trainer)
        self._stop.release()
        if signum := self._agreed_signal(trainer):
            self._quit(trainer, signum)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._stop.release()

    def on_save_checkpoint(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Add what a reader needs to rebuild the run."""
        checkpoint["evomoe"] = {"version": evomoe.__version__, "config": self.config}

    def _save(self, trainer: L.Trainer, best: checkpointing.Best | None = None) -> None:
        """Save the present step unless it is saved, mark it if it is the best, and remove what is no longer kept."""
        self._save_due = False
        self._best = best or self._best
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a helper of the trainer
            return
        if self._saved_step != trainer.global_step:
            path = checkpointing.checkpoint_path(self.run_dir, trainer.global_step)
            trainer.save_checkpoint(path, weights_only=False)
            self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            if best is not None:
                checkpointing.write_best(self.run_dir, best)
            self._remove_old()

    def _remove_old(self) -> None:
        best = checkpointing.read_best(self.run_dir)
        reached = [step for step in checkpointing.list_checkpoints(self.run_dir) if step <= self._saved_step]
        for step in reached[: -self.keep_last]:
            if best is None or step != best.step:
                checkpointing.remove_checkpoint(checkpointing.checkpoint_path(self.run_dir, step))

    def _new_best(self, trainer: L.Trainer) -> checkpointing.Best | None:
        """The present step if its metric beats the best so far; rank 0 decides for all."""
        if self.monitor not in trainer.callback_metrics:
            names = sorted(trainer.callback_metrics)
            logged = [name for name in names if name.startswith("val/")] or names or ["none"]
            raise ConfigError(
                f"callbacks.checkpoint.monitor={self.monitor} is not measured: expected one of {', '.join(logged)}"
            )
        value = trainer.callback_metrics[self.monitor].item()
        found = checkpointing.Best(step=trainer.global_step, monitor=self.monitor, value=value)
        is_best = trainer.is_global_zero and math.isfinite(value) and self._is_better(found)
        return found if trainer.strategy.broadcast(is_best) else None

    def _is_better(self, found: checkpointing.Best) -> bool:
        """Whether a checkpoint of the run's folder, or about to be, beats the one that is marked as the best."""
        best = checkpointing.read_best(self.run_dir)
        if found.monitor != self.monitor:
            return False
        if best is None or best.monitor != self.monitor:  # of an earlier part of the run; no value to compare with
            return True
        if found.step <= best.step:  # whose file is this one, or was lost: a run is past all whole ones of its folder
            return True
        return found.value < best.value if self.mode == "min" else found.value > best.value

    def state_dict(self) -> dict[str, Any]:
        """The best checkpoint so far, this one perhaps: it is marked as such once it is on disk."""
        return {} if self._best is None else {"best": asdict(self._best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember which one that was."""
        if state_dict:
            self._best = checkpointing.Best(**state_dict["best"])

    def _agreed_signal(self, trainer: L.Trainer) -> int:
        """The signal that any rank received, 0 for none."""
        signum = self._stop.signum or 0
        if trainer.world_size == 1:
            return signum
        highest = torch.tensor(signum, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(highest, reduce_op="max"))

    def _way_on(self) -> str:
        """Overrides that continue this run, in its own folder where that is the folder of its name."""
        run_name = self.config.get("run_name")
        if run_name == Path(self.run_dir).name:
            return f"run_name={run_name} resume=auto"
        return f"ckpt_path={checkpointing.checkpoint_path(self.run_dir, self._step)}"

    def _quit(self, trainer: L.Trainer, signum: int) -> None:
        if trainer.is_global_zero:
            name = signal.Signals(signum).name
            print(
                f"Stopped by {name} after optimizer step {self._step}; to go on, add {self._way_on()} to the command",
                file=sys.stderr,
            )
        raise SystemExit(128 + signum)


def _validation_follows(trainer: L.Trainer) -> bool:
    """Whether Lightning will validate right after this batch; it has no public name for that."""
    fit_loop = trainer.fit_loop
    assert fit_loop._data_fetcher is not None
    return fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)
