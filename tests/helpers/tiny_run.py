"""A run of seconds with all that makes resuming hard: dropout, accumulation, shuffling, validation that draws numbers.

Tests import it, and run it as a script where a real process has to die.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from evomoe.callbacks.resuming.checkpoint import SafeCheckpoint
from evomoe.callbacks.resuming.random_state import RandomState
from evomoe.checkpointing import VerifiedCheckpointIO, newest_checkpoint
from evomoe.signals import leave_signals_to_trainer

BATCHES = 7  # odd, so that with accumulation 2 every epoch ends in an open window
BATCH_SIZE = 4
RANK = int(os.environ.get("LOCAL_RANK", 0))


class TinyTask(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 1))

    def setup(self, stage):
        torch.manual_seed(torch.initial_seed() + RANK)  # ranks draw different dropout masks

    def training_step(self, batch, batch_idx):
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        torch.rand(5)
        self.log("val/loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def examples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator)
    return TensorDataset(x, x.prod(1, keepdim=True))


class ResumableLoader:
    """Batches whose order is a function of the epoch, and whose position travels in the checkpoint."""

    def __init__(self, workers: int = 0) -> None:
        self.workers = workers
        self.served = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self):
        epoch, done = divmod(self.served, BATCHES)
        order = torch.randperm(BATCHES * BATCH_SIZE, generator=torch.Generator().manual_seed(epoch))
        loader = DataLoader(
            examples(BATCHES * BATCH_SIZE, seed=1),
            batch_sampler=order.view(BATCHES, BATCH_SIZE)[done:].tolist(),
            num_workers=self.workers,
            worker_init_fn=leave_signals_to_trainer,
        )
        for batch in loader:
            self.served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.served = state["served"]


class PauseAt(L.Callback):
    """Says "paused <process id>" before a batch (counted over epochs) and waits for a line on standard input."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            print("paused", os.getpid(), flush=True)
            sys.stdin.readline()


def fit(
    run_dir: Path, callbacks=(), *, resume=None, every_n_steps=3, keep_last=2, workers=0, seed=0, config=None, **kw
):
    """One fit in ``run_dir``; returns the task and its trainer."""
    L.seed_everything(seed)
    if resume == "auto":
        resume = newest_checkpoint(run_dir)
    task = TinyTask()
    checkpoint = SafeCheckpoint(run_dir, every_n_steps=every_n_steps, keep_last=keep_last, config=config)
    settings = {"max_steps": 14, "accumulate_grad_batches": 2, "accelerator": "cpu", "devices": 1, **kw}
    trainer = L.Trainer(
        callbacks=[RandomState(), *callbacks, checkpoint],
        plugins=[VerifiedCheckpointIO()],
        default_root_dir=run_dir,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(task, ResumableLoader(workers), DataLoader(examples(8, seed=2), batch_size=4), ckpt_path=resume)
    return task, trainer


def weights_hash(state_dict: dict[str, torch.Tensor]) -> str:
    """sha256 over names and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--resume")
    parser.add_argument("--max-steps", type=int, default=14)
    parser.add_argument("--pause-at", type=int, default=-1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--pause-rank", type=int, default=0)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    task, _ = fit(
        arguments.run_dir,
        [PauseAt(arguments.pause_at)] if arguments.pause_rank == RANK else [],
        resume=arguments.resume,
        max_steps=arguments.max_steps,
        workers=arguments.workers,
        devices=arguments.devices,
        strategy="ddp" if arguments.devices > 1 else "auto",
    )
    if RANK == 0:
        print("weights", weights_hash(task.state_dict()), flush=True)
