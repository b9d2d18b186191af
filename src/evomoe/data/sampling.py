"""The order of training and of evaluation: resumable, and exact across processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from evomoe.errors import ConfigError
from evomoe.signals import leave_signals_to_trainer

Batch = dict[str, torch.Tensor]

# Both samplers are DistributedSamplers because Lightning leaves those alone; it would wrap others, sharding twice.


class TrainingSampler(DistributedSampler[Any]):
    """An endless training order that is a pure function of (seed, epoch), and can start anywhere.

    Global batch i of an epoch takes the next `world_size * batch_size` items of that epoch's permutation, and rank r
    the r-th run of `batch_size` of them. What does not fill a global batch is left to other epochs.

    One iteration yields as many batches as an epoch has, from `position` on, whatever epoch they belong to. So the
    order does not hang on the Trainer's epochs, which end early under `limit_train_batches` and of which it counts one
    too many when a run with `max_steps` is resumed from the end of an epoch: `set_epoch` changes nothing.

    Args:
        items: The data set.
        kind: What its items are, for an error message.
        identity: What the order depends on beside seed and world size, by the names that a user knows.
        batch_size: B.
        seed: Seed of the permutations.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ConfigError: There is not one global batch.
    """

    def __init__(
        self,
        items: Sized,
        kind: str,
        identity: Mapping[str, Any],
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        super().__init__(items, num_replicas=world_size, rank=rank, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.batches = len(items) // (batch_size * world_size)  # of an epoch
        self.position = 0  # batches handed over, over all epochs
        self.identity = {**identity, "data.seed": seed, "world size": world_size}
        self._items = len(items)
        if self.batches == 0:
            raise ConfigError(
                f"the training split has {self._items} {kind}, fewer than one batch of data.batch_size={batch_size} "
                f"on each of {world_size} processes; lower data.batch_size or give more data"
            )

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[Any]:
        epoch, batch = divmod(self.position, self.batches)
        start = batch * self.batch_size
        yield from self.order(epoch)[start:]
        if start:
            yield from self.order(epoch + 1)[:start]

    def order(self, epoch: int) -> list[Any]:
        """Return what this process takes in an epoch, a pure function of its arguments."""
        order = torch.randperm(self._items, generator=self.generator(epoch))[: len(self) * self.num_replicas]
        return order.view(self.batches, self.num_replicas, self.batch_size)[:, self.rank].flatten().tolist()

    def generator(self, epoch: int) -> torch.Generator:
        """Return the source of an epoch's draws, alike on all processes."""
        return torch.Generator().manual_seed(_mix(self.seed, epoch))


class EvaluationSampler(DistributedSampler[int]):
    """Items in an order drawn once for all, shared out one by one; every rank gets equally many, the last padding.

    Drawn, so that the few batches of a limited validation are a sample: files lie sorted by name, or by label. Equal
    numbers matter, as a rank that stops early would leave the others waiting in the collectives of the model.

    Args:
        items: The data set.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(self, items: Sized, rank: int, world_size: int) -> None:
        super().__init__(items, num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self._items = len(items)
        self._per_rank = -(-self._items // world_size)

    def __len__(self) -> int:
        return self._per_rank

    def __iter__(self) -> Iterator[int]:
        padding = torch.arange(self._items, self._per_rank * self.num_replicas)
        return iter(torch.cat([drawn_order(self._items), padding])[self.rank :: self.num_replicas].tolist())


class ResumableDataLoader(DataLoader[Batch]):
    """A DataLoader whose position Lightning saves in the checkpoint and restores from it.

    Batches count when handed over, whatever workers have fetched ahead. Each iteration continues where the one before
    stopped, and hands over `len(loader)` batches, the number of an epoch.

    With `overfit_batches`, Lightning puts a sequential sampler in place of the `TrainingSampler`: the loader then
    repeats the same few batches and has no position to save.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator, so that nothing is read, and no worker started, before the first batch is asked for: Lightning
        # makes iterators that it does not use.
        for batch in super().__iter__():
            if isinstance(self.sampler, TrainingSampler):
                self.sampler.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values, with what the order of batches depends on."""
        if not isinstance(self.sampler, TrainingSampler):
            return {}
        return {"position": self.sampler.position, "identity": self.sampler.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position.

        Raises:
            ConfigError: The data or its order is not the one of the checkpoint.
        """
        if not isinstance(self.sampler, TrainingSampler):
            return
        there, here = state["identity"], self.sampler.identity
        for name in {**there, **here}:
            if there.get(name) != here.get(name):  # an option that is younger than the checkpoint is None there
                raise ConfigError(
                    f"cannot resume: the checkpoint was made with {name}={there.get(name)} and this run has "
                    f"{here.get(name)}, so its batches would differ; restore that value or start a new run"
                )
        self.sampler.position = state["position"]


def training_loader(
    items: Dataset[Any],
    sampler: TrainingSampler,
    batch_size: int | None,
    num_workers: int,
    collate: Callable[[list[Any]], Batch] | None = None,
) -> ResumableDataLoader:
    """Return the resumable loader of a data set.

    Args:
        items: The data set.
        sampler: The order of its items.
        batch_size: Items that make a batch; None if each item is a batch.
        num_workers: Processes that read ahead.
        collate: Makes a batch of a list of items; None stacks them.
    """
    return ResumableDataLoader(
        items,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=collate,
        drop_last=batch_size is not None,
        num_workers=num_workers,
        generator=_own_generator(sampler.seed),
        worker_init_fn=leave_signals_to_trainer,
    )


def evaluation_loader(
    items: Dataset[Any],
    batch_size: int | None,
    num_workers: int,
    rank: int,
    world_size: int,
    collate: Callable[[list[Any]], Batch] | None = None,
) -> DataLoader[Batch]:
    """Return the loader of a whole data set, which must have items of padding beyond its end.

    Args:
        items: The data set.
        batch_size: Items that make a batch; None if each item is a batch.
        num_workers: Processes that read ahead.
        rank: This process.
        world_size: Number of processes.
        collate: Makes a batch of a list of items; None stacks them.
    """
    return DataLoader(
        items,
        batch_size=batch_size,
        sampler=EvaluationSampler(items, rank, world_size),  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=num_workers,
        generator=_own_generator(0),
        worker_init_fn=leave_signals_to_trainer,
    )


def drawn_order(count: int) -> torch.Tensor:
    """Return the numbers below `count` in an order drawn once for all, whatever the seed of a run."""
    return torch.randperm(count, generator=_own_generator(0))


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's number and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _own_generator(seed: int) -> torch.Generator:
    """Return a generator for the workers' seeds: drawn from the global one, they would shift dropout and noise."""
    return torch.Generator().manual_seed(seed)


def _mix(seed: int, epoch: int) -> int:
    """Return one seed for a pair, so that epoch 1 of seed 0 is not epoch 0 of seed 1."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest(), "big", signed=True)
