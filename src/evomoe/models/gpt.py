"""GPT with a Mixture-of-Experts in every ``moe_every``-th block: pre-norm, learned positions, tied embeddings.

Shapes: B batch, S sequence, D model width, H hidden width of feed-forward and experts, E experts, L layers,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from evomoe.errors import ConfigError
from evomoe.models.blocks import Block
from evomoe.models.flops import matrix_flops
from evomoe.models.initialization import draw_normal_
from evomoe.models.key_value_cache import KeyValueCache
from evomoe.models.network import (
    INIT_STD,
    BlockOptions,
    Network,
    check_sizes,
    empty_cache,
    ids_before,
    output_std,
    score_words,
    word_embedding,
)
from evomoe.routing import Routing


class GPT(Network):
    """Decoder-only language model (GPT-2's shape) whose feed-forwards may be mixtures of experts.

    A model built with ``moe_every=0`` is the dense baseline: the same code with plain feed-forwards, and, for the same
    seed, the same initial weights outside the experts; expert 0 of an MoE layer starts as that layer's dense
    feed-forward (see :meth:`init_weights`).

    Args:
        vocab_size: number of token ids V.
        context: most tokens per sequence.
        d_model: width D.
        num_layers: blocks L.
        num_heads: attention heads; divides D.
        dropout: dropout of embeddings and residual branches.
        checkpoint_activations: recompute each block in the backward pass instead of storing its activations.
        options: of the blocks, see :class:`~evomoe.models.network.BlockOptions`.

    Raises:
        ConfigError: for sizes that do not fit together, and for a router that leaks the future.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        *,
        dropout: float = 0.1,
        checkpoint_activations: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(checkpoint_activations)
        check_sizes({"vocab_size": vocab_size, "context": context})
        self.vocab_size = vocab_size
        self.context = context
        self.d_model = d_model
        self.num_layers = num_layers
        self.num_heads = num_heads

        blocks = BlockOptions(d_model=d_model, num_heads=num_heads, dropout=dropout, **options)
        self.token_embedding = word_embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(context, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = blocks.build(num_layers)
        self.final_norm = nn.LayerNorm(d_model, bias=blocks.bias)
        self.init_weights(torch.initial_seed())

    def forward(
        self,
        tokens: Tensor,
        *,
        valid: Tensor | None = None,
        final_rule: bool = False,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Predict the next token at every position.

        1. Embed tokens and positions.
        2. Apply the blocks.
        3. Normalise, and score against the token embedding.

        Args:
            tokens: ``(B, S)`` token ids; with a cache, the S tokens after those it holds.
            valid: ``(B, S)`` bool, False at padding, which must stand at the end of its row: a later token is never
                seen by an earlier one, and the routers skip it, so that padding changes nothing. None if all are real.
            final_rule: route by the final sparse rule instead of the training rule.
            cache: keys and values of the past, from :meth:`new_cache`; updated in place.

        Returns:
            Logits ``(B, S, V)``, and the routings of the MoE layers in the order of :attr:`moe_layers`.

        Raises:
            ConfigError: if the sequence is longer than the context.
        """
        sequence = tokens.shape[1]
        if sequence > self.context:
            raise ConfigError(
                f"sequence of {sequence} tokens, but the model's context is {self.context}: shorten the sequence or "
                f"build the model with context={sequence}"
            )
        # (S,), or (B, S) where each row has a past of its own.
        positions = torch.arange(sequence, device=tokens.device) if cache is None else cache.extend(sequence, valid)
        hidden = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))  # (B, S, D)

        previous_ids = ids_before(tokens) if cache is None else cache.previous(tokens, valid)
        hidden, routings = self.apply_blocks(
            self._stack,
            hidden,
            token_ids=tokens,
            previous_ids=previous_ids,
            valid=valid,
            final_rule=final_rule,
            cache=cache,
        )
        return score_words(self.final_norm(hidden), self.token_embedding, self.vocab_size), routings

    @property
    def named_blocks(self) -> dict[str, Block]:
        """The blocks as ``block_0``, ``block_1`` and so on."""
        return {f"block_{index}": block for index, block in enumerate(self._stack)}

    def new_cache(self, batch: int) -> KeyValueCache:
        """An empty key-value cache for ``batch`` rows, of the model's context, device and precision."""
        return empty_cache(self._stack, batch, self.context)

    def flops_per_token(self, context: int, active_experts: float | Sequence[float] = 1.0) -> float:
        """FLOPs of a forward pass per token; times ``TRAINING_FACTOR`` for a training step.

        Args:
            context: tokens S per sequence, which decides the cost of attention.
            active_experts: mean experts per token, one number for all MoE layers or one for each, in order.
        """
        head = matrix_flops([self.token_embedding.weight])
        return head + self.block_flops(self._stack, context, self.spread(active_experts))

    @property
    def _stack(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all parameters anew; called by the constructor with PyTorch's current seed.

        Every matrix has its own generator, seeded by ``seed`` and its name. Models that differ in router, number of
        experts or ``moe_every`` therefore start from the same shared weights, and expert 0 of an MoE layer from the
        weights of the dense model's feed-forward in that block.

        | parameters | initial value |
        |---|---|
        | embeddings, matrices into a branch | normal, deviation 0.02 |
        | matrices out of a branch | normal, deviation 0.02 / sqrt(2 L) (GPT-2) |
        | biases; norms | 0; weight 1 and bias 0 |
        | routers | as the router draws them |

        Args:
            seed: of the draws.
        """
        draw_normal_(self.token_embedding.weight, INIT_STD, seed, "token_embedding")
        draw_normal_(self.position_embedding.weight, INIT_STD, seed, "position_embedding")
        self.final_norm.reset_parameters()
        for name, block in self.named_blocks.items():
            block.init_weights(seed, name, INIT_STD, output_std(self.num_layers))
