"""From token files to batches: windows, the order of training, evaluation that scores every token once.

S context length, B batch size per rank, N ids in the file. Window i holds the ids iS, ..., iS + S: its first S are the
inputs and its last S the targets, so consecutive windows share one id and no target twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from evomoe.data.token_store import TokenFile
from evomoe.errors import ConfigError
from evomoe.signals import leave_signals_to_trainer

Batch = dict[str, torch.Tensor]


class TrainingWindows(Dataset[Batch]):
    """The complete windows of a file, as `{"tokens": (S + 1,)}`.

    Args:
        tokens: The ids, (N,).
        context: S.
    """

    def __init__(self, tokens: TokenFile, context: int) -> None:
        self._tokens = tokens
        self.context = context

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self.context

    def __getitem__(self, index: int) -> Batch:
        start = index * self.context
        ids = self._tokens[start : start + self.context + 1]
        return {"tokens": torch.from_numpy(ids.astype("int64"))}


class EvaluationWindows(Dataset[Batch]):
    """All windows of a file, the last one padded, as `{"tokens": (S + 1,), "valid": (S,) bool}`.

    `valid[s]` is False where the target s + 1 is padding. Windows beyond the last are padding throughout: ranks that
    would have one window less than others score those.

    Args:
        tokens: The ids, (N,).
        context: S.
        padding_id: The id that fills up.
    """

    def __init__(self, tokens: TokenFile, context: int, padding_id: int) -> None:
        self._tokens = tokens
        self._context = context
        self._padding_id = padding_id

    def __len__(self) -> int:
        return -(-(len(self._tokens) - 1) // self._context)

    def __getitem__(self, index: int) -> Batch:
        start = index * self._context
        ids = self._tokens[start : start + self._context + 1]
        tokens = torch.full((self._context + 1,), self._padding_id)
        tokens[: len(ids)] = torch.from_numpy(ids.astype("int64"))
        return {"tokens": tokens, "valid": torch.arange(1, self._context + 1) < len(ids)}


# Both samplers are DistributedSamplers because Lightning leaves those alone; it would wrap others, sharding twice.


class TrainingSampler(DistributedSampler[int]):
    """An endless training order that is a pure function of (seed, epoch), and can start anywhere.

    Global batch i of an epoch takes the next `world_size * batch_size` windows of that epoch's permutation, and rank r
    the r-th run of `batch_size` of them. What does not fill a global batch is left to other epochs.

    One iteration yields as many batches as an epoch has, from `position` on, whatever epoch they belong to. So the
    order does not hang on the Trainer's epochs, which end early under `limit_train_batches` and of which it counts one
    too many when a run with `max_steps` is resumed from the end of an epoch: `set_epoch` changes nothing.

    Args:
        windows: The data set.
        fingerprint: Names the content of the data set.
        batch_size: B.
        seed: Seed of the permutations.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ConfigError: There is not one global batch.
    """

    def __init__(
        self, windows: TrainingWindows, fingerprint: str, batch_size: int, seed: int, rank: int, world_size: int
    ) -> None:
        super().__init__(windows, num_replicas=world_size, rank=rank, seed=seed, drop_last=True)
        self.batch_size = batch_size
        self.batches = len(windows) // (batch_size * world_size)  # of an epoch
        self.position = 0  # batches handed over, over all epochs
        # What the order of batches depends on.
        self.identity = {
            "data fingerprint": fingerprint,
            "data.context": windows.context,
            "data.batch_size": batch_size,
            "data.seed": seed,
            "world size": world_size,
        }
        self._windows = len(windows)
        if self.batches == 0:
            raise ConfigError(
                f"the training split has {self._windows} windows of data.context + 1 tokens, fewer than one batch of "
                f"data.batch_size={batch_size} on each of {world_size} processes; lower data.batch_size or "
                "data.context, or give more text"
            )

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        epoch, batch = divmod(self.position, self.batches)
        start = batch * self.batch_size
        yield from self._order(epoch)[start:]
        yield from self._order(epoch + 1)[:start]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        order = torch.randperm(self._windows, generator=generator)[: len(self) * self.num_replicas]
        return order.view(self.batches, self.num_replicas, self.batch_size)[:, self.rank].flatten().tolist()


class EvaluationSampler(DistributedSampler[int]):
    """Windows in order, shared out one by one; every rank gets equally many, the last perhaps beyond the end.

    Equal numbers matter: a rank that stops early would leave the others waiting in the collectives of the model.

    Args:
        windows: The data set.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(self, windows: EvaluationWindows, rank: int, world_size: int) -> None:
        super().__init__(windows, num_replicas=world_size, rank=rank, shuffle=False)
        self._per_rank = -(-len(windows) // world_size)

    def __len__(self) -> int:
        return self._per_rank

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self._per_rank * self.num_replicas, self.num_replicas))


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
        for name, expected in state["identity"].items():
            if self.sampler.identity[name] != expected:
                raise ConfigError(
                    f"cannot resume: the checkpoint was made with {name}={expected} and this run has "
                    f"{self.sampler.identity[name]}, so its batches would differ; restore that value or start a new run"
                )
        self.sampler.position = state["position"]


def _mix(seed: int, epoch: int) -> int:
    """Return one seed for a pair, so that epoch 1 of seed 0 is not epoch 0 of seed 1."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest(), "big", signed=True)


def training_loader(
    tokens: TokenFile,
    fingerprint: str,
    context: int,
    batch_size: int,
    seed: int,
    num_workers: int,
    rank: int,
    world_size: int,
) -> ResumableDataLoader:
    """Return the shuffled, resumable loader of batches `{"tokens": (B, S + 1) int64}`.

    Raises:
        ConfigError: The split is shorter than one context, or than one batch on each process.
    """
    windows = TrainingWindows(tokens, context)
    if len(windows) == 0:
        raise ConfigError(
            f"the training split has {len(tokens)} tokens, fewer than one window of data.context={context} + 1; "
            "lower data.context or give more text"
        )
    sampler = TrainingSampler(windows, fingerprint, batch_size, seed, rank, world_size)
    return ResumableDataLoader(
        windows,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=True,
        num_workers=num_workers,
        generator=_own_generator(seed),
        worker_init_fn=leave_signals_to_trainer,
    )


def evaluation_loader(
    tokens: TokenFile,
    context: int,
    padding_id: int,
    batch_size: int,
    num_workers: int,
    rank: int,
    world_size: int,
) -> DataLoader[Batch]:
    """Return the loader of batches `{"tokens": (B, S + 1) int64, "valid": (B, S) bool}`, in order.

    The ranks together score every id but the first exactly once as a target.
    """
    windows = EvaluationWindows(tokens, context, padding_id)
    return DataLoader(
        windows,
        batch_size=batch_size,
        sampler=EvaluationSampler(windows, rank, world_size),
        num_workers=num_workers,
        generator=_own_generator(0),
        worker_init_fn=leave_signals_to_trainer,
    )


def _own_generator(seed: int) -> torch.Generator:
    """Return a generator for the workers' seeds: drawn from the global one, they would shift dropout and noise."""
    return torch.Generator().manual_seed(seed)
