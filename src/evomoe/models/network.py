"""What all networks share: how their blocks are built, run, counted and initialised.

Shapes: B batch, S sequence, D model width, H hidden width of feed-forward and experts, E experts, L layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evomoe.errors import ConfigError
from evomoe.models.blocks import Block, FeedForward
from evomoe.models.flops import attention_flops, expert_flops, layer_flops, matrix_flops
from evomoe.models.key_value_cache import KeyValueCache
from evomoe.moe.kernels import compute_dtype
from evomoe.moe.layer import MoELayer, RouterFactory
from evomoe.routing import Router, Routing

INIT_STD = 0.02
VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What the blocks of a network have in common; the networks take the same options by the same names.

    Args:
        d_model: width D.
        num_heads: attention heads; divides D.
        d_ff: hidden width H of the feed-forwards; None for 4 D.
        d_expert: hidden width of an expert; None for ``d_ff``. Fine-grained experts (DeepSeekMoE, arXiv 2401.06066)
            have ``d_ff / m``, with m times the experts and m times the experts per token.
        shared_experts: experts of an MoE layer that work for every token, see
            :class:`~evomoe.moe.layer.MoELayer`.
        num_experts: experts E of an MoE layer.
        moe_every: block i (from 0) of a stack is MoE iff ``(i + 1) % moe_every == 0``; 0 for a dense model.
        router: factory of the routers, called with ``(d_model, num_experts)``; unused in a dense model.
        activation: ``gelu``, ``relu`` or ``swiglu``.
        norm_first: norms before the branches, or after the sums.
        bias: whether linear layers, norms and experts have biases.
        dropout: dropout of residual branches, the same for dense and sparse ones.
        attention_dropout: dropout of the attention weights.
        allow_future_leak: whether a causal block accepts a router that looks at later tokens.
        expert_backend: kernel of the experts, see :class:`~evomoe.moe.experts.Experts`.
    """

    d_model: int
    num_heads: int
    d_ff: int | None = None
    d_expert: int | None = None
    shared_experts: int = 0
    num_experts: int = 8
    moe_every: int = 2
    router: RouterFactory | None = None
    activation: str = "gelu"
    norm_first: bool = True
    bias: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0
    allow_future_leak: bool = False
    expert_backend: str = "auto"

    def __post_init__(self) -> None:
        sizes = {"d_model": self.d_model, "num_heads": self.num_heads, "d_ff": self.d_ff, "d_expert": self.d_expert}
        check_sizes({name: size for name, size in sizes.items() if size is not None})
        if self.moe_every and self.router is None:
            raise ConfigError(
                f"router=None with moe_every={self.moe_every}: give a router, or moe_every=0 for a dense one"
            )
        for name, probability in (("dropout", self.dropout), ("attention_dropout", self.attention_dropout)):
            if not 0 <= probability < 1:
                raise ConfigError(f"{name}={probability}: expected a probability in [0, 1)")

    def build(self, num_layers: int, *, causal: bool = True, padded: bool = True, cross: bool = False) -> nn.ModuleList:
        """A stack of ``num_layers`` blocks; call :meth:`Network.init_weights` on the whole afterwards.

        Args:
            num_layers: blocks L.
            causal: whether a token sees only itself and the tokens before it.
            padded: whether a sequence may end in padding, rather than be real or padding as a whole.
            cross: whether the blocks look at a memory.

        Raises:
            ConfigError: for sizes that do not fit together, and for a router that leaks the future in a causal stack.
        """
        check_sizes({"num_layers": num_layers})
        if not 0 <= self.moe_every <= num_layers:
            raise ConfigError(
                f"moe_every={self.moe_every} leaves no MoE layer among num_layers={num_layers}: expected 1 to "
                f"{num_layers}, or 0 for a dense model"
            )
        blocks = []
        for index in range(num_layers):
            feed_forward = self._feed_forward(index)
            if causal and isinstance(feed_forward, MoELayer) and not self.allow_future_leak:
                refuse_future_leak(feed_forward.router)
            block = Block(
                self.d_model,
                self.num_heads,
                feed_forward,
                causal=causal,
                padded=padded,
                cross=cross,
                norm_first=self.norm_first,
                bias=self.bias,
                dropout=self.dropout,
                attention_dropout=self.attention_dropout,
            )
            blocks.append(block)
        return nn.ModuleList(blocks)

    def _feed_forward(self, index: int) -> FeedForward | MoELayer:
        d_ff = 4 * self.d_model if self.d_ff is None else self.d_ff
        if not self.moe_every or self.router is None or (index + 1) % self.moe_every:
            return FeedForward(self.d_model, d_ff, activation=self.activation, bias=self.bias)
        return MoELayer(
            self.d_model,
            d_ff if self.d_expert is None else self.d_expert,
            self.num_experts,
            self.router,
            activation=self.activation,
            bias=self.bias,
            backend=self.expert_backend,
            shared_experts=self.shared_experts,
        )


