"""From token files to batches: windows for training, and for evaluation, which scores every token once.

S context length, B batch size per rank, N ids in the file. Window i holds the ids iS, ..., iS + S: its first S are the
inputs and its last S the targets, so consecutive windows share one id and no target twice.
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, Dataset

from evomoe.data.encoding import TokenFile
from evomoe.data.sampling import Batch, ResumableDataLoader, TrainingSampler, evaluation_loader, training_loader
from evomoe.errors import ConfigError


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


def training_windows(
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
    identity = {"data fingerprint": fingerprint, "data.context": context, "data.batch_size": batch_size}
    kind = "windows of data.context + 1 tokens"
    sampler = TrainingSampler(windows, kind, identity, batch_size, seed, rank, world_size)
    return training_loader(windows, sampler, batch_size, num_workers)


def evaluation_windows(
    tokens: TokenFile,
    context: int,
    padding_id: int,
    batch_size: int,
    num_workers: int,
    rank: int,
    world_size: int,
) -> DataLoader[Batch]:
    """Return the loader of batches `{"tokens": (B, S + 1) int64, "valid": (B, S) bool}`.

    The ranks together score every id but the first exactly once as a target.
    """
    windows = EvaluationWindows(tokens, context, padding_id)
    return evaluation_loader(windows, batch_size, num_workers, rank, world_size)
