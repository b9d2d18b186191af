"""GPT with a Mixture-of-Experts in every ``moe_every``-th block: pre-norm, learned positions, tied embeddings.

Shapes: B batch, S sequence, D model width, H hidden width of feed-forward and experts, E experts, L layers,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evomoe.errors import ConfigError
from evomoe.models.blocks import DecoderBlock, FeedForward, KeyValueCache
from evomoe.models.flops import attention_flops, expert_flops, layer_flops, matrix_flops
from evomoe.models.initialization import draw_normal_
from evomoe.moe.layer import MoELayer, RouterFactory
from evomoe.routing import Router, Routing, SparseRouting

INIT_STD = 0.02
VOCABULARY_MULTIPLE = 64


class GPT(nn.Module):
    """Decoder-only language model (GPT-2's shape) whose feed-forwards may be mixtures of experts.

    A model built with ``moe_every=0`` is the dense baseline: the same code with plain feed-forwards, and, for the same
    seed, the same initial weights outside the experts; expert 0 of an MoE layer starts as that layer's dense
    feed-forward (see :meth:`init_weights`).

    Args:
        vocab_size: number of token ids V. The embedding has rows up to a multiple of 64 for speed; no logit is
            returned for the extra ones.
        context: most tokens per sequence.
        d_model: width D.
        num_layers: blocks L.
        num_heads: attention heads; divides D.
        d_ff: hidden width H of the feed-forwards; None for 4 D.
        d_expert: hidden width of an expert; None for ``d_ff``. Fine-grained experts (DeepSeekMoE, arXiv 2401.06066)
            have ``d_ff / m``, with m times the experts and m times the experts per token.
        shared_experts: experts of an MoE layer that work for every token, see
            :class:`~evomoe.moe.layer.MoELayer`.
        num_experts: experts E of an MoE layer.
        moe_every: block i (from 0) is MoE iff ``(i + 1) % moe_every == 0``; 0 for a dense model.
        router: factory of the routers, called with ``(d_model, num_experts)``; unused in a dense model.
        activation: ``gelu``, ``relu`` or ``swiglu``.
        bias: whether linear layers, norms and experts have biases.
        dropout: dropout of embeddings and residual branches, the same for dense and sparse ones.
        attention_dropout: dropout of the attention weights. On a CPU it rules out the fused attention kernel.
        checkpoint_activations: recompute each block in the backward pass instead of storing its activations.
        allow_future_leak: accept a router that looks at later tokens.
        expert_backend: kernel of the experts, see :class:`~evomoe.moe.experts.Experts`.

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
        d_ff: int | None = None,
        d_expert: int | None = None,
        shared_experts: int = 0,
        num_experts: int = 8,
        moe_every: int = 2,
        router: RouterFactory | None = None,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        checkpoint_activations: bool = False,
        allow_future_leak: bool = False,
        expert_backend: str = "auto",
    ) -> None:
        super().__init__()
        d_ff = 4 * d_model if d_ff is None else d_ff
        d_expert = d_ff if d_expert is None else d_expert
        sizes = {
            "vocab_size": vocab_size,
            "context": context,
            "d_model": d_model,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "d_ff": d_ff,
            "d_expert": d_expert,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name}={size}: expected at least 1")
        if not 0 <= moe_every <= num_layers:
            raise ConfigError(
                f"moe_every={moe_every} leaves no MoE layer among num_layers={num_layers}: expected 1 to {num_layers}, "
                "or 0 for a dense model"
            )
        if moe_every and router is None:
            raise ConfigError(f"router=None with moe_every={moe_every}: give a router, or moe_every=0 for a dense one")
        for name, probability in (("dropout", dropout), ("attention_dropout", attention_dropout)):
            if not 0 <= probability < 1:
                raise ConfigError(f"{name}={probability}: expected a probability in [0, 1)")
        self.vocab_size = vocab_size
        self.context = context
        self.d_model = d_model
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.checkpoint_activations = checkpoint_activations
        self.output_std = INIT_STD * (2 * num_layers) ** -0.5

        rows = -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        self.token_embedding = nn.Embedding(rows, d_model)
        self.position_embedding = nn.Embedding(context, d_model)
        self.dropout = nn.Dropout(dropout)
        blocks = []
        for index in range(num_layers):
            feed_forward: FeedForward | MoELayer
            if moe_every and router is not None and (index + 1) % moe_every == 0:
                feed_forward = MoELayer(
                    d_model,
                    d_expert,
                    num_experts,
                    router,
                    activation=activation,
                    bias=bias,
                    backend=expert_backend,
                    init_std=INIT_STD,
                    output_std=self.output_std,
                    shared_experts=shared_experts,
                )
                if not allow_future_leak:
                    refuse_future_leak(feed_forward.router)
            else:
                feed_forward = FeedForward(d_model, d_ff, activation=activation, bias=bias)
            blocks.append(
                DecoderBlock(
                    d_model,
                    num_heads,
                    feed_forward,
                    bias=bias,
                    dropout=dropout,
                    attention_dropout=attention_dropout,
                )
            )
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = nn.LayerNorm(d_model, bias=bias)
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
        2. Apply the blocks; with ``checkpoint_activations``, each is recomputed in the backward pass with the same
           random numbers, and the routings returned are those of this first pass.
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

        previous_ids = F.pad(tokens[:, :-1], (1, 0), value=-1) if cache is None else cache.previous(tokens, valid)

        routings: list[Routing] = []
        previous_logits: Tensor | None = None
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for index, block in enumerate(self._decoder_blocks):
            apply = partial(
                block,
                token_ids=tokens,
                previous_ids=previous_ids,
                previous_logits=previous_logits,
                valid=valid,
                final_rule=final_rule,
                cache=cache,
                layer=index,
            )
            hidden, routing = checkpoint(apply, hidden, use_reentrant=False) if recompute else apply(hidden)
            if routing is not None:
                routings.append(routing)
                previous_logits = routing.logits if isinstance(routing, SparseRouting) else None

        # Score the extra rows too, for aligned shapes, and let nobody see them.
        logits = F.linear(self.final_norm(hidden), self.token_embedding.weight)[..., : self.vocab_size]
        return logits, routings

    @property
    def moe_layers(self) -> dict[str, MoELayer]:
        """The MoE layers by name (``"block_1"`` for the one in block 1, counted from 0), in order."""
        layers = {f"block_{index}": block.feed_forward for index, block in enumerate(self._decoder_blocks)}
        return {name: layer for name, layer in layers.items() if isinstance(layer, MoELayer)}

    def new_cache(self, batch: int) -> KeyValueCache:
        """An empty key-value cache for ``batch`` rows, of the model's context, device and precision."""
        weight = self.token_embedding.weight
        return KeyValueCache(
            self.num_layers,
            batch,
            self.num_heads,
            self.d_model // self.num_heads,
            self.context,
            device=weight.device,
            dtype=weight.dtype,
        )

    def num_parameters(self) -> int:
        """Number of parameters, all experts and the extra embedding rows included, the tied embedding once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self, active_experts: float | Sequence[float] = 1.0) -> float:
        """Number of parameters that one token meets.

        Args:
            active_experts: mean experts per token, one number for all MoE layers or one for each, in order.
        """
        active = float(self.num_parameters())
        for layer, number in self._layers_with(active_experts):
            expert = sum(parameter.numel() for parameter in layer.experts.expert_parameters(0).values())
            active -= (layer.num_experts - number) * expert
        return active

    def flops_per_token(self, context: int, active_experts: float | Sequence[float] = 1.0) -> float:
        """FLOPs of a forward pass per token; times ``TRAINING_FACTOR`` for a training step.

        Args:
            context: tokens S per sequence, which decides the cost of attention.
            active_experts: mean experts per token, one number for all MoE layers or one for each, in order.
        """
        total = float(matrix_flops([self.token_embedding.weight]))
        for block in self._decoder_blocks:
            total += matrix_flops(block.attention.parameters()) + attention_flops(self.d_model, context)
            if isinstance(block.feed_forward, FeedForward):
                total += expert_flops(block.feed_forward.experts)
        for layer, number in self._layers_with(active_experts):
            total += layer_flops(layer, number)
        return total

    @property
    def _decoder_blocks(self) -> list[DecoderBlock]:
        return cast("list[DecoderBlock]", list(self.blocks))

    def _layers_with(self, active_experts: float | Sequence[float]) -> list[tuple[MoELayer, float]]:
        layers = list(self.moe_layers.values())
        numbers = active_experts if isinstance(active_experts, Sequence) else [active_experts] * len(layers)
        return list(zip(layers, numbers, strict=True))

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
        for index, block in enumerate(self._decoder_blocks):
            block.init_weights(seed, f"block_{index}", INIT_STD, self.output_std)


def refuse_future_leak(router: Router) -> None:
    """Raise ConfigError if ``router`` lets a token's routing depend on later tokens of its sequence."""
    leaking = [
        mode
        for mode, causal in (("training", router.causal_in_train), ("evaluation", router.causal_in_eval))
        if not causal
    ]
    if leaking:
        raise ConfigError(
            f"router {type(router).__name__} looks at later tokens in {' and '.join(leaking)}, which a language model "
            "must not see: choose a causal router, or set model.allow_future_leak=true to measure the leak"
        )