class Network(nn.Module, ABC):
    """Base of the networks.

    Args:
        checkpoint_activations: recompute each block in the backward pass instead of storing its activations.
    """

    options_class: ClassVar[type] = BlockOptions
    """Of what a network takes as ``**options``, for those who check a configuration before building anything."""

    def __init__(self, checkpoint_activations: bool = False) -> None:
        super().__init__()
        self.checkpoint_activations = checkpoint_activations

    @property
    @abstractmethod
    def named_blocks(self) -> dict[str, Block]:
        """All blocks by name, in the order in which a batch meets them."""

    @abstractmethod
    def init_weights(self, seed: int) -> None:
        """Draw all parameters anew, each from a generator of its own.

        Args:
            seed: of the draws.
        """

    @property
    def moe_layers(self) -> dict[str, MoELayer]:
        """The MoE layers by the name of their block (``"block_1"``, counted from 0), in order."""
        layers = {name: block.feed_forward for name, block in self.named_blocks.items()}
        return {name: layer for name, layer in layers.items() if isinstance(layer, MoELayer)}

    def apply_blocks(
        self,
        blocks: Sequence[Block],
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        previous_ids: Tensor | None = None,
        valid: Tensor | None = None,
        final_rule: bool = False,
        cache: KeyValueCache | None = None,
        memories: Sequence[tuple[Tensor, Tensor]] | None = None,
        memory_valid: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Run a stack of blocks; see :meth:`evomoe.models.blocks.Block.forward` for the arguments.

        With ``checkpoint_activations`` each block is recomputed in the backward pass with the same random numbers, and
        the routings returned are those of this first pass.

        Args:
            blocks: the stack.
            hidden: ``(B, S, D)``.
            token_ids: ``(B, S)``.
            previous_ids: ``(B, S)``.
            valid: ``(B, S)`` bool.
            final_rule: route by the final sparse rule instead of the training rule.
            cache: keys and values of the past.
            memories: keys and values of the source, one pair for each block with cross-attention.
            memory_valid: ``(B, M)`` bool.

        Returns:
            The last hidden states ``(B, S, D)``, and the routings of the MoE layers in order.
        """
        routings: list[Routing] = []
        previous_logits: Tensor | None = None
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for index, block in enumerate(blocks):
            apply = partial(
                block,
                token_ids=token_ids,
                previous_ids=previous_ids,
                previous_logits=previous_logits,
                valid=valid,
                final_rule=final_rule,
                cache=cache,
                layer=index,
                memory=None if memories is None else memories[index],
                memory_valid=memory_valid,
            )
            hidden, routing = checkpoint(apply, hidden, use_reentrant=False) if recompute else apply(hidden)
            if routing is not None:
                routings.append(routing)
                previous_logits = routing.logits
        return hidden, routings

    def num_parameters(self) -> int:
        """Number of parameters, all experts and extra embedding rows included, a tied embedding once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self, active_experts: float | Sequence[float] = 1.0) -> float:
        """Number of parameters that one token meets.

        Args:
            active_experts: mean experts per token, one number for all MoE layers or one for each, in order.
        """
        active = float(self.num_parameters())
        for layer, number in zip(self.moe_layers.values(), self.spread(active_experts), strict=True):
            expert = sum(parameter.numel() for parameter in layer.experts.expert_parameters(0).values())
            active -= (layer.num_experts - number) * expert
        return active

    def block_flops(
        self,
        blocks: Sequence[Block],
        context: int,
        active_experts: Sequence[float],
        memory: int = 0,
        memory_per_token: float = 0.0,
    ) -> float:
        """FLOPs of a forward pass of a stack per token of its sequence.

        Args:
            blocks: the stack.
            context: tokens per sequence, which decides the cost of attention.
            active_experts: mean experts per token of each of the stack's MoE layers.
            memory: tokens of the source that cross-attention looks at.
            memory_per_token: those of the batch over the tokens of this stack: the share that one token has in the
                projection of the source's keys and values.
        """
        total, numbers = 0.0, iter(active_experts)
        for block in blocks:
            width = block.attention.output.in_features
            total += matrix_flops(block.attention.parameters()) + attention_flops(width, context)
            if block.cross_attention is not None:
                cross = block.cross_attention
                total += matrix_flops([cross.query.weight, cross.output.weight]) + attention_flops(width, memory)
                total += matrix_flops([cross.key_value.weight]) * memory_per_token
            layer = block.feed_forward
            total += layer_flops(layer, next(numbers)) if isinstance(layer, MoELayer) else expert_flops(layer.experts)
        return total

    def spread(self, active_experts: float | Sequence[float]) -> Sequence[float]:
        """One number for each MoE layer, of one for all or of as many."""
        layers = len(self.moe_layers)
        if not isinstance(active_experts, Sequence):
            return [active_experts] * layers
        if len(active_experts) != layers:
            raise ValueError(f"{len(active_experts)} numbers of active experts for {layers} MoE layers")
        return active_experts


