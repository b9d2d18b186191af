"""Hash layers (arXiv 2106.04426): the word decides, and nothing is learned."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.routing.contract import Router, RoutingInput, SparseRouting
from evomoe.routing.hash_tables import balanced_table, clustered_table, count_ids, dispersed_table, word_vectors
from evomoe.routing.selection import assign_choices, make_routing

FROM_TEXT: dict[str, tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]] = {
    "balanced": (count_ids, balanced_table),
    "clustered": (word_vectors, clustered_table),
    "dispersed": (word_vectors, dispersed_table),
}
"""What a table needs to know of the text, and how it is made from that."""

TABLES = ("random", *FROM_TEXT, "bigram")
PRIME = 2**31 - 1


class HashLayer(Router):
    """The expert of a token is that of its word in a fixed table, with the weight 1: no gate, no loss, no gradient.

    The tables:

    - ``random``: an expert drawn for each word.
    - ``balanced``: the words shared out so that the experts work equally often on the training text.
    - ``clustered``: similar words share an expert.
    - ``dispersed``: similar words are spread over the experts.
    - ``bigram``: a hash of the word and the one before it, drawn from a universal family (Carter and Wegman, 1979):
      ``(a (previous + 1) + b word + c) mod p mod E``, with -1 as the previous word at the beginning of a sequence.

    ``balanced``, ``clustered`` and ``dispersed`` are made from the training text before a run, and are random until
    then. Each layer draws seeds of its own, so the tables of two layers differ. Seeds and table are saved: a checkpoint
    needs no text.

    With ``num_hashes`` N above 1 (MultiHash), the feed-forward of a token is put together from N segments, which N
    tables choose: the n-th one among the n-th E / N of the experts. An expert is then a segment. To keep the size of
    the layer and its FLOPs, give the model N times the experts (``model.num_experts``) of 1/N of the width
    (``model.d_expert``).

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        vocab_size: number of token ids V.
        table: ``random``, ``balanced``, ``clustered``, ``dispersed`` or ``bigram``.
        num_hashes: experts per token N; divides E.
    """

    seeds: Tensor
    table: Tensor

    def __init__(
        self, d_model: int, num_experts: int, *, vocab_size: int, table: str = "random", num_hashes: int = 1
    ) -> None:
        super().__init__(d_model, num_experts)
        if table not in TABLES:
            raise ConfigError(f"router table={table!r} is unknown: expected one of {', '.join(TABLES)}")
        if vocab_size < 1:
            raise ConfigError(f"router vocab_size={vocab_size}: expected at least 1")
        if num_hashes < 1 or num_experts % num_hashes:
            raise ConfigError(
                f"router num_hashes={num_hashes} with {num_experts} experts: expected a divisor of their number; set "
                "model.num_experts to a multiple of it"
            )
        self.kind = table
        self.num_hashes = num_hashes
        self.block = num_experts // num_hashes
        self.reads_corpus = table in FROM_TEXT
        self.register_buffer("seeds", torch.empty(num_hashes, 3, dtype=torch.int64))
        if table != "bigram":
            self.register_buffer("table", torch.empty(num_hashes, vocab_size, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw seeds and random tables anew."""
        self.seeds.random_(1, PRIME)
        if self.kind != "bigram":
            self.table.random_(0, self.block)

    def read_corpus(self, token_ids: np.ndarray) -> None:
        """Make the tables from the text, the same ones for the same text and seeds."""
        if not self.reads_corpus:
            return
        look, build = FROM_TEXT[self.kind]
        seen = look(token_ids, self.table.shape[1])
        tables = [build(seen, self.block, np.random.default_rng(seed)) for seed in self.seeds.tolist()]
        self.table.copy_(torch.from_numpy(np.stack(tables)))

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        """Route ``inputs.token_ids (T,)``, for bigrams with ``inputs.previous_ids (T,)``."""
        chosen = self._look_up(inputs)  # (N, T)
        first = torch.arange(0, self.num_experts, self.block, device=chosen.device)  # (N,)
        expert = chosen.t() + first  # (T, N)
        weight = torch.ones(expert.shape, device=expert.device)
        scores = weight.new_zeros(expert.shape[0], self.num_experts).scatter(1, expert, weight / self.num_hashes)
        return make_routing(inputs, assign_choices(expert, weight, self.num_experts, inputs.valid), scores)

    def _look_up(self, inputs: RoutingInput) -> Tensor:
        """Expert of each token within the block of each hash, ``(N, T)``."""
        words = inputs.token_ids
        if words is None:
            raise _missing("token_ids")
        if self.kind != "bigram":
            return self.table[:, words]
        previous = inputs.previous_ids
        if previous is None:
            raise _missing("previous_ids")
        a, b, c = self.seeds.t()[:, :, None]  # (N, 1) each, below 2^31: int64 holds their products with a word
        return (a * (previous + 1) + b * words + c) % PRIME % self.block


def _missing(ids: str) -> ConfigError:
    return ConfigError(f"HashLayer routes by word, and the model passed no {ids}: expected ids (B, S)")
