"""Batches of sentence pairs: as many of about one length as fit into a number of tokens.

M source and S target tokens of a batch's longest sentences, with their ends; B pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from evomoe.data.pairs.store import PairFile
from evomoe.data.sampling import Batch, TrainingSampler, drawn_order
from evomoe.errors import ConfigError

LENGTH_STEP = 4
"""Pairs are of one length if they round up to the same multiple of this, so that a batch is not always the same."""

PADDING = -1
"""Index of a pair that only fills up a batch of padding."""


class PairBatches(Dataset[Batch]):
    """Pairs by lists of their indices, padded to the longest of the list.

    A batch holds `"source": (B, M)`, which ends with the end token, `"source_valid": (B, M) bool`, `"target": (B, S +
    1)`, which begins and ends with it, `"valid": (B, S) bool`, False where the pair (input s, target s + 1) is padding,
    and `"index": (B,)`, the number of the pair, `PADDING` for rows that are padding throughout.

    Args:
        pairs: The encoded pairs.
        end_id: The token that begins and ends a sentence, and fills up.
        context: Tokens of a side, its end included, beyond which it is cut.
    """

    def __init__(self, pairs: PairFile, end_id: int, context: int) -> None:
        self._pairs = pairs
        self._end_id = end_id
        self._context = context

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, indices: Sequence[int] | int) -> Batch:
        if isinstance(indices, int):  # by Lightning's own sampler under overfit_batches
            indices = [indices]
        empty = np.zeros(0, dtype="int64")
        sides = [(empty, empty) if index == PADDING else self._pairs[index] for index in indices]
        keep = self._context - 1
        sources = [source[:keep] for source, _ in sides]
        targets = [target[:keep] for _, target in sides]
        real = torch.tensor([index != PADDING for index in indices])
        source, source_valid = self._pad(sources, 0)
        target, target_valid = self._pad(targets, 1)
        return {
            "source": source,
            "source_valid": source_valid & real[:, None],
            "target": target,
            "valid": target_valid[:, 1:] & real[:, None],
            "index": torch.tensor(indices),
        }

    def _pad(self, rows: list[np.ndarray], begins: int) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.tensor([begins + len(row) + 1 for row in rows])
        tokens = torch.full((len(rows), int(lengths.max())), self._end_id)
        for number, row in enumerate(rows):
            tokens[number, begins : begins + len(row)] = torch.from_numpy(row.astype("int64"))
        return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


class BucketSampler(TrainingSampler):
    """The training order of lists of pairs of about one length.

    In every epoch all pairs are sorted by length, those of one length in a new order, and cut into global batches of at
    most `batch_tokens` for each process, whose order is drawn too. As the sorted lengths are the same in every epoch,
    so is the number of batches. Over several processes the pairs that fill no global batch, fewer than these, are some
    of the longest.

    Args:
        lengths: Tokens of the longer side of each pair, its end included.
        indices: The pairs.
        identity: What the order depends on beside `batch_tokens`, seed and world size.
        batch_tokens: Most tokens of a side of a batch, padding included.
        seed: Seed of the orders.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ConfigError: Not even one pair of the longest fits into a batch, or there is not one for each process.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        indices: np.ndarray,
        identity: Mapping[str, Any],
        batch_tokens: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        rounded = -(-lengths // LENGTH_STEP) * LENGTH_STEP
        self._lengths = np.minimum(rounded, np.maximum(lengths, batch_tokens))  # not beyond what a batch holds
        self._indices = indices
        self._cuts = cut(np.sort(self._lengths), batch_tokens, world_size)
        identity = {**identity, "data.batch_tokens": batch_tokens}
        global_batches = range(world_size * (len(self._cuts) - 1))
        super().__init__(global_batches, "batches of pairs", identity, 1, seed, rank, world_size)

    def order(self, epoch: int) -> list[list[int]]:
        """Return the batches of this process in an epoch, each a list of pairs."""
        generator = self.generator(epoch)
        shuffled = torch.randperm(len(self._lengths), generator=generator).numpy()
        ranked = shuffled[np.argsort(self._lengths[shuffled], kind="stable")]
        batches = [
            self._indices[ranked[start:end][self.rank :: self.num_replicas]].tolist()
            for start, end in pairwise(self._cuts)
        ]
        return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]


def evaluation_batches(lengths: np.ndarray, batch_tokens: int, world_size: int) -> list[list[int]]:
    """Cut a split into batches of about one length, and add batches of padding for processes that would have none.

    The shortest come first; a loader draws their order.

    Args:
        lengths: Tokens of the longer side of each pair, its end included.
        batch_tokens: Most tokens of a side of a batch, padding included.
        world_size: Number of processes.
    """
    ranked = np.argsort(lengths, kind="stable")
    cuts = cut(lengths[ranked], batch_tokens, 1)
    batches = [ranked[start:end].tolist() for start, end in pairwise(cuts)]
    return batches + [[PADDING]] * (-len(batches) % world_size)


def sample_batches(lengths: np.ndarray, count: int, batch_tokens: int, rank: int, world_size: int) -> list[list[int]]:
    """Draw pairs from a whole split, once for all, and cut the share of a process into batches of about one length.

    However many processes there are, they draw the same pairs.

    Args:
        lengths: Tokens of the longer side of each pair, its end included.
        count: Pairs that all processes draw together; those of the split are the most.
        batch_tokens: Most tokens of a side of a batch, padding included.
        rank: This process.
        world_size: Number of processes.
    """
    drawn = drawn_order(len(lengths)).numpy()[:count]
    mine = drawn[rank::world_size]
    if not len(mine):
        return []
    ranked = mine[np.argsort(lengths[mine], kind="stable")]
    return [ranked[start:end].tolist() for start, end in pairwise(cut(lengths[ranked], batch_tokens, 1))]


class BatchList(Dataset[Batch]):
    """Given batches of pairs, in order.

    Args:
        pairs: The pairs.
        batches: Lists of their indices.
    """

    def __init__(self, pairs: PairBatches, batches: Sequence[Sequence[int]]) -> None:
        self._pairs = pairs
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        return self._pairs[self._batches[index]]


def cut(lengths: np.ndarray, batch_tokens: int, world_size: int) -> list[int]:
    """Return where global batches begin and end, such that each process has at most `batch_tokens`, and equally many.

    Args:
        lengths: Ascending lengths.
        batch_tokens: Most tokens for a process, padding included.
        world_size: Number of processes.

    Raises:
        ConfigError: The longest does not fit, or there are less pairs than processes.
    """
    if len(lengths) and lengths[-1] > batch_tokens:
        raise ConfigError(
            f"data.batch_tokens={batch_tokens} does not hold the longest sentence of {lengths[-1]} tokens; raise it or "
            "lower data.context"
        )
    if len(lengths) < world_size:
        raise ConfigError(f"{len(lengths)} pairs are fewer than {world_size} processes; give more text")
    cuts = [0]
    while len(lengths) - cuts[-1] >= world_size:
        start = cuts[-1]
        # The most rows that fit: their number times the length of the last of them grows with their number.
        limit = min(batch_tokens // lengths[start], (len(lengths) - start) // world_size)
        rows = np.arange(1, limit + 1)
        fitting = rows[rows * lengths[start + rows * world_size - 1] <= batch_tokens]
        cuts.append(start + int(fitting[-1]) * world_size)
    return cuts
