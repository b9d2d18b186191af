"""Keys and values of the tokens that a decoder has already read.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe.errors import ConfigError

FIRST_POSITIONS = 16  # about the length of a short sentence


class KeyValueCache:
    """Keys and values of the tokens already read, for generation without recomputing them. Inference only.

    Every row of the batch is stored from position 0 on, so rows of different length need no left padding: the padding
    at the end of a short row is overwritten by the row's next token before any query can see it. Memory is taken as
    the rows grow: most translations are much shorter than the context.

    Args:
        num_layers: attention layers of the model.
        batch: rows B.
        num_heads: attention heads.
        head_dim: width of one head, D / num_heads.
        capacity: most positions per row, the context of the model.
        device: where the model lives.
        dtype: precision of the stored keys and values.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_heads: int,
        head_dim: int,
        capacity: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.keys = torch.zeros(num_layers, batch, num_heads, 0, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.capacity = capacity
        self.lengths = torch.zeros(batch, device=device, dtype=torch.long)
        self.last_ids = torch.full((batch,), -1, device=device)
        # The longest row, kept on the host so that no step waits for the device to know how many keys to read.
        self.extent = 0
        self._padded = False
        self.positions = torch.zeros(batch, 0, device=device, dtype=torch.long)
        self.mask: Tensor | None = None

    def extend(self, sequence: int, valid: Tensor | None) -> Tensor:
        """Make room for the next tokens of each row; called once per forward pass, before any :meth:`write`.

        Args:
            sequence: number S of new tokens per row.
            valid: ``(B, S)`` bool, False at right padding; None means that every token is real.

        Returns:
            Positions of the new tokens, ``(B, S)``.

        Raises:
            ConfigError: if the cache is full.
        """
        if self._padded:  # and the padding is to be overwritten
            self.extent, self._padded = int(self.lengths.max()), False
        if self.extent + sequence > self.capacity:
            raise ConfigError(
                f"the key-value cache holds {self.extent} of at most {self.capacity} tokens, so {sequence} more do not "
                "fit: generate fewer tokens or start a new cache with the last tokens"
            )
        device = self.lengths.device
        self.positions = self.lengths[:, None] + torch.arange(sequence, device=device)  # (B, S)
        first = self.extent == 0
        self._padded = valid is not None and sequence > 1
        self.extent += sequence
        if (more := self.extent - self.keys.shape[3]) > 0:
            # Twice as many as before, lest every step copies all.
            more = min(max(more, self.keys.shape[3], FIRST_POSITIONS), self.capacity - self.keys.shape[3])
            self.keys, self.values = (F.pad(stored, (0, 0, 0, more)) for stored in (self.keys, self.values))
        self.lengths = self.lengths + (sequence if valid is None else valid.sum(dim=1))
        # With nothing stored yet the new tokens see one another only: plain causal attention, no mask.
        self.mask = None if first else torch.arange(self.extent, device=device) <= self.positions[:, None, :, None]
        return self.positions

    def previous(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """The id before each new token, -1 at the beginning of a row; called once per forward pass.

        Args:
            tokens: ids of the new tokens, ``(B, S)``.
            valid: ``(B, S)`` bool, False at right padding; None means that every token is real.

        Returns:
            ``(B, S)``.
        """
        read = torch.cat([self.last_ids[:, None], tokens], dim=1)  # (B, 1 + S)
        if valid is None:
            self.last_ids = read[:, -1]
        else:
            self.last_ids = read.gather(1, valid.sum(dim=1, keepdim=True)).squeeze(1)
        return read[:, :-1]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values, each ``(B, heads, S, head_dim)``, in place.

        Returns:
            The keys and values of ``layer`` to attend over, each ``(B, heads, extent, head_dim)``.
        """
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        for stored, new in ((self.keys, keys), (self.values, values)):
            stored[layer][rows, :, self.positions] = new.detach().transpose(1, 2).to(stored.dtype)
        if self.mask is None:
            return keys, values
        extent = self.extent
        return self.keys[layer, :, :, :extent].to(keys.dtype), self.values[layer, :, :, :extent].to(values.dtype)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch, in this order; at most as many as there are, each as often as it is named.

        Rows that stay in their place, and the positions that nobody has written, are not copied.
        """
        device = self.lengths.device
        moved = [place for place, row in enumerate(rows) if row != place]
        if moved:
            places = torch.tensor(moved, device=device)
            sources = torch.tensor([rows[place] for place in moved], device=device)
            for stored in (self.keys, self.values):
                written = stored[:, :, :, : self.extent]
                written.index_copy_(1, places, written.index_select(1, sources))
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        index = torch.tensor(rows, device=device)
        self.lengths, self.last_ids = self.lengths[index], self.last_ids[index]
        self.extent = int(self.lengths.max())