def output_std(num_layers: int) -> float:
    """Initial deviation of the matrices out of a branch, in a stack of L layers (GPT-2)."""
    return INIT_STD * (2 * num_layers) ** -0.5


def empty_cache(blocks: Sequence[Block], batch: int, capacity: int) -> KeyValueCache:
    """A key-value cache for ``batch`` rows of at most ``capacity`` positions, on the blocks' device.

    Keys and values are kept as the blocks compute them: under autocast, in its precision.
    """
    attention = blocks[0].attention
    weight = attention.qkv.weight
    return KeyValueCache(
        len(blocks),
        batch,
        attention.num_heads,
        attention.output.in_features // attention.num_heads,
        capacity,
        device=weight.device,
        dtype=compute_dtype(weight),
    )


def word_embedding(vocab_size: int, d_model: int) -> nn.Embedding:
    """An embedding whose rows are a multiple of 64, for speed; no logit is returned for the extra ones."""
    return nn.Embedding(-(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE, d_model)


def score_words(hidden: Tensor, embedding: nn.Embedding, vocab_size: int, bias: Tensor | None = None) -> Tensor:
    """Logits ``(..., V)`` of states ``(..., D)`` against a tied embedding, with one ``bias`` for each of its rows."""
    # Score the extra rows too, for aligned shapes, and let nobody see them.
    return F.linear(hidden, embedding.weight, bias)[..., :vocab_size]


def ids_before(tokens: Tensor) -> Tensor:
    """The id before each token ``(B, S)``, -1 at the beginning of a sequence."""
    return F.pad(tokens[:, :-1], (1, 0), value=-1)


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Raise ConfigError for the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name}={size}: expected at least 1")


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
