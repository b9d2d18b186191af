"""Random state that belongs to training alone, and travels in the checkpoint."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist


def get_random_state(device: torch.device) -> dict[str, Any]:
    """States of the global generators of Python, NumPy, torch on CPU, and torch on ``device`` if that is CUDA."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Inverse of :func:`get_random_state`; a device without a saved state keeps its own."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class RandomState(L.Callback):
    """Starts each training batch with the random state in which the batch before it ended.

    What draws in between (validation, a new iterator of a loader, sampled text, set-up after a resume) cannot change
    training then: a resumed run draws the same dropout masks and routing noise as one that was never stopped, and so
    does a run that validates more often. In a distributed run the state of every rank is saved; a rank that the saved
    run did not have keeps the state it was seeded with.

    List it first, so that it acts before any callback that draws at the start of a batch.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget the state of an earlier fit."""
        self._state = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the state for the first batch, unless a checkpoint brought one."""
        if self._state is None:
            self._state = get_random_state(pl_module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Undo whatever was drawn since the last batch."""
        assert self._state is not None
        set_random_state(self._state, pl_module.device)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Remember the state for the next batch."""
        self._state = get_random_state(pl_module.device)

    def state_dict(self) -> dict[str, Any]:
        """The state of every rank, in tensors and plain values. Collective: every rank calls it."""
        if self._state is None:
            return {}
        name, key, *rest = self._state["numpy"]
        own = {**self._state, "numpy": (name, torch.from_numpy(key.astype(np.int64)), *rest)}
        ranks = [own]
        if dist.is_available() and dist.is_initialized():
            ranks = [own] * dist.get_world_size()
            dist.all_gather_object(ranks, own)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of a saved state."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        if rank >= len(state_dict["ranks"]):
            return
        own = dict(state_dict["ranks"][rank])
        name, key, *rest = own["numpy"]
        own["numpy"] = (name, key.numpy().astype(np.uint32), *rest)
        self._state = own
