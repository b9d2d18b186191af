"""Encoder-decoder Transformer with a Mixture-of-Experts in every ``moe_every``-th block of both stacks.

Shapes: B batch, M source sequence, S target sequence, D model width, E experts, V joint vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from evomoe.moe.layer import RouterFactory
from evomoe.routing import Routing

Memories = list[tuple[Tensor, Tensor]]
"""Keys and values of the source for each block of the decoder, each ``(B, heads, M, head_dim)``."""


class Transformer(Network):
    """Encoder-decoder (arXiv 1706.03762) with learned positions and one embedding for source, target and output.

    The encoder sees its whole sequence and may use any router; in the decoder, one that looks at later tokens is
    refused, and may be replaced by another. For the same seed, models that differ in router, experts or ``moe_every``
    start from the same shared weights, as GPT does.

    Args:
        vocab_size: number of token ids V, of both languages together.
        context: most tokens of a source, and of a target.
        d_model: width D.
        num_layers: blocks of the encoder, and of the decoder.
        num_heads: attention heads; divides D.
        norm_first: norms before the branches and one after each stack, or after the sums as first published.
        dropout: dropout of embeddings and residual branches.
        decoder_router: factory of the decoder's routers; None for those of the encoder.
        checkpoint_activations: recompute each block in the backward pass instead of storing its activations.
        options: of the blocks, see :class:`~evomoe.models.network.BlockOptions`.

    Raises:
        ConfigError: for sizes that do not fit together, and for a router that leaks the future in the decoder.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        *,
        norm_first: bool = True,
        dropout: float = 0.1,
        decoder_router: RouterFactory | None = None,
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

        blocks = BlockOptions(d_model=d_model, num_heads=num_heads, dropout=dropout, norm_first=norm_first, **options)
        self.token_embedding = word_embedding(vocab_size, d_model)
        self.source_positions = nn.Embedding(context, d_model)
        self.target_positions = nn.Embedding(context, d_model)
        self.dropout = nn.Dropout(dropout)
        self.encoder = blocks.build(num_layers, causal=False)
        of_decoder = blocks if decoder_router is None else replace(blocks, router=decoder_router)
        self.decoder = of_decoder.build(num_layers, causal=True, cross=True)
        # Blocks that normalise their sums need no norm after the last of them.
        self.encoder_norm = nn.LayerNorm(d_model, bias=blocks.bias) if norm_first else nn.Identity()
        self.decoder_norm = nn.LayerNorm(d_model, bias=blocks.bias) if norm_first else nn.Identity()
        self.init_weights(torch.initial_seed())

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        *,
        source_valid: Tensor | None = None,
        valid: Tensor | None = None,
        final_rule: bool = False,
    ) -> tuple[Tensor, list[Routing]]:
        """Predict the next target token at every position, given the source and the target up to it.

        Args:
            source: ``(B, M)`` token ids.
            target: ``(B, S)`` token ids.
            source_valid: ``(B, M)`` bool, False at right padding; None if all are real.
            valid: ``(B, S)`` bool, False at right padding of the target; None if all are real.
            final_rule: route by the final sparse rule instead of the training rule.

        Returns:
            Logits ``(B, S, V)``, and the routings of the MoE layers, those of the encoder first.
        """
        memories, encoder_routings = self.encode(source, valid=source_valid, final_rule=final_rule)
        logits, routings = self.decode(target, memories, source_valid=source_valid, valid=valid, final_rule=final_rule)
        return logits, encoder_routings + routings

    def encode(
        self, source: Tensor, *, valid: Tensor | None = None, final_rule: bool = False
    ) -> tuple[Memories, list[Routing]]:
        """Read the source, once for all the tokens that are to be written.

        Args:
            source: ``(B, M)`` token ids.
            valid: ``(B, M)`` bool, False at right padding.
            final_rule: route by the final sparse rule instead of the training rule.

        Returns:
            What :meth:`decode` wants, and the routings of the encoder.

        Raises:
            ConfigError: if the source is longer than the context.
        """
        self._check_length("source", source.shape[1])
        positions = torch.arange(source.shape[1], device=source.device)
        hidden = self.dropout(self.token_embedding(source) + self.source_positions(positions))  # (B, M, D)
        hidden, routings = self.apply_blocks(
            self._blocks(self.encoder),
            hidden,
            token_ids=source,
            previous_ids=ids_before(source),
            valid=valid,
            final_rule=final_rule,
        )
        memory = self.encoder_norm(hidden)
        crosses = (block.cross_attention for block in self._blocks(self.decoder))
        return [cross.project(memory) for cross in crosses if cross is not None], routings

    def decode(
        self,
        target: Tensor,
        memories: Memories,
        *,
        source_valid: Tensor | None = None,
        valid: Tensor | None = None,
        final_rule: bool = False,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Predict the next token at every position of the target.

        Args:
            target: ``(B, S)`` token ids; with a cache, the S tokens after those it holds.
            memories: from :meth:`encode`; of B sources, or of fewer where several rows of the target, one after the
                other, belong to one source.
            source_valid: of the sources, ``(B, M)`` bool, False at their padding.
            valid: ``(B, S)`` bool, False at right padding.
            final_rule: route by the final sparse rule instead of the training rule.
            cache: keys and values of the past, from :meth:`new_cache`; updated in place.

        Returns:
            Logits ``(B, S, V)``, and the routings of the decoder.

        Raises:
            ConfigError: if the target is longer than the context.
        """
        self._check_length("target", target.shape[1])
        if cache is None:
            positions, previous_ids = torch.arange(target.shape[1], device=target.device), ids_before(target)
        else:
            positions, previous_ids = cache.extend(target.shape[1], valid), cache.previous(target, valid)
        hidden = self.dropout(self.token_embedding(target) + self.target_positions(positions))  # (B, S, D)
        hidden, routings = self.apply_blocks(
            self._blocks(self.decoder),
            hidden,
            token_ids=target,
            previous_ids=previous_ids,
            valid=valid,
            final_rule=final_rule,
            cache=cache,
            memories=memories,
            memory_valid=source_valid,
        )
        return score_words(self.decoder_norm(hidden), self.token_embedding, self.vocab_size), routings

    @property
    def named_blocks(self) -> dict[str, Block]:
        """``encoder_0`` and so on, then ``decoder_0`` and so on."""
        stacks = {"encoder": self._blocks(self.encoder), "decoder": self._blocks(self.decoder)}
        return {f"{name}_{index}": block for name, stack in stacks.items() for index, block in enumerate(stack)}

    def new_cache(self, batch: int) -> KeyValueCache:
        """An empty key-value cache of the decoder for ``batch`` rows."""
        return empty_cache(self._blocks(self.decoder), batch, self.context)

    def forward_flops(
        self, batch: int, source: int, target: int, active_experts: float | Sequence[float] = 1.0
    ) -> float:
        """FLOPs of a forward pass of a whole batch.

        Args:
            batch: sequences B.
            source: tokens M of a source, padding included.
            target: tokens S of a target, padding included.
            active_experts: mean experts per token, one number for all MoE layers or one for each, encoder first.
        """
        numbers = self.spread(active_experts)
        encoder, decoder = self._blocks(self.encoder), self._blocks(self.decoder)
        split = len(numbers) // 2
        per_source = self.block_flops(encoder, source, numbers[:split])
        per_target = self.block_flops(decoder, target, numbers[split:], source, memory_per_token=source / target)
        head = matrix_flops([self.token_embedding.weight])
        return batch * (source * per_source + target * (per_target + head))

    def _check_length(self, name: str, length: int) -> None:
        if length > self.context:
            raise ConfigError(
                f"{name} of {length} tokens, but the model's context is {self.context}: shorten it or build the model "
                f"with context={length}"
            )

    @staticmethod
    def _blocks(stack: nn.ModuleList) -> list[Block]:
        return cast("list[Block]", list(stack))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all parameters anew, as :meth:`evomoe.models.gpt.GPT.init_weights` does.

        Args:
            seed: of the draws.
        """
        for name in ("token_embedding", "source_positions", "target_positions"):
            draw_normal_(getattr(self, name).weight, INIT_STD, seed, name)
        for norm in (self.encoder_norm, self.decoder_norm):
            if isinstance(norm, nn.LayerNorm):
                norm.reset_parameters()
        for name, block in self.named_blocks.items():
            block.init_weights(seed, name, INIT_STD, output_std(self.num_layers))
