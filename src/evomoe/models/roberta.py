"""RoBERTa with a Mixture-of-Experts in every ``moe_every``-th block: an encoder, and its head for masked words.

Shapes: B batch, S sequence, D model width, E experts, L layers, V vocabulary, n scored positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomoe.errors import ConfigError
from evomoe.models.blocks import Block
from evomoe.models.flops import matrix_flops
from evomoe.models.initialization import draw_normal_
from evomoe.models.network import (
    INIT_STD,
    BlockOptions,
    Network,
    check_sizes,
    ids_before,
    output_std,
    score_words,
    word_embedding,
)
from evomoe.routing import Routing


class Encoder(Network):
    """Blocks in which every token sees its whole sequence, so that any router may be used.

    A subclass adds a head and then calls :meth:`init_weights`. For the same seed, models that differ in router, experts
    or ``moe_every`` start from the same shared weights, as GPT does.

    Args:
        vocab_size: number of token ids V, the mask included.
        context: most tokens per sequence.
        d_model: width D.
        num_layers: blocks L.
        num_heads: attention heads; divides D.
        norm_first: norms before the branches and one after the last block, or after the sums and the embedding, as
            published. The former trains small models without a long warm-up.
        dropout: dropout of embeddings and residual branches.
        checkpoint_activations: recompute each block in the backward pass instead of storing its activations.
        options: of the blocks, see :class:`~evomoe.models.network.BlockOptions`.

    Raises:
        ConfigError: for sizes that do not fit together.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        *,
        norm_first: bool = False,
        dropout: float = 0.1,
        checkpoint_activations: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(checkpoint_activations)
        check_sizes({"vocab_size": vocab_size, "context": context})
        self.vocab_size = vocab_size
        self.context = context
        self.num_layers = num_layers
        self.norm_first = norm_first

        blocks = BlockOptions(d_model=d_model, num_heads=num_heads, dropout=dropout, norm_first=norm_first, **options)
        self.token_embedding = word_embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(context, d_model)
        # After the embedding where the blocks normalise their sums, else after the last block.
        self.norm = nn.LayerNorm(d_model, bias=blocks.bias)
        self.dropout = nn.Dropout(dropout)
        self.blocks = blocks.build(num_layers, causal=False)

    def encode(
        self, tokens: Tensor, *, valid: Tensor | None = None, final_rule: bool = False
    ) -> tuple[Tensor, list[Routing]]:
        """States of all tokens, in the light of their whole sequence.

        Args:
            tokens: ``(B, S)`` token ids.
            valid: ``(B, S)`` bool, False at padding, which changes nothing for the other tokens. None if all are real.
            final_rule: route by the final sparse rule instead of the training rule.

        Returns:
            ``(B, S, D)``, and the routings of the MoE layers in the order of :attr:`moe_layers`.

        Raises:
            ConfigError: if the sequence is longer than the context.
        """
        sequence = tokens.shape[1]
        if sequence > self.context:
            raise ConfigError(
                f"sequence of {sequence} tokens, but the model's context is {self.context}: shorten the sequence or "
                f"build the model with context={sequence}"
            )
        positions = torch.arange(sequence, device=tokens.device)
        hidden = self.token_embedding(tokens) + self.position_embedding(positions)  # (B, S, D)
        hidden = self.dropout(hidden if self.norm_first else self.norm(hidden))
        hidden, routings = self.apply_blocks(
            self._stack,
            hidden,
            token_ids=tokens,
            previous_ids=ids_before(tokens),
            valid=valid,
            final_rule=final_rule,
        )
        return self.norm(hidden) if self.norm_first else hidden, routings

    @property
    def named_blocks(self) -> dict[str, Block]:
        """The blocks as ``block_0``, ``block_1`` and so on."""
        return {f"block_{index}": block for index, block in enumerate(self._stack)}

    @property
    def _stack(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all parameters anew, as :meth:`evomoe.models.gpt.GPT.init_weights` does.

        Args:
            seed: of the draws.
        """
        draw_normal_(self.token_embedding.weight, INIT_STD, seed, "token_embedding")
        draw_normal_(self.position_embedding.weight, INIT_STD, seed, "position_embedding")
        self.norm.reset_parameters()
        for name, block in self.named_blocks.items():
            block.init_weights(seed, name, INIT_STD, output_std(self.num_layers))


class RoBERTa(Encoder):
    """Masked language model (arXiv 1907.11692); the last id of the vocabulary stands for a hidden word.

    Args:
        vocab_size: number of token ids V, the mask included.
        context: most tokens per sequence.
        d_model: width D.
        num_layers: blocks L.
        num_heads: attention heads; divides D.
        options: further ones of :class:`Encoder`.
    """

    def __init__(
        self, vocab_size: int, context: int, d_model: int, num_layers: int, num_heads: int, **options: Any
    ) -> None:
        super().__init__(vocab_size, context, d_model, num_layers, num_heads, **options)
        self.head = nn.Linear(d_model, d_model)
        self.head_norm = nn.LayerNorm(d_model)
        self.head_bias = nn.Parameter(torch.zeros(self.token_embedding.num_embeddings))
        self.init_weights(torch.initial_seed())

    @property
    def mask_id(self) -> int:
        """The id that stands for a hidden word."""
        return self.vocab_size - 1

    def forward(
        self,
        tokens: Tensor,
        *,
        valid: Tensor | None = None,
        at: Tensor | None = None,
        final_rule: bool = False,
    ) -> tuple[Tensor, list[Routing]]:
        """Predict words.

        Args:
            tokens: ``(B, S)`` token ids.
            valid: ``(B, S)`` bool, False at padding.
            at: ``(B, S)`` bool, the n positions to predict; None for all. The others cost no output layer.
            final_rule: route by the final sparse rule instead of the training rule.

        Returns:
            Logits ``(n, V)``, or ``(B, S, V)`` for all, and the routings of the MoE layers.
        """
        hidden, routings = self.encode(tokens, valid=valid, final_rule=final_rule)
        states = self.head_norm(F.gelu(self.head(hidden if at is None else hidden[at])))
        return score_words(states, self.token_embedding, self.vocab_size, self.head_bias), routings

    def flops_per_token(
        self, context: int, active_experts: float | Sequence[float] = 1.0, scored: float = 1.0
    ) -> float:
        """FLOPs of a forward pass per token; times ``TRAINING_FACTOR`` for a training step.

        Args:
            context: tokens S per sequence, which decides the cost of attention.
            active_experts: mean experts per token, one number for all MoE layers or one for each, in order.
            scored: share of the positions that are predicted.
        """
        head = matrix_flops([self.head.weight, self.token_embedding.weight])
        return scored * head + self.block_flops(self._stack, context, self.spread(active_experts))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """See :meth:`Encoder.init_weights`; the head is drawn too."""
        super().init_weights(seed)
        draw_normal_(self.head.weight, INIT_STD, seed, "head")
        self.head.bias.zero_()
        self.head_bias.zero_()
        self.head_norm.reset_parameters()
